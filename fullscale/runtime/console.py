"""Console output of a stage: log lines, progress, and one clear line for an error."""

from __future__ import annotations

import errno
import functools
import gc
import io
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import ParamSpec, TextIO, TypeVar

from fullscale.runtime.errors import ScanError, StageError
from fullscale.runtime.events import emit_event

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Arguments = ParamSpec("Arguments")

PLAIN_INTERVAL_S = 10.0
NEW_OBJECTS = 10_000
"""After so many more objects Python looks for cycles; after 700, imports take a seventh longer."""
# A stage that is run by `python -m` has the name __main__.
OUR_LOGGERS = ("flows", "tasks", "fullscale", "model", "__main__")


class _UnreadFile(io.FileIO):
    """A file that drops what is written after its reader or its terminal has gone."""

    def write(self, data: object) -> int:
        """Write bytes; count them as written if nobody can read them any more."""
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            return len(memoryview(data))  # type: ignore[arg-type]


def drop_unread_output() -> None:
    """Let this process go on where nobody reads its output: a killed reader, a closed terminal.

    Calling it again changes nothing, and so does calling it where output was redirected in Python.
    """
    if sys.stdout is sys.__stdout__:
        sys.stdout = _without_errors(sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _without_errors(sys.stderr)


def _without_errors(stream: TextIO | None) -> TextIO | None:
    """Return a stream to the same file that drops what nobody can read; None stays None."""
    if stream is None:  # a process without that file
        return None
    raw = _UnreadFile(stream.fileno(), "w", closefd=False)
    is_line_buffered = bool(stream.line_buffering or stream.write_through)  # type: ignore[attr-defined]
    return io.TextIOWrapper(
        io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=is_line_buffered
    )


class StderrHandler(logging.Handler):
    """Writes the bare message to sys.stderr as it is now: rich replaces it while a bar is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def configure_logging() -> None:
    """Show our own log lines from INFO on, as bare text on stderr.

    Other libraries' loggers are left alone. Calling it again changes nothing.
    """
    for name in OUR_LOGGERS:
        ours = logging.getLogger(name)
        ours.setLevel(logging.INFO)
        if not any(isinstance(handler, StderrHandler) for handler in ours.handlers):
            ours.addHandler(StderrHandler())


def report_errors(main: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Decorate a program's entry point: set the process up, and report errors a user can fix.

    Such an error becomes one line on stderr, an event `failed`, and exit code 75 where trying again
    may help (`TransientStageError`), else 1. Other exceptions keep their traceback: they are
    defects of this project.
    """

    @functools.wraps(main)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        drop_unread_output()
        configure_logging()
        # What was imported stays: looking for cycles in it, again and again, takes a twentieth of a
        # stage's processor time. What it imports now is looked through less often.
        gc.freeze()
        gc.set_threshold(NEW_OBJECTS)
        try:
            main(*args, **kwargs)
        except (ScanError, StageError, OSError) as error:
            exit_code = error.exit_code if isinstance(error, StageError) else 1
            emit_event("failed", exit_code=exit_code, message=str(error))
            logger.error(f"error: {error}")
            raise SystemExit(exit_code) from None

    return wrapped


def track(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """Yield `items`, showing a rich bar on a terminal and log lines elsewhere.

    Args:
        items: what to iterate over.
        description: the work, in one or two words.
        total: number of items.
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
            logger.info(f"{description}: {done}/{total}")
