"""git and dvc as subprocesses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fullscale.runtime.errors import StageError
from fullscale.runtime.processes import stage_environment

SCANS_BRANCH = "scans"
"""Branch of the data versions that the inbox made, one commit each."""
_LAST_LINES = 3


def run_program(command: list[str], folder: Path) -> str:
    """Run a program in `folder`, without a shell; it ends when this process dies.

    Args:
        command: the program and its arguments; this interpreter's folder comes first on PATH.
        folder: its working directory.

    Returns:
        What it printed on stdout.

    Raises:
        StageError: it ended with another code than 0; the message holds its last words.
    """
    done = subprocess.run(
        [sys.executable, "-m", "fullscale.runtime.processes", *command],
        cwd=folder,
        env=stage_environment(os.environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()[-_LAST_LINES:]
        raise StageError(
            f"{' '.join(command)} in {folder} ended with code {done.returncode}: "
            f"{' | '.join(words)}"
        )
    return done.stdout


def git(folder: Path, *arguments: str) -> str:
    """Run git in `folder`, without the hooks and signatures that people use; gives its stdout.

    Raises:
        StageError: git failed.
    """
    quiet = ("-c", "core.hooksPath=/dev/null", "-c", "commit.gpgSign=false")
    return run_program(["git", *quiet, *arguments], folder).strip()


def find_commit(folder: Path, name: str) -> str | None:
    """The commit that a name stands for, or None where nothing has that name."""
    try:
        return git(folder, "rev-parse", "--verify", "--end-of-options", f"{name}^{{commit}}")
    except StageError:
        return None


def contains(folder: Path, later: str, earlier: str) -> bool:
    """Whether a commit is `earlier` or comes after it."""
    return not git(folder, "rev-list", "--max-count", "1", earlier, f"^{later}")


def commit_paths(folder: Path, paths: Sequence[str], message: str) -> str:
    """Commit files of a checkout on whatever it is at; no branch moves. Gives the new commit.

    Args:
        folder: the checkout.
        paths: relative to it.
        message: subject and body.
    """
    git(folder, "add", "--", *paths)
    git(folder, *_identity(folder), "commit", "--quiet", "--message", message, "--", *paths)
    return git(folder, "rev-parse", "HEAD")


def merge(folder: Path, commit: str, message: str) -> None:
    """Merge a commit into what a checkout is at; a conflict leaves it as it was.

    Raises:
        StageError: the two contradict each other.
    """
    try:
        git(folder, *_identity(folder), "merge", "--quiet", "--message", message, commit)
    except StageError:
        git(folder, "reset", "--quiet", "--hard")
        raise


def move_branch(folder: Path, branch: str, commit: str) -> None:
    """Let a branch go forward to a commit; the branch is made if there is none.

    Raises:
        StageError: the branch is checked out somewhere, or it names what `commit` does not contain.
    """
    if place := _where_checked_out(folder, branch):
        raise StageError(
            f"branch {branch} is checked out in {place}, and moving it would disturb that "
            "folder; switch to another branch there"
        )
    before = find_commit(folder, f"refs/heads/{branch}")
    if before is not None and not contains(folder, commit, before):
        raise StageError(
            f"branch {branch} is at {before[:8]}, which {commit[:8]} does not contain: another "
            "process moved it meanwhile; run again"
        )
    git(folder, "update-ref", f"refs/heads/{branch}", commit, before or "0" * len(commit))


def _identity(folder: Path) -> tuple[str, ...]:
    """Who commits, where git's settings do not say."""
    try:
        git(folder, "config", "--get", "user.email")
    except StageError:
        return ("-c", "user.name=fullscale", "-c", "user.email=fullscale@localhost")
    return ()


def _where_checked_out(folder: Path, branch: str) -> str | None:
    """The worktree that is on a branch."""
    for entry in git(folder, "worktree", "list", "--porcelain").split("\n\n"):
        lines = entry.splitlines()
        if f"branch refs/heads/{branch}" in lines:
            return lines[0].removeprefix("worktree ")
    return None
