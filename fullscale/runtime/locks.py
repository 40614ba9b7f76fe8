"""One file lock, waiting or failing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fullscale.runtime.console import say


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
