"""Retraining branches: detect changes that need a retraining, and publish its results.

The state of retrainings that are not published yet is in .cache/retrain.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from fullscale.runtime.errors import StageError
from fullscale.runtime.files import read_json_or_empty, write_atomically, write_json
from fullscale.versioning.data_version import (
    Announcement,
    committed_data_version,
    list_added_cases,
)
from fullscale.versioning.git import (
    RETRAIN_PREFIX,
    SCANS_BRANCH,
    commit_paths,
    find_commit,
    git,
    move_branch,
    run_program,
)

logger = logging.getLogger(__name__)

OUTPUTS = ("artifacts/", "reports/")
PENDING_FILE = Path(".cache/retrain/begun.json")
"""Number of failed attempts to publish, by commit whose results may be registered already."""
MAX_FAILURES = 3  # a cause that stays must not block every later retraining


def list_changes(folder: Path) -> list[str]:
    """Return the differences from dvc.lock in scans, code, parameters and commands, by stage.

    Outputs of stages are ignored: a new worktree has none. Only dvc.yaml counts, not the separate
    pipeline of the paper, which a retraining does not run.

    Args:
        folder: worktree with its scans in data/.

    Returns:
        One line for each stage that changed.

    Raises:
        StageError: DVC fails.
    """
    status = json.loads(run_program(["dvc", "status", "--json", "dvc.yaml"], folder))
    lines = []
    for stage, entries in status.items():
        changes = [change for entry in entries for change in _parse_entry(entry)]
        if changes:
            lines.append(f"{stage}: {', '.join(changes)}")
    return lines


def _parse_entry(entry: str | Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the changes in one entry of `dvc status`, without outputs of other stages."""
    if isinstance(entry, str):
        return [entry]
    changes = []
    for path, change in entry.get("changed deps", {}).items():
        if isinstance(change, dict):  # parameters, by key
            changes += [f"parameters {key} {kind}" for key, kind in change.items()]
        elif not path.startswith(OUTPUTS):
            changes.append(f"{path} {change}")
    return changes


def list_untrained_changes(folder: Path) -> list[str]:
    """Return the changes that neither this commit nor the newest retraining branch was trained on.

    The form is that of `list_changes`. An empty list means that a retraining is not needed.
    """
    changes = list_changes(folder)
    newest = newest_branch(folder)
    if not changes or newest is None:
        return changes
    # DVC compares with dvc.lock, so put the newest branch's in its place for one call.
    lock = folder / "dvc.lock"
    own = lock.read_bytes() if lock.exists() else None
    write_atomically(lock, git(folder, "show", f"{newest}:dvc.lock") + "\n")
    try:
        return list_changes(folder)
    finally:
        if own is None:
            lock.unlink()
        else:
            write_atomically(lock, own)


def newest_branch(folder: Path) -> str | None:
    """Return the branch of the last retraining, if any."""
    # In git the last sort key is the primary one.
    order = ("--sort=-refname", "--sort=-committerdate", "--count=1")
    found = git(folder, "for-each-ref", *order, "--format=%(refname:short)", "refs/heads/retrain")
    return found or None


def find_data_since(root: Path, scans_before: str | None, data_version: str) -> Announcement | None:
    """Return the data version that was added during a retraining, if any.

    Args:
        root: the project.
        scans_before: commit of the branch `scans` at the start; None if the branch was missing.
        data_version: the data version trained on.
    """
    tip = find_commit(root, f"refs/heads/{SCANS_BRANCH}")
    if tip is None or tip == scans_before:
        return None
    found = committed_data_version(root, tip)
    if found == data_version:
        return None
    cases = list_added_cases(root, f"{scans_before or 'HEAD'}..{tip}")
    return Announcement(found, tip, cases, num_quarantined=0)


def mark_pending(root: Path, commit: str) -> None:
    """Record that the results of a commit are about to be registered, before that begins."""
    pending = read_json_or_empty(root / PENDING_FILE)
    if commit not in pending:
        write_json(root / PENDING_FILE, {**pending, commit: 0})


def list_pending(root: Path) -> list[str]:
    """Return the commits whose results are not published and announced yet, oldest first.

    A commit that is gone from the repository, or failed `MAX_FAILURES` times, is dropped.
    """
    pending = read_json_or_empty(root / PENDING_FILE)
    for commit, num_failures in list(pending.items()):
        if num_failures >= MAX_FAILURES or find_commit(root, commit) is None:
            logger.warning(
                f"the results of {commit[:8]} are dropped after {num_failures} failures to "
                "publish them; a version that is registered with them has no branch"
            )
            clear_pending(root, commit)
            del pending[commit]
    return list(pending)


def count_failure(root: Path, commit: str) -> None:
    """Record that publishing the results of a commit failed."""
    pending = read_json_or_empty(root / PENDING_FILE)
    write_json(root / PENDING_FILE, pending | {commit: pending.get(commit, 0) + 1})


def clear_pending(root: Path, commit: str) -> None:
    """Record that the results of a commit were published and announced."""
    pending = read_json_or_empty(root / PENDING_FILE)
    if pending.pop(commit, None) is not None:
        write_json(root / PENDING_FILE, pending)


def push_branches(root: Path, remote: str) -> list[str]:
    """Push the retraining branches that a git remote does not have; return their names.

    A branch that is merged is left out: people may have deleted it there.

    Args:
        root: the project.
        remote: its name, such as origin.

    Raises:
        StageError: the remote is unknown or refuses a branch. The next call tries again.
    """
    if remote not in git(root, "remote").split():
        raise StageError(f"{root} has no git remote {remote}; `git remote` lists those it has")
    known = git(root, "for-each-ref", "--format=%(refname:lstrip=3)", f"refs/remotes/{remote}")
    here = git(
        root, "for-each-ref", "--no-merged=HEAD", "--format=%(refname:lstrip=2)",
        f"refs/heads/{RETRAIN_PREFIX}",
    )  # fmt: skip
    names = sorted(set(here.split()) - set(known.split()))
    if names:
        git(root, "push", "--quiet", remote, *(f"refs/heads/{name}" for name in names))
    return names


def read_commit_message(folder: Path, branch: str) -> tuple[str, str]:
    """Return subject and body of a branch's newest commit."""
    subject, _, body = git(folder, "log", "-1", "--format=%B", branch).partition("\n\n")
    return subject, body


def publish(folder: Path, day: date, data_version: str, message: str) -> str:
    """Commit the results in a worktree on a new branch.

    The commit holds everything that git does not ignore: dvc.lock and reports/. No other branch
    moves.

    Args:
        folder: the worktree.
        day: date of the retraining.
        data_version: MD5 of its scans.
        message: commit message.

    Returns:
        The branch: retrain/DAY-DATA, with the suffix -2, -3, ... if that exists.

    Raises:
        StageError: git fails.
    """
    commit = commit_paths(folder, ["."], message)
    wanted = f"{RETRAIN_PREFIX}{day.isoformat()}-{data_version[:8]}"
    branch, number = wanted, 1
    while find_commit(folder, f"refs/heads/{branch}") is not None:
        number += 1
        branch = f"{wanted}-{number}"
    move_branch(folder, branch, commit)
    return branch
