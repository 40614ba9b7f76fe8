"""Where a result comes from: git commit, data version, test set, library versions."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import yaml

from fullscale.runtime.errors import StageError
from fullscale.runtime.files import file_sha256

LIBRARIES = ("torch", "lightning-fabric", "kornia", "numpy", "nibabel", "mlflow", "dvc", "prefect")


@dataclass(frozen=True)
class Provenance:
    """What a person needs to make a result again.

    Attributes:
        git_commit: the commit checked out, with "-dirty" behind it when tracked files differ,
            or "none" outside a git repository.
        data_version: MD5 of the annotated scans, as data.dvc states it.
    """

    git_commit: str
    data_version: str


def read_provenance(root: Path) -> Provenance:
    """Read the versions of code and data in the project at `root`."""
    return Provenance(git_commit=_git_commit(root), data_version=read_data_version(root))


def read_data_version(root: Path) -> str:
    """The MD5 that data.dvc gives for data/.

    Raises:
        StageError: data.dvc is missing or does not describe data/.
    """
    path = root / "data.dvc"
    try:
        return parse_data_version(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise StageError(f"{path} is missing; version the scans with `dvc add data`") from None


def parse_data_version(text: str, name: str) -> str:
    """The MD5 of data/ in the text of a data.dvc; `name` says in an error which one it was.

    Raises:
        StageError: the text does not describe data/.
    """
    try:
        return str(yaml.safe_load(text)["outs"][0]["md5"])
    except (yaml.YAMLError, KeyError, IndexError, TypeError):
        raise StageError(
            f"{name} does not give the MD5 of data/; restore it with `git checkout data.dvc` "
            "or make it anew with `dvc add data`"
        ) from None


def stage_code(root: Path, stage: str) -> dict[str, str]:
    """Short checksums of the Python files that dvc.yaml names as dependencies of a stage."""
    pipeline = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))
    found: dict[str, str] = {}
    for dep in pipeline["stages"][stage]["deps"]:
        path = root / dep
        if dep.startswith(("artifacts/", "data")):
            continue
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found[file.relative_to(root).as_posix()] = file_sha256(file)[:12]
    return found


def digest_test_set(cases: Iterable[str]) -> str:
    """A short digest that names a test set: the same cases in any order give the same."""
    joined = "\n".join(sorted(cases))
    return hashlib.sha256(joined.encode()).hexdigest()[:16]


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide a result."""
    return {name: version(name) for name in LIBRARIES}


def _git_commit(root: Path) -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.yaml")
    except (subprocess.CalledProcessError, FileNotFoundError):
        return "none"
    return f"{commit}-dirty" if changed else commit
