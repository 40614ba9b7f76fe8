"""Events for the program that started a stage: one JSON object a line, appended to a file.

The variable FULLSCALE_EVENTS names the file; without it nothing is written. DVC hides the exit code
of the stages it runs, and the text on the terminal is for people and free to change, so a flow
reads here how far a stage is and how it failed:

    {"event": "epoch", "training": "unet-0", "epoch": 3, "num_epochs": 12, "dice": 0.81}
    {"event": "failed", "exit_code": 75, "message": "the MLflow store ... does not answer ..."}
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

EVENTS_VARIABLE = "FULLSCALE_EVENTS"


def emit_event(event: str, **fields: Any) -> None:
    """Append one event to the file that FULLSCALE_EVENTS names, if it is set.

    Args:
        event: its name.
        fields: its content, as JSON takes it.
    """
    path = os.environ.get(EVENTS_VARIABLE)
    if not path:
        return
    line = json.dumps({"event": event, **fields}) + "\n"
    try:
        # One write at the end of the file: lines of several processes do not mix.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
    except OSError as error:  # the work is worth more than the news of it
        logger.warning(f"event {event} is not written to {path}: {error.strerror}")


class EventReader:
    """Reads the events that were appended to a file since the last time.

    Args:
        path: the file; it may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read_new(self) -> list[dict[str, Any]]:
        """Return the new events in their order; a line that is still being written waits."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            whole, newline, _ = stream.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return [json.loads(line) for line in whole.splitlines()]
