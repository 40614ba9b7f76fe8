"""Data versions: commits of data.dvc on the branch `scans`, made in separate worktrees."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fullscale.runtime.errors import StageError
from fullscale.runtime.files import read_json_or_empty, write_json
from fullscale.versioning.git import (
    SCANS_BRANCH,
    check_branch_names,
    commit_paths,
    contains,
    find_commit,
    git,
    merge,
    move_branch,
    run_program,
)
from fullscale.versioning.provenance import parse_data_version, read_data_version
from fullscale.versioning.worktree import open_checkout

ANNOUNCED_FILE = Path(".cache/inbox/announced.json")
"""The data version announced last, and its commit."""


@contextmanager
def open_newest(root: Path, name: str) -> Iterator[Path]:
    """Yield a worktree with the newest data version and the project's current code.

    It starts at the branch `scans` with HEAD merged into it. If HEAD contains `scans`, or there is
    no such branch, it starts at HEAD. No branch moves.

    Args:
        root: the project.
        name: name of the worktree, see `open_checkout`.

    Yields:
        The folder of the worktree.

    Raises:
        StageError: `scans` and HEAD have a merge conflict, a branch is in the way, or git fails.
    """
    check_branch_names(root)
    head = git(root, "rev-parse", "HEAD")
    scans = find_commit(root, f"refs/heads/{SCANS_BRANCH}")
    start = head if scans is None or contains(root, head, scans) else scans
    with open_checkout(root, name, start) as folder:
        if not contains(folder, start, head):
            try:
                merge(folder, head, f"Merge the code of {head[:8]} into the newest scans")
            except StageError as error:
                raise StageError(
                    f"branch {SCANS_BRANCH} and HEAD have a merge conflict, usually in data.dvc; "
                    f"merge {SCANS_BRANCH} into your branch by hand (`git merge {SCANS_BRANCH}`, "
                    f"then keep the data.dvc of {SCANS_BRANCH}, or add your scans through the "
                    f"inbox), and run again: {error}"
                ) from None
        yield folder


@dataclass(frozen=True)
class Announcement:
    """A data version to announce.

    Attributes:
        data_version: MD5 of the annotated scans.
        commit: tip of the branch `scans`.
        cases: names of the cases added since the version announced last, sorted.
        num_quarantined: pairs refused since then, in runs that accepted others.
    """

    data_version: str
    commit: str
    cases: tuple[str, ...]
    num_quarantined: int


def restore_data(folder: Path) -> None:
    """Restore data/ of a worktree from its data.dvc, and discard what a killed run left there.

    Scans missing in the cache are pulled from the remote. Without data.dvc, data/ is removed.

    Raises:
        StageError: the cache lacks scans, and so does the remote, or it does not respond.
    """
    if not (folder / "data.dvc").is_file():
        shutil.rmtree(folder / "data", ignore_errors=True)
        return
    try:
        run_program(["dvc", "--wait-for-lock", "checkout", "--force", "data.dvc"], folder)
    except StageError:
        run_program(["dvc", "--wait-for-lock", "pull", "--force", "data.dvc"], folder)


def is_remote_in_git(folder: Path, root: Path) -> bool:
    """Return whether a worktree's default DVC remote is a folder inside the project.

    Whatever is pushed there becomes part of the next commit.

    Args:
        folder: the worktree, below `root` if it is not the project's own checkout.
        root: the project.

    Raises:
        StageError: DVC fails.
    """
    lines = run_program(["dvc", "config", "--list"], folder).splitlines()
    values = dict(line.split("=", 1) for line in lines if "=" in line)
    url = values.get(f"remote.{values.get('core.remote')}.url", "")  # paths are absolute here
    return Path(url).is_relative_to(root.resolve())


def commit_data(folder: Path, cases: Sequence[str], num_quarantined: int) -> str:
    """Commit data/ of a worktree as a new data version, and move the branch `scans` to it.

    Moving the branch is the last step: a run killed before it changes nothing.

    Args:
        folder: worktree of `open_newest`.
        cases: names of the new cases.
        num_quarantined: number of pairs refused in the same run.

    Returns:
        The MD5 of data/.

    Raises:
        StageError: dvc or git fails, for example because the disk is full; `scans` did not move.
    """
    run_program(["dvc", "--wait-for-lock", "add", "data"], folder)
    subject = f"Add {len(cases)} scan{'s' if len(cases) != 1 else ''}"
    # `find_unannounced` reads these trailers.
    trailers = [*(f"Case: {case}" for case in cases), f"Quarantined: {num_quarantined}"]
    commit = commit_paths(folder, ["data.dvc"], "\n".join([subject, "", *trailers]))
    move_branch(folder, SCANS_BRANCH, commit)
    return read_data_version(folder)


def find_unannounced(root: Path) -> Announcement | None:
    """Return the newest data version on `scans`; None if it was announced.

    Args:
        root: the project.
    """
    tip = find_commit(root, f"refs/heads/{SCANS_BRANCH}")
    if tip is None:
        return None
    data_version = parse_data_version(git(root, "show", f"{tip}:data.dvc"), f"data.dvc of {tip}")
    announced = read_json_or_empty(root / ANNOUNCED_FILE)
    if announced.get("data_version") == data_version:
        return None
    # The commit may be gone, for example after the branch was rewritten.
    since = find_commit(root, announced.get("commit", "HEAD")) or "HEAD"
    if contains(root, since, tip):
        return None
    commits = f"{since}..{tip}"
    quarantined = _trailers(root, "Quarantined", commits)
    return Announcement(
        data_version,
        tip,
        list_added_cases(root, commits),
        sum(int(number) for number in quarantined),
    )


def list_added_cases(root: Path, commits: str) -> tuple[str, ...]:
    """Return the names of the cases that commits of `scans` added, sorted.

    Args:
        root: the project.
        commits: revision range of git, such as A..B.
    """
    return tuple(sorted(set(_trailers(root, "Case", commits))))


def mark_announced(root: Path, announcement: Announcement) -> None:
    """Record that a data version was announced."""
    content = {"data_version": announcement.data_version, "commit": announcement.commit}
    write_json(root / ANNOUNCED_FILE, content)


def _trailers(root: Path, key: str, commits: str) -> list[str]:
    return git(root, "log", f"--format=%(trailers:key={key},valueonly)", commits).split()
