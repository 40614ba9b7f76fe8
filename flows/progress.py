"""Progress of a training in the Prefect UI."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact


class TrainingProgress:
    """A progress artifact that follows the events of one training.

    Args:
        training: name of the training: its stage without `train@`.
    """

    def __init__(self, training: str) -> None:
        self._training = training
        self._artifact_id: UUID | None = None

    def show(self, event: Mapping[str, Any]) -> None:
        """Update the artifact after an event `epoch` of this training; call it in a task.

        Args:
            event: as `fullscale.runtime.events` describes it; other events are ignored.
        """
        if event["event"] != "epoch" or event["training"] != self._training:
            return
        percent = 100 * event["epoch"] / event["num_epochs"]
        text = f"{self._training}: epoch {event['epoch']} of {event['num_epochs']}"
        if event["dice"] is not None:
            text += f", validation Dice {event['dice']:.4f}"
        try:
            if self._artifact_id is None:
                key = artifact_key(f"training-{self._training}")
                created = create_progress_artifact(percent, key=key, description=text)
                self._artifact_id = cast("UUID", created)
            else:
                update_progress_artifact(self._artifact_id, percent, description=text)
        except Exception as error:  # a training does not end because its progress cannot be shown
            get_run_logger().warning("progress is not shown: %s", error)


def artifact_key(name: str) -> str:
    """Return a key that Prefect accepts: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
