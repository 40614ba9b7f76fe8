"""Git worktrees below .cache/checkouts, so that flows never disturb the checkout they run in.

A checkout shares the project's repository and DVC cache. What git ignores in it (data/, artifacts/,
.cache/) stays from one use to the next, so that work can be resumed.
"""

from __future__ import annotations

import configparser
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from scans.files import write_atomically
from tasks.console import StageError, say
from tasks.processes import stage_environment

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
        [sys.executable, "-m", "tasks.processes", *command],
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


@contextmanager
def open_checkout(root: Path, name: str, start: str) -> Iterator[Path]:
    """A worktree of the project, for this process alone.

    Its tracked files are made equal to `start`; what git ignores stays. One that was only half
    made is made again. DVC uses the project's cache and its .dvc/config.local there.

    Args:
        root: the project; nothing in it changes outside .cache and .git.
        name: of the folder below .cache/checkouts.
        start: commit, branch or tag to begin at; no branch is checked out.

    Yields:
        The folder.

    Raises:
        StageError: `start` is unknown, or git fails.
    """
    root = root.resolve()
    commit = find_commit(root, start)
    if commit is None:
        raise StageError(f"{root} has no commit {start!r}; name one that `git log --all` shows")
    folder = root / ".cache" / "checkouts" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with hold(folder.with_name(f"{name}.lock")):
        if _is_whole(folder):
            own = Path(git(folder, "rev-parse", "--absolute-git-dir"))
            (own / "index.lock").unlink(missing_ok=True)  # of a git that was killed
            git(folder, "reset", "--quiet", "--hard")
            git(folder, "checkout", "--quiet", "--force", "--detach", commit)
            git(folder, "clean", "--quiet", "--force", "-d")
        else:
            shutil.rmtree(folder, ignore_errors=True)
            # Forced twice: a git that was killed leaves its worktree locked.
            add = ("worktree", "add", "--quiet", "--force", "--force", "--detach")
            git(root, *add, str(folder), commit)
        _share_dvc(root, folder)
        yield folder


@contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold a lock file; a kill lets go of it. Waits, and says so, while another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another process holds {path}; waiting until it ends")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


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


def _is_whole(folder: Path) -> bool:
    """Whether a folder is a worktree of its own, and not just a folder inside another one."""
    if not (folder / ".git").is_file():
        return False
    try:
        top = git(folder, "rev-parse", "--show-toplevel")
    except StageError:
        return False
    return Path(top) == folder and find_commit(folder, "HEAD") is not None


def _share_dvc(root: Path, folder: Path) -> None:
    """Give a checkout the project's cache and what .dvc/config.local says there."""
    local = _read_config(root / ".dvc" / "config.local")
    cache_dir = root / ".dvc" / "cache"
    for config in (_read_config(root / ".dvc" / "config"), local):
        cache_dir = root / ".dvc" / config.get("cache", "dir", fallback=cache_dir)
    for section in local.sections():
        url = local.get(section, "url", fallback="")
        if url and "://" not in url:
            local.set(section, "url", str((root / ".dvc" / Path(url).expanduser()).resolve()))
    if not local.has_section("cache"):
        local.add_section("cache")
    local.set("cache", "dir", str(cache_dir.resolve()))
    text = io.StringIO()
    local.write(text)
    write_atomically(folder / ".dvc" / "config.local", text.getvalue())


def _read_config(path: Path) -> configparser.RawConfigParser:
    config = configparser.RawConfigParser()
    if path.is_file():
        config.read_string(path.read_text(encoding="utf-8"), str(path))
    return config
