"""Tell a store that is away from a request that the store refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fullscale.runtime.errors import shorten
from fullscale.tracking.errors import UnreachableError

HTTP_SERVER_ERROR = 500


@contextmanager
def translate_outages(uri: str) -> Iterator[None]:
    """Raise UnreachableError where the store `uri` goes away in the middle of the block's work.

    All other errors pass as they are: trying again would not help.
    """
    try:
        yield
    except UnreachableError:
        raise
    except Exception as error:
        if is_outage(error):
            raise UnreachableError(uri, shorten(error)) from error
        raise


def is_outage(error: BaseException) -> bool:
    """Return whether an error means that a server, or the network to it, is away for now.

    MLflow wraps what `requests` raises, and gives its own mistakes the status 500 of a server's.
    So the errors that led to `error` decide: a lost or refused connection, a timeout, or an answer
    of 5xx to all attempts.
    """
    import requests

    away = (requests.ConnectionError, requests.Timeout, requests.exceptions.RetryError)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (*away, ConnectionError, TimeoutError)):
            return True
        if isinstance(cause, requests.HTTPError) and cause.response is not None:
            return cause.response.status_code >= HTTP_SERVER_ERROR
        cause = cause.__cause__ or cause.__context__
    return False
