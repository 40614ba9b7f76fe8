"""HTTP server that speaks MLflow's protocol with bounded memory and time."""

# MLflow's scoring server has no type annotations.
# mypy: allow-untyped-calls
from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pandas as pd
from fastapi import FastAPI, Request, Response
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server
from starlette.middleware.trustedhost import TrustedHostMiddleware

from fullscale.runtime.errors import ScanError, StageError, shorten
from fullscale.serving.alias_follower import AliasFollower
from fullscale.serving.row_segmenter import RowSegmenter

logger = logging.getLogger(__name__)

MAX_VALUES = 100_000
"""Commas, colons and brackets in a body. Each can take a hundred bytes when parsed."""

MAX_ROWS = 64
READ_TIMEOUT_S = 30.0
MAX_MESSAGE = 600


@dataclass(frozen=True)
class RequestLimits:
    """Limits on requests as a whole; `ScanLimits` limits the scans in them.

    Attributes:
        max_body_bytes: size of one request's body.
        max_concurrent: requests accepted at a time. One is computed, the others wait.
    """

    max_body_bytes: int = 256 << 20
    max_concurrent: int = 4


class RefusedRequestError(Exception):
    """A request that gets an error response.

    Args:
        status: HTTP status code.
        reason: for the client: what was found and what was expected.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


def make_app(
    follower: AliasFollower, limits: RequestLimits, hosts: Sequence[str] = ("*",)
) -> FastAPI:
    """Return the application: /invocations as in MLflow's server, /health, /ping and /model.

    Scans are computed one at a time in a worker thread, so memory holds only one of them.

    Args:
        follower: the model.
        limits: limits on requests.
        hosts: accepted values of the header Host, without port; "*" accepts any.
    """
    app = FastAPI(title="fullscale", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    worker = ThreadPoolExecutor(1, thread_name_prefix="segment")
    slots = asyncio.Semaphore(limits.max_concurrent)

    @app.get("/health")
    @app.get("/ping")
    async def health() -> Response:
        return Response("\n", media_type="application/json")

    @app.get("/model")
    async def model() -> dict[str, Any]:
        now = follower.current.model
        loaded = datetime.fromtimestamp(follower.loaded_at_s, UTC)
        return {
            "model": follower.model_name,
            "name": now.name,
            "version": now.version,
            "weights_sha256": now.weights_sha256,
            "loaded": loaded.isoformat(timespec="seconds"),
            "organs": list(now.trained.description.organs),
        }

    @app.post("/invocations")
    async def invocations(request: Request) -> Response:
        if slots.locked():
            reason = f"{limits.max_concurrent} requests are waiting; try again later"
            return _refuse(RefusedRequestError(503, reason))
        await slots.acquire()  # returns at once: a slot is free
        try:
            body = await _read_body(request, limits.max_body_bytes)
            future = worker.submit(answer_request, body, follower.current)
        except RefusedRequestError as refusal:
            slots.release()
            return _refuse(refusal)
        except BaseException:  # such as a client that disconnected
            slots.release()
            raise
        # The computation cannot be cancelled. It holds its slot until it ends, even if the client
        # disconnects, or else clients that give up could fill the worker's queue without limit.
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(slots.release))
        try:
            content = await asyncio.shield(asyncio.wrap_future(future))
        except RefusedRequestError as refusal:
            return _refuse(refusal)
        return Response(content, media_type="application/json")

    return app


def answer_request(body: bytes, segmenter: RowSegmenter) -> str:
    """Segment the scans of a request.

    Args:
        body: JSON in one of the forms of MLflow's protocol.
        segmenter: of the version in use.

    Returns:
        JSON with a field `predictions`: a mask and statistics for each row.

    Raises:
        RefusedRequestError: the request is invalid (4xx) or computing failed (5xx).
    """
    try:
        result = segmenter.segment(_read_rows(body))
    except ScanError as error:
        raise RefusedRequestError(400, str(error)) from None
    except (StageError, MemoryError) as error:
        raise RefusedRequestError(503, f"{error or 'memory ran out'}") from None
    except RefusedRequestError:
        raise
    except Exception:  # a defect of this program: log it and go on serving
        logger.exception("a request failed")
        raise RefusedRequestError(500, "this failed; the server's log says why") from None
    written = io.StringIO()
    scoring_server.predictions_to_json(result, written)
    return written.getvalue()


def _read_rows(body: bytes) -> pd.DataFrame:
    # Counted before parsing: parsed values take far more memory than the body itself.
    if sum(body.count(mark) for mark in (b",", b":", b"[", b"{")) > MAX_VALUES:
        raise RefusedRequestError(413, f"more than {MAX_VALUES:,} values; send one scan at a time")
    try:
        content = json.loads(body)
    except RecursionError:
        raise RefusedRequestError(400, "JSON that is nested too deep") from None
    except ValueError as error:
        raise RefusedRequestError(400, f"no JSON in UTF-8: {shorten(error)}") from None
    form = 'wanted {"dataframe_records": [{"scan": "BASE64"}]}, or another of MLflow\'s forms'
    if not isinstance(content, dict):
        raise RefusedRequestError(400, f"found a JSON {type(content).__name__}; {form}")
    content.pop("params", None)
    try:
        parsed = scoring_server.infer_and_parse_data(content)
        rows = pd.DataFrame(parsed) if isinstance(parsed, dict) else parsed
    except MlflowException as error:
        raise RefusedRequestError(400, f"{shorten(error)}; {form}") from None
    except Exception as error:  # pandas and NumPy raise many types for malformed tables
        reason = f"no table ({type(error).__name__}: {shorten(error)}); {form}"
        raise RefusedRequestError(400, reason) from None
    if not isinstance(rows, pd.DataFrame) or not len(rows):
        raise RefusedRequestError(400, f"found no rows; {form}")
    if len(rows) > MAX_ROWS:
        raise RefusedRequestError(413, f"{len(rows)} rows; wanted at most {MAX_ROWS}")
    return rows


async def _read_body(request: Request, max_bytes: int) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RefusedRequestError(415, f"found content type {kind!r:.60}; wanted application/json")
    too_large = RefusedRequestError(413, f"a body of more than {max_bytes:,} bytes")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise too_large
    body = bytearray()
    chunks = request.stream().__aiter__()
    while True:
        try:
            body += await asyncio.wait_for(anext(chunks), READ_TIMEOUT_S)
        except StopAsyncIteration:
            return bytes(body)
        except TimeoutError:
            reason = f"nothing came for {READ_TIMEOUT_S:.0f} s"
            raise RefusedRequestError(408, reason) from None
        if len(body) > max_bytes:
            raise too_large


def _refuse(refusal: RefusedRequestError) -> Response:
    content = {"error_code": refusal.status, "message": refusal.reason[:MAX_MESSAGE]}
    headers = {"Retry-After": "30"} if refusal.status == 503 else {}
    return Response(json.dumps(content), refusal.status, headers, "application/json")
