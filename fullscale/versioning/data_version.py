"""Data versions: commits of data.dvc on the branch `scans`, made in separate worktrees."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fullscale.runtime.errors import StageError
from fullscale.runtime.files import read_json_or_empty, write_atomically, write_json
from fullscale.versioning.git import (
    SCANS_BRANCH,
    check_branch_names,
    commit_paths,
    contains,
    find_code,
    find_commit,
    git,
    move_branch,
    run_program,
)
from fullscale.versioning.provenance import parse_data_version, read_data_version
from fullscale.versioning.worktree import open_checkout

DATA_FILE = "data.dvc"
ANNOUNCED_FILE = Path(".cache/inbox/announced.json")
"""The data version announced last, and its commit."""


@contextmanager
def open_newest(root: Path, name: str, code_branch: str | None = None) -> Iterator[Path]:
    """Yield a worktree with the newest data version on the newest code of one branch.

    It is at the tip of that branch, with one commit more if `scans` has newer data: their data.dvc.
    No branch moves.

    Args:
        root: the project.
        name: name of the worktree, see `open_checkout`.
        code_branch: see `find_code`.

    Yields:
        The folder of the worktree.

    Raises:
        StageError: both branches have data that the other one never had, the code's branch is
            unknown, a branch is in the way, or git fails.
    """
    check_branch_names(root)
    branch, code = find_code(root, code_branch)
    scans = find_commit(root, f"refs/heads/{SCANS_BRANCH}")
    with open_checkout(root, name, code) as folder:
        if scans is not None and _has_newer_data(root, scans, branch):
            git(folder, "checkout", "--quiet", scans, "--", DATA_FILE)
            subject = f"Put scans {read_data_version(folder)[:8]} beside the code of {branch}"
            # Dated like the scans, it is the same commit each time: a run knows what it left.
            when = git(root, "log", "-1", "--format=%cI", scans)
            commit_paths(folder, [DATA_FILE], subject, when)
        yield folder


def _has_newer_data(root: Path, scans: str, branch: str) -> bool:
    """Return whether a commit of `scans` has newer data than a branch.

    Only data.dvc counts, not who descends from whom: people amend and drop commits.

    Raises:
        StageError: neither had the other's data before.
    """
    tips = (scans, f"refs/heads/{branch}")
    ours, theirs = (git(root, "ls-tree", "--object-only", tip, DATA_FILE) for tip in tips)
    if ours in _list_contents(root, tips[1]):
        return False
    if not theirs or theirs in _list_contents(root, scans):
        return True
    raise StageError(
        f"branches {SCANS_BRANCH} and {branch} contradict each other: {DATA_FILE} of each names "
        f"scans that the other one never had. Merge {SCANS_BRANCH} into {branch} by hand (`git "
        f"merge {SCANS_BRANCH}`, then keep the {DATA_FILE} of {SCANS_BRANCH}), add the other scans "
        "through the inbox, and run again"
    )


def _list_contents(root: Path, commit: str) -> set[str]:
    """Return the names of git for every content that data.dvc had up to a commit."""
    listed = git(root, "rev-list", "--objects", "--full-history", commit, "--", DATA_FILE)
    return {line.removesuffix(f" {DATA_FILE}") for line in listed.splitlines()}


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


def read_remote(folder: Path) -> str:
    """Return folder or URL of the default DVC remote; "" if there is none.

    Raises:
        StageError: DVC fails.
    """
    lines = run_program(["dvc", "config", "--list"], folder).splitlines()
    values = dict(line.split("=", 1) for line in lines if "=" in line)
    return values.get(f"remote.{values.get('core.remote')}.url", "")  # paths are absolute here


def is_remote_in_git(folder: Path, root: Path) -> bool:
    """Return whether a worktree's default DVC remote is a folder inside the project.

    Whatever is pushed there becomes part of the next commit.

    Args:
        folder: the worktree, below `root` if it is not the project's own checkout.
        root: the project.

    Raises:
        StageError: DVC fails.
    """
    return Path(read_remote(folder)).is_relative_to(root.resolve())


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
    scans = find_commit(folder, f"refs/heads/{SCANS_BRANCH}")
    if scans is not None:  # it gets the data, and not the code
        content = (folder / DATA_FILE).read_bytes()
        git(folder, "checkout", "--quiet", "--force", "--detach", scans)
        write_atomically(folder / DATA_FILE, content)
    subject = f"Add {len(cases)} scan{'s' if len(cases) != 1 else ''}"
    # `find_unannounced` reads these trailers.
    trailers = [*(f"Case: {case}" for case in cases), f"Quarantined: {num_quarantined}"]
    commit = commit_paths(folder, [DATA_FILE], "\n".join([subject, "", *trailers]))
    move_branch(folder, SCANS_BRANCH, commit)
    return read_data_version(folder)


def newest_data_version(root: Path) -> str:
    """Return the MD5 of the scans of the branch `scans`, or of the checkout where none landed.

    Raises:
        StageError: there is no data.dvc.
    """
    tip = find_commit(root, f"refs/heads/{SCANS_BRANCH}")
    if tip is None:
        return read_data_version(root)
    return committed_data_version(root, tip)


def committed_data_version(root: Path, revision: str) -> str:
    """Return the MD5 of the scans that data.dvc of a commit names.

    Raises:
        StageError: there is no data.dvc, or it does not describe data/.
    """
    found = git(root, "show", f"{revision}:data.dvc")
    return parse_data_version(found, f"data.dvc of {revision}")


def find_unannounced(root: Path) -> Announcement | None:
    """Return the newest data version on `scans`; None if it was announced.

    Args:
        root: the project.
    """
    tip = find_commit(root, f"refs/heads/{SCANS_BRANCH}")
    if tip is None:
        return None
    data_version = committed_data_version(root, tip)
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
