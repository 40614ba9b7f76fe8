"""Log lines of our own packages in the log of a Prefect run."""

from __future__ import annotations

import logging

from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging.handlers import APILogHandler

LIBRARY_LOGGERS = ("fullscale", "model", "tasks")


class RunLogHandler(APILogHandler):
    """Sends records to the log of the run in which they are made; ignores all others.

    Prefect's own handler warns about a record that is made outside of a run.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        if FlowRunContext.get() is not None or TaskRunContext.get() is not None:
            super().emit(record)


def add_library_lines() -> None:
    """Show lines of the library from INFO on in the log of each run of this process.

    PREFECT_LOGGING_EXTRA_LOGGERS adds a handler, too, but leaves the level at WARNING. Prefect's
    handler of the root logger shows the lines on the console. Calling it again changes nothing.
    """
    for name in LIBRARY_LOGGERS:
        library = logging.getLogger(name)
        library.setLevel(logging.INFO)
        if not any(isinstance(handler, APILogHandler) for handler in library.handlers):
            library.addHandler(RunLogHandler())
