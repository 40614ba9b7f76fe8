"""Prefect's server, closed to other sites' pages, and without waits and errors of SQLite.

`python -m flows.servers.prefect_server OPTIONS` is `prefect server start OPTIONS` with three
changes.

Prefect answers requests for any host, from the pages of any site, and its API starts programs. So
any page that is open in a browser on this machine could start one. Here a request needs the
server's own address as Host, and as Origin if it has one, which browsers send and other programs do
not. The addresses are those in PREFECT_SERVER_CORS_ALLOWED_ORIGINS.

SQLite refuses a transaction that has read, and now wants to write, if another one wrote meanwhile:
"database is locked", without waiting. Prefect answers code 503, and its services print a traceback.
Here a transaction takes its turn when it begins, and waits for those before it.

The third change avoids a deadlock. A query that SQLite refuses because its database is locked
leaves a cursor in a cycle of references. Python collects the cycle in the thread that allocates
next, mostly the event loop's, and resetting the cursor waits for its connection. If that connection
is waiting for the database by then, and the holder of the database needs the event loop to release
it, nothing moves until SQLite's timeout, a minute later. A cancelled query also leaves a cursor,
which keeps the database locked until it is collected; a thread that collects every second makes
that time short.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Collection
from contextlib import AbstractAsyncContextManager
from itertools import count
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from prefect.cli import app
from prefect.server.api import server  # before the first collection
from prefect.server.database.configurations import AioSqliteConfiguration
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

ORIGINS_VARIABLE = "PREFECT_SERVER_CORS_ALLOWED_ORIGINS"
PAUSE_S = 1.0
FULL_EVERY = 10  # a full collection stops the server for a tenth of a second


class OwnAddressOnly:
    """ASGI middleware that refuses requests for other hosts, or from pages of other origins.

    Args:
        app: the application.
        origins: accepted values of Origin, such as http://localhost:4200. The value of Host must be
            the address in one of them.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        self._app = app
        self._origins = frozenset(origins)
        self._hosts = frozenset(urlsplit(origin).netloc for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer code 400 (wrong host) or 403 (wrong origin), or pass the request on."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if headers.get("host") not in self._hosts:
            status, what = 400, f"host {headers.get('host')!r}"
        elif headers.get("origin", next(iter(self._origins))) not in self._origins:
            status, what = 403, f"pages of {headers['origin']!r}"
        else:
            await self._app(scope, receive, send)
            return
        reason = f"this server does not answer {what}; {ORIGINS_VARIABLE} names what it answers\n"
        refusal: ASGIApp = (
            WebSocketClose(reason=what)
            if scope["type"] == "websocket"
            else PlainTextResponse(reason, status)
        )
        await refusal(scope, receive, send)


def close_to_others() -> None:
    """Let the application that Prefect serves from now on answer the allowed origins alone."""
    make = server.create_app

    def create_app(*arguments: Any, **options: Any) -> ASGIApp:
        made = make(*arguments, **options)
        if not options.get("final"):
            return made  # for Prefect's own clients in this process, which use another host name
        origins = os.environ.get(ORIGINS_VARIABLE)
        if not origins:
            raise SystemExit(f"error: {ORIGINS_VARIABLE} must name the addresses of this server")
        return OwnAddressOnly(made, [origin.strip() for origin in origins.split(",")])

    server.create_app = create_app  # type: ignore[assignment]


def take_turns() -> None:
    """Let each of Prefect's transactions on SQLite reserve the database when it begins."""
    begin = AioSqliteConfiguration.begin_transaction

    def begin_transaction(
        self: AioSqliteConfiguration, session: AsyncSession, with_for_update: bool = False
    ) -> AbstractAsyncContextManager[AsyncSessionTransaction]:
        return begin(self, session, with_for_update=True)

    AioSqliteConfiguration.begin_transaction = begin_transaction  # type: ignore[assignment, method-assign]


def collect_in_thread() -> None:
    """Collect garbage in a new thread from now on, and in no other."""
    gc.disable()
    gc.collect()
    gc.freeze()  # objects that exist now are permanent: exclude them from all collections
    Thread(target=_collect, name="garbage", daemon=True).start()


def _collect() -> None:
    for turn in count(1):
        time.sleep(PAUSE_S)
        gc.collect(1 if turn % FULL_EVERY else 2)


def main() -> None:
    """Start the server with this program's options; its exit code is that of `prefect`."""
    close_to_others()
    take_turns()
    collect_in_thread()
    sys.argv[1:1] = ["server", "start"]
    app()


if __name__ == "__main__":
    main()
