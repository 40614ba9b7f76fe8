"""Git worktrees below .cache/checkouts, so that flows never disturb the checkout they run in.

A checkout shares the project's repository and DVC cache. What git ignores in it (data/, artifacts/,
.cache/) stays from one use to the next, so that work can be resumed.
"""

from __future__ import annotations

import configparser
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fullscale.runtime.errors import StageError
from fullscale.runtime.files import write_atomically
from fullscale.runtime.locks import hold
from fullscale.versioning.git import find_commit, git


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
