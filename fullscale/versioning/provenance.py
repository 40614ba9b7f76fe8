"""The origin of a result: git commit, data version, test set, library versions."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import yaml

from fullscale.runtime.errors import StageError
from fullscale.runtime.files import file_sha256
from fullscale.versioning.git import git

LIBRARIES = ("torch", "lightning-fabric", "kornia", "numpy", "nibabel", "mlflow", "dvc", "prefect")


@dataclass(frozen=True)
class Provenance:
    """Versions of code and data, as needed to reproduce a result.

    Attributes:
        git_commit: current commit, with the suffix "-dirty" if tracked files differ, or "none"
            outside a git repository.
        data_version: MD5 of the annotated scans, from data.dvc.
        branch: the branch of the code; "" if it is unknown.
    """

    git_commit: str
    data_version: str
    branch: str = ""


def read_provenance(root: Path, code_branch: str = "") -> Provenance:
    """Read the versions of code and data in the project at `root`.

    Args:
        root: the project, or a worktree of it.
        code_branch: where no branch is checked out, as in a worktree: the branch of the code.
    """
    commit = _git_commit(root)
    branch = "" if commit == "none" else git(root, "branch", "--show-current")
    return Provenance(commit, read_data_version(root), branch or code_branch)


def read_data_version(root: Path) -> str:
    """Read the MD5 of data/ from data.dvc.

    Raises:
        StageError: data.dvc is missing or does not describe data/.
    """
    path = root / "data.dvc"
    try:
        return parse_data_version(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise StageError(f"{path} is missing; version the scans with `dvc add data`") from None


def parse_data_version(text: str, name: str) -> str:
    """Return the MD5 of data/ from the text of a data.dvc; `name` names the file in errors.

    Raises:
        StageError: the text does not describe data/.
    """
    try:
        return str(yaml.safe_load(text)["outs"][0]["md5"])
    except (yaml.YAMLError, KeyError, IndexError, TypeError):
        raise StageError(
            f"{name} does not give the MD5 of data/; restore it with `git checkout data.dvc` "
            "or make it again with `dvc add data`"
        ) from None


def warn_of_uncommitted_data(root: Path) -> str | None:
    """Return a warning if data/ is another version than the one committed in git, else None.

    `dvc repro` writes the version of the scans that it finds in data/ into data.dvc.
    """
    done = subprocess.run(
        ["git", "-C", str(root), "show", "HEAD:./data.dvc"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:  # not in git, or not yet
        return None
    committed = parse_data_version(done.stdout, "the committed data.dvc")
    present = read_data_version(root)
    if present == committed:
        return None
    return (
        f"warning: data/ holds data version {present}, and {committed} is committed. If you added "
        "scans, commit data.dvc; if you merged a branch, take its scans: `git checkout data.dvc`, "
        "`dvc checkout`"
    )


def stage_code(root: Path, stage: str) -> dict[str, str]:
    """Return the first 12 digits of the SHA-256 of each Python file that a stage depends on."""
    pipeline = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))
    found: dict[str, str] = {}
    for dep in pipeline["stages"][stage]["deps"]:
        path = root / dep
        if dep.startswith(("artifacts/", "data")):
            continue
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found[file.relative_to(root).as_posix()] = file_sha256(file)[:12]
    return found


class AnnotatedCase(Protocol):
    """A test case, identified by its name, its patient and its annotation."""

    @property
    def name(self) -> str:
        """Name of the case."""

    @property
    def patient(self) -> str:
        """Identifier of the patient."""

    @property
    def label_sha256(self) -> str:
        """Checksum of the label map's file."""


def digest_test_set(cases: Iterable[AnnotatedCase]) -> str:
    """Return a 16-digit identifier of a test set; the order of the cases does not matter.

    A corrected annotation, or a scan that is found to be of another patient, is another test set.
    """
    rows = sorted([case.name, case.patient, case.label_sha256] for case in cases)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that can change a result."""
    return {name: version(name) for name in LIBRARIES}


def _git_commit(root: Path) -> str:
    def ask(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        commit = ask("rev-parse", "HEAD")
        changed = ask("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.yaml")
    except subprocess.CalledProcessError as error:
        if "dubious ownership" in error.stderr:
            raise StageError(error.stderr.strip()) from None
        return "none"
    except FileNotFoundError:
        return "none"
    return f"{commit}-dirty" if changed else commit
