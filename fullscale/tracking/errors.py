"""Errors of the tracking server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fullscale.runtime.errors import TransientStageError, shorten


class UnreachableError(TransientStageError):
    """The store does not answer, or cannot accept anything now.

    Attributes:
        reason: message of the store or of the network.
    """

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(
            f"the MLflow store {uri} does not answer ({reason}); start the server, or "
            "unset MLFLOW_TRACKING_URI to use the local store"
        )
        self.reason = reason


@contextmanager
def translate_mlflow_errors(uri: str) -> Iterator[None]:
    """Raise UnreachableError for every failure on the way to the store `uri`.

    Proxies, load balancers and object stores between this machine and MLflow fail in many ways
    that MLflow does not translate, so the kind of error does not matter here.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except UnreachableError:
        raise
    except MlflowException as error:
        raise UnreachableError(uri, shorten(error)) from None
    except Exception as error:
        raise UnreachableError(uri, f"{type(error).__name__}: {shorten(error)}") from error
