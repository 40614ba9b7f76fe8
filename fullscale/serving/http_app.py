"""Requests over HTTP, answered by MLflow's protocol within bounded memory and time."""

# MLflow's protocol carries no types.
# mypy: allow-untyped-calls
from __future__ import annotations

import asyncio
import io
import json
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pandas as pd
from fastapi import FastAPI, Request, Response
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server

from fullscale.runtime.console import say
from fullscale.runtime.errors import ScanError, StageError
from fullscale.serving.alias_follower import Served
from fullscale.serving.row_segmenter import RowSegmenter

MAX_VALUES = 100_000
"""Commas, colons and brackets of a body: parsed, each may take a hundred bytes."""

MAX_ROWS = 64
READ_TIMEOUT_S = 30.0
MAX_MESSAGE = 600


@dataclass(frozen=True)
class Bounds:
    """What is taken at all.

    Attributes:
        max_body_bytes: of one request.
        max_waiting: requests at a time; one is computed, the others wait for it.
    """

    max_body_bytes: int = 256 << 20
    max_waiting: int = 4


class RefusedRequestError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        reason: for whoever asked: what was found, what is wanted.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


def make_app(served: Served, bounds: Bounds) -> FastAPI:
    """The application: /invocations as MLflow's own server has it, /health, /ping and /model.

    Scans are computed one after the other in a thread of their own, so that memory holds one.
    """
    app = FastAPI(title="fullscale", docs_url=None, redoc_url=None, openapi_url=None)
    worker = ThreadPoolExecutor(1, thread_name_prefix="segment")
    places = _Places(bounds.max_waiting)

    @app.get("/health")
    @app.get("/ping")
    async def health() -> Response:
        return Response("\n", media_type="application/json")

    @app.get("/model")
    async def model() -> dict[str, Any]:
        now = served.current.model
        return {
            "model": served.wanted,
            "name": now.name,
            "version": now.version,
            "weights_sha256": now.weights_sha256,
            "loaded": datetime.fromtimestamp(served.since_s, UTC).isoformat(timespec="seconds"),
            "organs": list(now.trained.description.organs),
        }

    @app.post("/invocations")
    async def invocations(request: Request) -> Response:
        try:
            places.take()
        except RefusedRequestError as refusal:
            return _refuse(refusal)
        try:
            body = await _read_body(request, bounds.max_body_bytes)
            future = worker.submit(answer, body, served.current)
        except RefusedRequestError as refusal:
            places.leave()
            return _refuse(refusal)
        except BaseException:  # whoever asked has gone
            places.leave()
            raise
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(places.leave))
        try:
            # Not cancelled with the request: its place is taken until it is computed.
            content = await asyncio.shield(asyncio.wrap_future(future))
        except RefusedRequestError as refusal:
            return _refuse(refusal)
        return Response(content, media_type="application/json")

    return app


def answer(body: bytes, segmenter: RowSegmenter) -> str:
    """What a request is answered with.

    Args:
        body: JSON in one of the forms of MLflow's protocol.
        segmenter: of the version in use.

    Returns:
        JSON, a field `predictions` with a mask and statistics for each row.

    Raises:
        RefusedRequestError: it cannot be answered.
    """
    try:
        result = segmenter.segment(_read_rows(body))
    except ScanError as error:
        raise RefusedRequestError(400, str(error)) from None
    except (StageError, MemoryError) as error:
        raise RefusedRequestError(503, f"{error or 'memory ran out'}") from None
    except RefusedRequestError:
        raise
    except Exception:  # a defect of ours; the next request is answered all the same
        say(traceback.format_exc())
        raise RefusedRequestError(500, "this failed; the server's log says why") from None
    written = io.StringIO()
    scoring_server.predictions_to_json(result, written)
    return written.getvalue()


def _read_rows(body: bytes) -> pd.DataFrame:
    if sum(body.count(mark) for mark in (b",", b":", b"[", b"{")) > MAX_VALUES:
        raise RefusedRequestError(413, f"more than {MAX_VALUES:,} values; send a scan at a time")
    try:
        content = json.loads(body)
    except RecursionError:
        raise RefusedRequestError(400, "JSON that is nested too deep") from None
    except ValueError as error:
        raise RefusedRequestError(400, f"no JSON in UTF-8: {_shorten(error)}") from None
    form = 'wanted {"dataframe_records": [{"scan": "BASE64"}]}, or another of MLflow\'s forms'
    if not isinstance(content, dict):
        raise RefusedRequestError(400, f"found a JSON {type(content).__name__}; {form}")
    content.pop("params", None)
    try:
        parsed = scoring_server.infer_and_parse_data(content)
        rows = pd.DataFrame(parsed) if isinstance(parsed, dict) else parsed
    except MlflowException as error:
        raise RefusedRequestError(400, f"{_shorten(error)}; {form}") from None
    except Exception as error:  # pandas and NumPy fail in many ways on what is no table
        reason = f"no table ({type(error).__name__}: {_shorten(error)}); {form}"
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


class _Places:
    """How many requests may be here at a time; used by the event loop alone."""

    def __init__(self, num_places: int) -> None:
        self._num_free = self._num_places = num_places

    def take(self) -> None:
        if not self._num_free:
            raise RefusedRequestError(503, f"{self._num_places} requests are waiting; ask later")
        self._num_free -= 1

    def leave(self) -> None:
        self._num_free += 1


def _refuse(refusal: RefusedRequestError) -> Response:
    content = {"error_code": refusal.status, "message": refusal.reason[:MAX_MESSAGE]}
    headers = {"Retry-After": "30"} if refusal.status == 503 else {}
    return Response(json.dumps(content), refusal.status, headers, "application/json")


def _shorten(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
