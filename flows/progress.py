"""How far a training is, in the Prefect UI."""

from __future__ import annotations

import re
from typing import cast
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact

EPOCH = re.compile(r"(?P<network>\S+) epoch (?P<epoch>\d+)/(?P<num_epochs>\d+): ")
"""The start of the line that a trainer prints after each epoch."""


class TrainingProgress:
    """A progress artifact that follows the lines of one training.

    Args:
        network: the one that is trained.
    """

    def __init__(self, network: str) -> None:
        self._network = network
        self._artifact_id: UUID | None = None

    def read(self, line: str) -> None:
        """Show how far the training is, if the line tells of an epoch; call it in a task."""
        found = EPOCH.match(line)
        if found is None or found["network"] != self._network:
            return
        percent = 100 * int(found["epoch"]) / int(found["num_epochs"])
        try:
            if self._artifact_id is None:
                key = artifact_key(f"training-{self._network}")
                created = create_progress_artifact(percent, key=key, description=line)
                self._artifact_id = cast("UUID", created)
            else:
                update_progress_artifact(self._artifact_id, percent, description=line)
        except Exception as error:  # a training does not end because its progress cannot be shown
            get_run_logger().warning("progress is not shown: %s", error)


def artifact_key(name: str) -> str:
    """A key as Prefect wants it: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
