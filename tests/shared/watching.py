"""Waiting for other processes, and looking at them."""

import time
from collections.abc import Callable
from pathlib import Path

PAUSE_FOR_ANSWER = 20  # times as long as asking took
LONGEST_PAUSE_S = 1.0


def wait_until(condition: Callable[[], object], timeout_s: float, pause_s: float = 0.02) -> bool:
    """Return True once a condition holds, False after the timeout; ask again after each pause.

    A condition that takes long to ask, such as a question to a server, is asked more seldom: the
    answers would take the processors from what the test waits for.
    """
    end = time.monotonic() + timeout_s
    while (asked := time.monotonic()) < end:
        if condition():
            return True
        took_s = time.monotonic() - asked
        time.sleep(max(pause_s, min(PAUSE_FOR_ANSWER * took_s, LONGEST_PAUSE_S)))
    return bool(condition())


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that no one has waited for yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"
