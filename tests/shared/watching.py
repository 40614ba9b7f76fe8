"""Waiting for other processes, and looking at them."""

import time
from collections.abc import Callable
from pathlib import Path


def wait_until(condition: Callable[[], object], timeout_s: float, pause_s: float = 0.02) -> bool:
    """Return True once a condition holds, False after the timeout; ask again after each pause."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(pause_s)
    return bool(condition())


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that no one has waited for yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"
