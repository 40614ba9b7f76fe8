"""Make a small repository of git and DVC, for tests of data versions."""

from pathlib import Path

from cohorts import write_nnunet

from fullscale.ingestion.ingest import ingest
from fullscale.versioning.git import commit_paths, git, run_program

PARAMS = Path(__file__).parents[2] / "params.yaml"


def make_repository(root: Path) -> Path:
    """Make a repository with three versioned scans in data/ and the parameters of this project."""
    root.mkdir(parents=True)
    git(root, "init", "--quiet", "--initial-branch", "main")
    run_program(["dvc", "init", "--quiet"], root)
    ignored = ("/data", "/.cache/", "/inbox", "/quarantine.json")
    (root / ".gitignore").write_text("".join(f"{name}\n" for name in ignored))
    (root / "params.yaml").write_text(PARAMS.read_text())
    ingest(write_nnunet(root.parent / "source", 3), root / "data")
    run_program(["dvc", "add", "--quiet", "data"], root)
    commit_paths(root, ["."], "Begin")
    return root
