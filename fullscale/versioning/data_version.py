"""Data versions: commits of data.dvc on the branch `scans`, made and trained on in checkouts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fullscale.runtime.errors import StageError
from fullscale.runtime.files import read_note, write_note
from fullscale.versioning.git import (
    SCANS_BRANCH,
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

TOLD = Path(".cache/inbox/announced.json")
"""Which data version was told last."""


@contextmanager
def open_newest(root: Path, name: str) -> Iterator[Path]:
    """A checkout with the newest data version and the code of the project's own checkout.

    It begins at the branch `scans`, into which HEAD is merged unless it is there already, or at
    HEAD where that contains `scans` or there is no such branch. No branch moves.

    Args:
        root: the project.
        name: of the checkout, see `open_checkout`.

    Yields:
        The folder.

    Raises:
        StageError: `scans` and HEAD contradict each other, or git fails.
    """
    head = git(root, "rev-parse", "HEAD")
    scans = find_commit(root, f"refs/heads/{SCANS_BRANCH}")
    start = head if scans is None or contains(root, head, scans) else scans
    with open_checkout(root, name, start) as folder:
        if not contains(folder, start, head):
            try:
                merge(folder, head, f"Merge the code of {head[:8]} into the newest scans")
            except StageError as error:
                raise StageError(
                    f"branch {SCANS_BRANCH} and HEAD contradict each other, usually in data.dvc; "
                    f"merge {SCANS_BRANCH} into your branch by hand (`git merge {SCANS_BRANCH}`, "
                    f"then keep the data.dvc of {SCANS_BRANCH}, or add your scans through the "
                    f"inbox), and run again: {error}"
                ) from None
        yield folder


@dataclass(frozen=True)
class Announcement:
    """A data version that no one has been told of.

    Attributes:
        data_version: MD5 of the annotated scans.
        commit: that the branch `scans` is at.
        cases: that went in since the last version that was told, by name in order.
        num_quarantined: pairs that were refused meanwhile, in runs that let others in.
    """

    data_version: str
    commit: str
    cases: tuple[str, ...]
    num_quarantined: int


def restore_data(folder: Path) -> None:
    """Make data/ of a checkout what its data.dvc says, whatever a killed run left there.

    Scans that are not in the cache come from the remote. Without data.dvc there is no data/.

    Raises:
        StageError: the cache lacks scans, and the remote does not answer or lacks them, too.
    """
    if not (folder / "data.dvc").is_file():
        shutil.rmtree(folder / "data", ignore_errors=True)
        return
    try:
        run_program(["dvc", "--wait-for-lock", "checkout", "--force", "data.dvc"], folder)
    except StageError:
        run_program(["dvc", "--wait-for-lock", "pull", "--force", "data.dvc"], folder)


def commit_data(folder: Path, cases: Sequence[str], num_quarantined: int) -> str:
    """Make data/ of a checkout the newest data version: one commit, to which `scans` moves.

    A run that is killed before the branch moves leaves nothing behind that counts.

    Args:
        folder: a checkout of `open_newest`.
        cases: names of the cases that are new in it.
        num_quarantined: how many were refused beside them.

    Returns:
        The MD5 of data/.

    Raises:
        StageError: dvc or git fails, for a full disk say; then `scans` is where it was.
    """
    run_program(["dvc", "--wait-for-lock", "add", "data"], folder)
    subject = f"Take in {len(cases)} scan{'s' if len(cases) != 1 else ''}"
    trailers = [*(f"Case: {case}" for case in cases), f"Quarantined: {num_quarantined}"]
    commit = commit_paths(folder, ["data.dvc"], "\n".join([subject, "", *trailers]))
    move_branch(folder, SCANS_BRANCH, commit)
    return read_data_version(folder)


def find_unannounced(root: Path) -> Announcement | None:
    """The newest data version on `scans`, unless it was told already.

    Args:
        root: the project.
    """
    tip = find_commit(root, f"refs/heads/{SCANS_BRANCH}")
    if tip is None:
        return None
    data_version = parse_data_version(git(root, "show", f"{tip}:data.dvc"), f"data.dvc of {tip}")
    told = read_note(root / TOLD)
    if told.get("data_version") == data_version:
        return None
    since = find_commit(root, told.get("commit", "HEAD")) or "HEAD"
    if contains(root, since, tip):
        return None
    commits = f"{since}..{tip}"
    quarantined = _trailers(root, "Quarantined", commits)
    return Announcement(
        data_version, tip, list_landed(root, commits), sum(int(number) for number in quarantined)
    )


def list_landed(root: Path, commits: str) -> tuple[str, ...]:
    """Names of the cases that commits of `scans` took in, by name in order.

    Args:
        root: the project.
        commits: a range as git takes it.
    """
    return tuple(sorted(set(_trailers(root, "Case", commits))))


def mark_announced(root: Path, announcement: Announcement) -> None:
    """Keep in mind that a data version was told."""
    told = {"data_version": announcement.data_version, "commit": announcement.commit}
    write_note(root / TOLD, told)


def _trailers(root: Path, key: str, commits: str) -> list[str]:
    return git(root, "log", f"--format=%(trailers:key={key},valueonly)", commits).split()
