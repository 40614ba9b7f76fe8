"""What a stage shows a person: progress while it works, one clear line when it cannot go on."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import ParamSpec, TypeVar

from fullscale.runtime.errors import ScanError, StageError

Item = TypeVar("Item")
Arguments = ParamSpec("Arguments")

PLAIN_INTERVAL_S = 10.0


def report_errors(main: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Turn the errors a user can cure into one line on stderr and exit code 1.

    Programming errors keep their traceback: hiding those would hide a defect of ours.
    """

    @functools.wraps(main)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        try:
            main(*args, **kwargs)
        except (ScanError, StageError, OSError) as error:
            say(f"error: {error}")
            raise SystemExit(1) from None

    return wrapped


def say(line: str) -> None:
    """Tell whoever reads the log, on stderr."""
    print(line, file=sys.stderr, flush=True)


def track(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """Yield `items`, showing a rich bar on a terminal and plain lines elsewhere.

    Args:
        items: what to walk over.
        description: the work, in one or two words.
        total: how many items there are, for the share done.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track as rich_track

        yield from rich_track(
            items, description=description, total=total, console=Console(stderr=True)
        )
        return
    last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if done == total or time.monotonic() - last > PLAIN_INTERVAL_S:
            last = time.monotonic()
            say(f"{description}: {done}/{total}")
