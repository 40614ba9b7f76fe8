"""Adopt the results of a retraining: merge its branch, and bring data/ and artifacts/ up to it.

Merging alone changes data.dvc and dvc.lock but not the scans, and the next `dvc repro` would record
the old scans as the newest version again.
"""

from __future__ import annotations

import json
from pathlib import Path

from fullscale.runtime.errors import StageError
from fullscale.scans.cohort import read_cohort
from fullscale.versioning.git import (
    RETRAIN_PREFIX,
    contains,
    find_commit,
    git,
    merge,
    run_program,
)
from fullscale.versioning.provenance import read_data_version

OUTPUTS = ("data.dvc", "dvc.yaml")


def adopt(root: Path, branch: str) -> list[str]:
    """Merge a branch into the one that is checked out, then check its scans and outputs out.

    Args:
        root: the project.
        branch: a branch or commit, usually retrain/DATE-DATA.

    Returns:
        What changed, as lines for a terminal.

    Raises:
        StageError: there is no such branch, files or scans have changes of their own, the merge has
            conflicts (nothing has changed then), or DVC's cache and remote lack files.
    """
    commit = find_commit(root, branch)
    if commit is None:
        folder = f"refs/heads/{RETRAIN_PREFIX}"
        known = git(root, "for-each-ref", "--format=%(refname:short)", folder).split()
        raise StageError(
            f"there is no branch {branch!r}; retrainings are on: {', '.join(known) or 'none'}"
        )
    _require_clean(root)
    before, old_version = git(root, "rev-parse", "HEAD"), read_data_version(root)
    old_cases = _list_cases(root)
    if contains(root, before, commit):
        lines = [f"{branch} is merged already"]
    else:
        try:
            merge(root, commit, f"Adopt {branch}")
        except StageError as error:
            raise StageError(
                f"{branch} cannot be merged, and nothing was changed: {error}; merge it by hand "
                f"(`git merge {branch}`), then run `dvc checkout`"
            ) from None
        lines = [f"merged {branch}: {git(root, 'log', '-1', '--format=%s', commit)}"]
        lines += git(root, "diff", "--stat", before, "HEAD").splitlines()
    _check_out(root)
    new_version = read_data_version(root)
    if new_version == old_version:
        lines.append(f"data version {new_version}, as before")
    else:
        num_added = len(_list_cases(root) - old_cases)
        lines.append(f"data version {new_version}, was {old_version}: {num_added} scans added")
    return lines


def _list_cases(root: Path) -> set[str]:
    """Return the names of the cases in data/, which may not be there yet."""
    if not (root / "data").exists():
        return set()
    return {case.name for case in read_cohort(root / "data").cases}


def _require_clean(root: Path) -> None:
    changed = git(root, "status", "--porcelain", "--untracked-files=no")
    if changed:
        raise StageError(
            f"files have changes that are not committed; commit or stash them first:\n{changed}"
        )
    if json.loads(run_program(["dvc", "status", "--json", "data.dvc"], root)) and any(
        (root / "data").glob("*")
    ):
        raise StageError(
            "data/ differs from data.dvc, and its changes would be lost; keep them with `dvc add "
            "data` and `git commit data.dvc`, or drop them with `dvc checkout --force data.dvc`"
        )


def _check_out(root: Path) -> None:
    """Bring scans and outputs of stages to what is committed; fetch what the cache lacks."""
    try:
        run_program(["dvc", "--wait-for-lock", "checkout", "--force", *OUTPUTS], root)
    except StageError:
        try:
            run_program(["dvc", "--wait-for-lock", "pull", "--force", *OUTPUTS], root)
        except StageError as error:
            raise StageError(
                f"the branch is merged, but neither DVC's cache nor the remote has all its files: "
                f"{error}; make the remote reachable and run the command again, or `dvc repro`"
            ) from None
