"""A clone of this project for a test to work in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from fullscale.runtime.processes import SPIN_COUNT

ROOT = Path(__file__).parents[2]


class Project:
    """A clone of this project with its own DVC cache, MLflow store and Prefect home."""

    def __init__(self, root: Path) -> None:
        self.root = root
        kept = {"HOME", "LANG", "TMPDIR", "SSL_CERT_FILE", "OMP_NUM_THREADS"}
        self.environment = {key: os.environ[key] for key in kept if key in os.environ} | {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "GOMP_SPINCOUNT": SPIN_COUNT,
            "DO_NOT_TRACK": "1",
            "GIT_CONFIG_COUNT": "2",
            "GIT_CONFIG_KEY_0": "user.name",
            "GIT_CONFIG_VALUE_0": "Test",
            "GIT_CONFIG_KEY_1": "user.email",
            "GIT_CONFIG_VALUE_1": "test@example.org",
        }

    def run(self, *command: str, code: int | None = 0) -> str:
        """Run a program in the clone; returns what it printed, after checking its exit code."""
        done = subprocess.run(
            command,
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=500,
            check=False,
        )
        if code is not None:
            assert done.returncode == code, f"{' '.join(command)}:\n{done.stdout}"
        else:
            assert done.returncode != 0, f"{' '.join(command)} did not fail:\n{done.stdout}"
        return done.stdout

    def change_params(self, section: str, **values: object) -> None:
        """Set keys of a section of params.yaml."""
        path = self.root / "params.yaml"
        content = yaml.safe_load(path.read_text())
        content[section] |= values
        path.write_text(yaml.safe_dump(content, sort_keys=False))


def clone_project(folder: Path, *, with_sample: bool = True) -> Project:
    """Return this working tree, without what git ignores, as a new repository in `folder`.

    Args:
        folder: new.
        with_sample: copy the remote with the published scans too.
    """
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        source = ROOT / name
        if not with_sample and name.startswith("sample-remote/"):
            continue
        if name and source.is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(source.read_bytes())
    project = Project(folder)
    project.run("git", "init", "--quiet", "--initial-branch", "main")
    project.run("git", "add", "--all")
    project.run("git", "commit", "--quiet", "--message", "clone")
    return project


def copy_project(template: Project, folder: Path) -> Project:
    """Copy a project, with all that was made in it and the files next to it, to a new folder.

    Absolute paths in its DVC settings are changed to those of the copy.
    """
    before, after = str(template.root.parent), str(folder)
    shutil.copytree(before, folder, symlinks=True, dirs_exist_ok=True)
    project = Project(folder / template.root.name)
    settings = project.root / ".dvc/config.local"
    if settings.exists():
        settings.write_text(settings.read_text().replace(before, after))
    return project


def write_published(folder: Path) -> None:
    """Write README, parameters and reports to `folder` as they are in git's index.

    On another machine `make repro` leaves other scores in the working tree; those are not staged.
    """
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "README.md", "params.yaml", "reports"],
        capture_output=True,
        check=True,
    )
    subprocess.run(
        ["git", "-C", str(ROOT), "checkout-index", "-z", "--stdin", f"--prefix={folder}/"],
        input=listed.stdout,
        check=True,
    )
