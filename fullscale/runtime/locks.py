"""Lock files between processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fullscale.runtime.errors import StageError

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 1.0


class LockedError(StageError):
    """Another process holds the lock."""


@contextmanager
def acquire_lock(
    path: Path, *, wait: bool = True, on_wait: Callable[[], None] | None = None
) -> Iterator[None]:
    """Hold a lock file; the system releases it when the process dies.

    Args:
        path: the file; missing parent folders are made.
        wait: wait while another process holds the lock; the log says so once.
        on_wait: called every second of waiting; an exception that it raises ends the waiting.

    Raises:
        LockedError: `wait` is False and another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # One lock for the whole process: it may be released by another thread than it was taken in.
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise LockedError(f"another process holds {path}; wait until it ends") from None
        logger.info(f"another process holds {path}; waiting until it ends")
        _wait_for(lock, on_wait)
    try:
        yield
    finally:
        lock.release()


def _wait_for(lock: FileLock, on_wait: Callable[[], None] | None) -> None:
    while True:
        try:
            lock.acquire(timeout=POLL_INTERVAL_S)
            return
        except Timeout:
            if on_wait is not None:
                on_wait()
