"""Errors of the tracking server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fullscale.runtime.errors import StageError

if TYPE_CHECKING:
    pass


class UnreachableError(StageError):
    """The store does not answer, or cannot take anything now.

    Attributes:
        reason: what it, or the network, said.
    """

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(
            f"the MLflow store {uri} does not answer ({reason}); start the server, or "
            "unset MLFLOW_TRACKING_URI to use the local store"
        )
        self.reason = reason


class RefusedError(Exception):
    """The store answers that it will never take this."""


class LostRunError(Exception):
    """The store does not know the run (any more)."""


def shorten(error: Exception) -> str:
    """What an error says, on one line; of a long one the beginning, and the cause at its end."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:80]} ... {text[-115:]}"
