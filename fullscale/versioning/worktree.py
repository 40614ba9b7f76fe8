"""Git worktrees below .cache/checkouts, so that flows never change the folder they run in.

A worktree shares the repository and the DVC cache of the project. Files that git ignores in it
(data/, artifacts/, .cache/) stay from one use to the next, so that work can be resumed. What DVC
checks out in it shares its blocks with the cache: files there are replaced, never changed.
"""

from __future__ import annotations

import configparser
import io
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from fullscale.runtime.errors import StageError
from fullscale.runtime.files import write_atomically
from fullscale.runtime.locks import acquire_lock
from fullscale.versioning.git import find_commit, git

INBOX, RETRAIN = "inbox", "retrain"
"""Names of the worktrees, one for each flow that has one."""

LINK_TYPES = "hardlink,copy"
"""How DVC puts files into a worktree: the first that works. With reflinks in front of hard links,
`dvc add` would leave copies where the file system has no reflinks.
"""

END_OF_DVC_S = 30.0
"""How long to wait for a DVC that is left from a killed flow."""


@contextmanager
def open_checkout(root: Path, name: str, start: str) -> Iterator[Path]:
    """Yield a worktree of the project, locked for this process.

    Its tracked files are reset to `start`; ignored files stay. An incomplete worktree is made
    again. DVC uses the project's cache and .dvc/config.local in it.

    Args:
        root: the project; nothing in it changes outside .cache and .git.
        name: INBOX or RETRAIN, the name of the folder below .cache/checkouts.
        start: commit, branch or tag to start at; HEAD is detached.

    Yields:
        The folder of the worktree.

    Raises:
        StageError: `start` is unknown, or git fails.
    """
    root = root.resolve()
    commit = find_commit(root, start)
    if commit is None:
        raise StageError(f"{root} has no commit {start!r}; name one that `git log --all` shows")
    folder = _folder(root, name)
    with acquire_lock(_lock(folder)):
        _release_paths(folder)
        _attach(root, folder)
        if _is_worktree(folder):
            own = Path(git(folder, "rev-parse", "--absolute-git-dir"))
            (own / "index.lock").unlink(missing_ok=True)  # left by a killed git
            git(folder, "reset", "--quiet", "--hard")
            git(folder, "checkout", "--quiet", "--force", "--detach", commit)
            git(folder, "clean", "--quiet", "--force", "-d")
        else:
            shutil.rmtree(folder, ignore_errors=True)
            # Forced twice, because a killed git leaves its worktree locked.
            add = ("worktree", "add", "--quiet", "--force", "--force", "--detach")
            git(root, *add, str(folder), commit)
        _share_dvc(root, folder)
        yield folder


@contextmanager
def hold_checkouts(root: Path) -> Iterator[list[Path]]:
    """Yield the worktrees that there are, and let no flow work in one meanwhile.

    Raises:
        LockedError: a flow works in one now.
    """
    root = root.resolve()
    with ExitStack() as stack:
        folders = [_folder(root, name) for name in (INBOX, RETRAIN)]
        for folder in folders:
            stack.enter_context(acquire_lock(_lock(folder), wait=False))
            _attach(root, folder)
        yield [folder for folder in folders if folder.is_dir()]


def describe_unfinished(folder: Path) -> str:
    """Return what a worktree has that no branch has; "" if it can be made again from branches."""
    if any((folder / ".cache").rglob("checkpoints/*")):
        return "checkpoints of a training that is not finished"
    if _is_worktree(folder) and git(folder, "status", "--porcelain"):
        return "results of a retraining that is not finished"
    return ""


def remove_checkout(root: Path, folder: Path) -> None:
    """Remove a worktree of `hold_checkouts` with all its files; `open_checkout` makes it again."""
    if _is_worktree(folder):
        git(root, "worktree", "remove", "--force", "--force", str(folder))
    else:
        shutil.rmtree(folder)


def _folder(root: Path, name: str) -> Path:
    return root / ".cache" / "checkouts" / name


def _lock(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _attach(root: Path, folder: Path) -> None:
    """Let git find a worktree again after its project was moved or copied.

    Git notes absolute paths on both sides. `git worktree repair` is of no use: in a copy of a
    project it changes the original's.
    """
    link = folder / ".git"
    if not link.is_file():
        return
    repository = Path(git(root, "rev-parse", "--path-format=absolute", "--git-common-dir"))
    name = Path(link.read_text(encoding="utf-8").strip()).name
    place = repository / "worktrees" / name
    if not name or not place.is_dir():
        link.unlink()
        return
    write_atomically(place / "gitdir", f"{link}\n")
    write_atomically(link, f"gitdir: {place}\n")


def _is_worktree(folder: Path) -> bool:
    """Return True if a folder is the top of a worktree, not a folder inside another one."""
    if not (folder / ".git").is_file():
        return False
    try:
        top = git(folder, "rev-parse", "--show-toplevel")
    except StageError:
        return False
    return Path(top) == folder and find_commit(folder, "HEAD") is not None


def _share_dvc(root: Path, folder: Path) -> None:
    """Write .dvc/config.local of a worktree: the project's own plus its cache and link types."""
    local = _read_config(root / ".dvc" / "config.local")
    cache_dir = root / ".dvc" / "cache"
    link_types = LINK_TYPES
    for config in (_read_config(root / ".dvc" / "config"), local):
        cache_dir = root / ".dvc" / config.get("cache", "dir", fallback=cache_dir)
        link_types = config.get("cache", "type", fallback=link_types)
    for section in local.sections():
        url = local.get(section, "url", fallback="")
        if url and "://" not in url:
            local.set(section, "url", str((root / ".dvc" / Path(url).expanduser()).resolve()))
    if not local.has_section("cache"):
        local.add_section("cache")
    local.set("cache", "dir", str(cache_dir.resolve()))
    local.set("cache", "type", link_types)
    text = io.StringIO()
    local.write(text)
    write_atomically(folder / ".dvc" / "config.local", text.getvalue())


def _release_paths(folder: Path) -> None:
    """Remove DVC's list of paths in use, once the processes in it have ended.

    No flow works in the worktree, so they are left from one that was killed, and are about to end.
    To DVC a process runs as long as there is one of its number: also a zombie, which a parent that
    never waits for it leaves for ever, and a later process, after a restart of the machine. The
    list of a process that does not end stays, and DVC's next command names it.
    """
    path = folder / ".dvc" / "tmp" / "rwlock"
    if not path.is_file():
        return
    written = path.stat().st_mtime
    # The list may be half written.
    pids = set(map(int, re.findall(r'"pid": (\d+),', path.read_text(encoding="utf-8"))))
    deadline = time.monotonic() + END_OF_DVC_S
    while any(_has_run_since(pid, written) for pid in pids):
        if time.monotonic() > deadline:
            return
        time.sleep(0.1)
    path.unlink()


def _has_run_since(pid: int, moment: float) -> bool:
    """Return True for a process that runs and is as old as `moment` (s since 1970)."""
    try:
        process = psutil.Process(pid)
        has_ended = process.status() == psutil.STATUS_ZOMBIE
        return not has_ended and float(process.create_time()) <= moment
    except psutil.NoSuchProcess:
        return False


def _read_config(path: Path) -> configparser.RawConfigParser:
    config = configparser.RawConfigParser()
    if path.is_file():
        config.read_string(path.read_text(encoding="utf-8"), str(path))
    return config
