from __future__ import annotations

import shutil
from datetime import date
from pathlib import Path

import pytest
from cohorts import write_nnunet
from typer.testing import CliRunner

from fullscale.runtime.locks import acquire_lock
from fullscale.versioning.data_version import open_newest, restore_data
from fullscale.versioning.git import SCANS_BRANCH, commit_paths, git, run_program
from fullscale.versioning.provenance import read_data_version
from fullscale.versioning.retraining import clear_pending, mark_pending, publish
from fullscale.versioning.worktree import RETRAIN
from tasks.cli import app
from tasks.receive import receive

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def template(scans_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which scans landed and were trained on, with a remote and an unused object."""
    root = tmp_path_factory.mktemp("template") / "project"
    shutil.copytree(scans_template, root, symlinks=True)
    (root / "dvc.yaml").write_text("stages: {}\n")
    with (root / ".gitignore").open("a") as ignored:
        ignored.write("/first\n/weights\n/unused\n/computed\n")
    add(root, "first")
    commit_paths(root, ["."], "Begin the pipeline")
    (root / "first.dvc").unlink()
    commit_paths(root, ["."], "Drop what only the commit before names")
    dvc(root, "remote", "add", "--local", "--default", "team", "../remote")
    write_nnunet(root / "inbox", 1, prefix="new", seed=50)
    receive(root, str(root / "inbox"), 0)
    with open_newest(root, RETRAIN) as folder:
        restore_data(folder)
        add(folder, "weights")
        publish(folder, date(2026, 11, 29), read_data_version(folder), "Retrain: pass")
    add(root, "unused")
    (root / "unused.dvc").unlink()
    return root


@pytest.fixture
def project(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it for one test, in which the command runs."""
    root = tmp_path / "project"
    run_program(["cp", "-a", str(template), str(root)], tmp_path)  # keeps hard links
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("FULLSCALE_INBOX", raising=False)
    monkeypatch.chdir(root)
    return root


def dvc(folder: Path, *arguments: str) -> str:
    return run_program(["dvc", *arguments], folder)


def add(folder: Path, name: str) -> None:
    """Put a file of a megabyte into the cache, named by NAME.dvc."""
    (folder / name).write_text((name * 2**20)[: 2**20])
    dvc(folder, "add", "--quiet", name)


def collect(*options: str) -> str:
    done = CliRunner().invoke(app, ["gc", *options], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done.output


def state(project: Path) -> set[tuple[str, int]]:
    return {
        (str(path), path.lstat().st_size)
        for name in (".dvc/cache", ".cache/checkouts", "inbox", "data")
        for path in (project / name).rglob("*")
        # a lock, DVC's own state, or the link of a worktree to its repository, which was copied
        if path.is_file() and path.suffix != ".lock" and not {"tmp", ".git"} & {*path.parts}
    }


def test_only_what_can_be_made_again_is_removed_and_only_when_asked(project: Path) -> None:
    before = state(project)
    told = collect("--keep-days", "0")
    assert state(project) == before
    for words in ("worktree inbox", "worktree retrain", "2 objects in DVC's cache", "2.0"):
        assert words in told, told
    assert "`fullscale gc --yes` does it" in told
    (row,) = [line for line in told.splitlines() if "worktree retrain" in line]
    assert row.split()[-1] == "0.0"  # scans and weights are links to the cache
    assert "inbox accepted" not in told  # its case is not in data/ yet
    git(project, "merge", "--quiet", SCANS_BRANCH)
    dvc(project, "checkout", "--quiet")
    told = collect("--yes", "--keep-days", "0")
    assert "removed worktree retrain" in told
    assert "removed inbox accepted/" in told
    assert not list((project / "inbox").rglob("*.nii.gz"))
    assert not [path for path in (project / ".cache/checkouts").iterdir() if path.is_dir()]
    assert len(git(project, "worktree", "list").splitlines()) == 1
    assert collect() == "gc: 0.0 MiB can be removed; `fullscale gc --yes` does it\n"
    # All that branches name is still in the cache, and nothing is in the remote.
    (branch,) = git(project, "branch", "--list", "--format=%(refname:short)", "retrain/*").split()
    for name in ("main", branch):
        git(project, "checkout", "--quiet", name)
        dvc(project, "checkout", "--quiet", "--force")
        assert len(list((project / "data/imagesTr").iterdir())) == 4
    assert (project / "weights").read_text().startswith("weights")


def test_what_is_not_finished_or_needed_elsewhere_stays(project: Path, tmp_path: Path) -> None:
    folder = project / ".cache/checkouts" / RETRAIN
    checkpoint = folder / ".cache/train/unet/0/checkpoints/a.pt"
    with open_newest(project, RETRAIN) as folder:
        add(folder, "computed")
    assert "worktree retrain stays: it has results of a retraining" in collect("--yes")
    (folder / "computed").unlink()
    dvc(folder, "checkout", "--quiet", "computed.dvc")  # no commit names it
    (folder / "computed.dvc").unlink()
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("state")
    assert "worktree retrain stays: it has checkpoints of a training" in collect("--yes")
    assert checkpoint.is_file()
    before = state(project)
    with acquire_lock(project / ".cache/checkouts" / f"{RETRAIN}.lock"):
        assert "left out: another process holds" in collect("--yes")
    mark_pending(project, git(project, "rev-parse", "HEAD"))
    assert "before its results were published" in collect("--yes")
    clear_pending(project, git(project, "rev-parse", "HEAD"))
    dvc(project, "cache", "dir", "--local", str(tmp_path / "shared"))
    assert "may be the cache of other projects" in collect("--yes")
    assert state(project) == before


def test_without_a_remote_the_cache_keeps_what_an_earlier_commit_names(project: Path) -> None:
    dvc(project, "remote", "remove", "--local", "team")
    assert "1 objects in DVC's cache" in collect()
