"""Data versions: commits of data.dvc on the branch `scans`, made and trained on in checkouts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.checkouts import (
    SCANS_BRANCH,
    contains,
    find_commit,
    git,
    merge,
    open_checkout,
)
from tasks.console import StageError


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
