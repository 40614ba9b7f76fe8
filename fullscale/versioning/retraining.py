"""What a retraining adds to the repository: a branch with its results, beside people's branches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from fullscale.runtime.console import say
from fullscale.runtime.files import read_note, write_atomically, write_note
from fullscale.versioning.data_version import Announcement, list_landed
from fullscale.versioning.git import (
    SCANS_BRANCH,
    commit_paths,
    find_commit,
    git,
    move_branch,
    run_program,
)
from fullscale.versioning.provenance import parse_data_version

BRANCHES = "retrain/"
OUTPUTS = ("artifacts/", "reports/")
BEGUN = Path(".cache/retrain/begun.json")
"""Commits whose results may be registered, though they have no branch or nobody was told of it."""
MAX_FAILURES = 3


def list_changes(folder: Path) -> list[str]:
    """What is not as dvc.lock has it: scans, code, parameters and commands; a line for each stage.

    The paper's rows have a pipeline of their own, which no retraining runs.

    Outputs of stages do not count: whether they are there says nothing about what made them.

    Args:
        folder: a checkout with its scans in data/.

    Raises:
        StageError: DVC fails.
    """
    status = json.loads(run_program(["dvc", "status", "--json", "dvc.yaml"], folder))
    lines = []
    for stage, entries in status.items():
        words = [word for entry in entries for word in _words(entry)]
        if words:
            lines.append(f"{stage}: {', '.join(words)}")
    return lines


def _words(entry: str | Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One entry of a stage in DVC's status, without what other stages make."""
    if isinstance(entry, str):
        return [entry]
    words = []
    for path, change in entry.get("changed deps", {}).items():
        if isinstance(change, dict):  # parameters, by key
            words += [f"parameters {key} {kind}" for key, kind in change.items()]
        elif not path.startswith(OUTPUTS):
            words.append(f"{path} {change}")
    return words


def list_news(folder: Path) -> list[str]:
    """What a retraining here would learn that no result stands for yet; as `list_changes`.

    Results are known of the commit checked out and of the newest branch `retrain/*`.
    """
    changes = list_changes(folder)
    newest = newest_branch(folder)
    if not changes or newest is None:
        return changes
    lock = folder / "dvc.lock"
    own = lock.read_bytes()
    write_atomically(lock, git(folder, "show", f"{newest}:dvc.lock") + "\n")
    try:
        return list_changes(folder)
    finally:
        write_atomically(lock, own)


def newest_branch(folder: Path) -> str | None:
    """The branch of the last retraining, if there was one."""
    # To git the last key counts most.
    order = ("--sort=-refname", "--sort=-committerdate", "--count=1")
    found = git(folder, "for-each-ref", *order, "--format=%(refname:short)", "refs/heads/retrain")
    return found or None


def landed_since(root: Path, scans_before: str | None, data_version: str) -> Announcement | None:
    """The scans that landed during a retraining, if any did.

    Args:
        root: the project.
        scans_before: commit of the branch `scans` when the retraining began; None without one.
        data_version: the one that was trained on.
    """
    tip = find_commit(root, f"refs/heads/{SCANS_BRANCH}")
    if tip is None or tip == scans_before:
        return None
    found = parse_data_version(git(root, "show", f"{tip}:data.dvc"), f"data.dvc of {tip}")
    if found == data_version:
        return None
    cases = list_landed(root, f"{scans_before or 'HEAD'}..{tip}")
    return Announcement(found, tip, cases, num_quarantined=0)


def note_begun(root: Path, commit: str) -> None:
    """Keep in mind that results of a commit are about to be registered, whatever happens next."""
    begun = read_note(root / BEGUN)
    if commit not in begun:
        write_note(root / BEGUN, {**begun, commit: 0})


def list_begun(root: Path) -> list[str]:
    """Commits whose results may be registered, but are not published or not told of; oldest first.

    Those that are gone from the repository, or failed `MAX_FAILURES` times, are given up.
    """
    begun = read_note(root / BEGUN)
    for commit, num_failures in list(begun.items()):
        if num_failures >= MAX_FAILURES or find_commit(root, commit) is None:
            say(
                f"the results of {commit[:8]} are given up after {num_failures} failures to "
                "publish them; a version that is registered with them has no branch"
            )
            forget_begun(root, commit)
            del begun[commit]
    return list(begun)


def count_failure(root: Path, commit: str) -> None:
    """Note that results could not be published, for a reason that may stay."""
    begun = read_note(root / BEGUN)
    write_note(root / BEGUN, begun | {commit: begun.get(commit, 0) + 1})


def forget_begun(root: Path, commit: str) -> None:
    """Note that results were published and told of."""
    begun = read_note(root / BEGUN)
    if begun.pop(commit, None) is not None:
        write_note(root / BEGUN, begun)


def read_message(folder: Path, branch: str) -> tuple[str, str]:
    """Subject and body of a branch's newest commit."""
    subject, _, body = git(folder, "log", "-1", "--format=%B", branch).partition("\n\n")
    return subject, body


def publish(folder: Path, day: date, data_version: str, message: str) -> str:
    """Commit what stages left in a checkout, and name it with a new branch.

    Everything that git does not ignore there is committed: dvc.lock, reports/, and what was pushed
    to a DVC remote that is kept in git. No other branch moves.

    Args:
        folder: the checkout.
        day: of the retraining.
        data_version: MD5 of its scans.
        message: of the commit.

    Returns:
        The branch: retrain/DAY-DATA, with -2, -3, ... behind it where that is taken.

    Raises:
        StageError: git fails.
    """
    commit = commit_paths(folder, ["."], message)
    wanted = f"{BRANCHES}{day.isoformat()}-{data_version[:8]}"
    branch, number = wanted, 1
    while find_commit(folder, f"refs/heads/{branch}") is not None:
        number += 1
        branch = f"{wanted}-{number}"
    move_branch(folder, branch, commit)
    return branch
