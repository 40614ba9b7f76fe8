"""The server does not wait for itself where SQLite's database is locked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import ROOT
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

pytestmark = pytest.mark.slow

OWN = ("http://127.0.0.1:4200", "http://ct.example.org:4200")

# As in the server: one connection holds the database and this thread releases it; another waits for
# the database in a second thread, and left a cursor in the garbage.
SCRIPT = """
import gc, sqlite3, sys, threading, time
from flows.servers.prefect_server import PAUSE_S, collect_in_thread

path, way = sys.argv[1:]
collect_in_thread() if way == "thread" else gc.disable()
holder = sqlite3.connect(path, isolation_level=None)
holder.execute("PRAGMA journal_mode = WAL")
holder.execute("CREATE TABLE numbers (number)")
waiting = sqlite3.connect(path, timeout=8 * PAUSE_S, isolation_level=None, check_same_thread=False)
cursor = waiting.execute("VALUES (1), (2)")
cycle = [cursor]
cycle.append(cycle)
del cursor, cycle
holder.execute("BEGIN IMMEDIATE")

def write():
    try:
        waiting.execute("INSERT INTO numbers VALUES (3)")
        print("written")
    except sqlite3.OperationalError:
        print("given up")

writing = threading.Thread(target=write)
writing.start()
time.sleep(0.5)
if way == "plain":
    gc.enable()
kept = [[] for _ in range(10_000)]
time.sleep(1.5 * PAUSE_S)
holder.execute("COMMIT")
writing.join()
"""


@pytest.mark.parametrize(("way", "told"), [("plain", "given up"), ("thread", "written")])
def test_garbage_holds_up_nobody_who_has_the_database(tmp_path: Path, way: str, told: str) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "numbers.db"), way]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == told


# Two transactions that read, then write, as many of Prefect's do.
TRANSACTIONS = """
import asyncio, sys
from prefect.server.database.configurations import AioSqliteConfiguration
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from flows.servers.prefect_server import take_turns

path, way = sys.argv[1:]
if way == "turns":
    take_turns()
config = AioSqliteConfiguration(f"sqlite+aiosqlite:///{path}")

async def add_one(pause_s):
    session = await config.session(await config.engine())
    async with session, config.begin_transaction(session):
        number = (await session.execute(text("SELECT number FROM numbers"))).scalar()
        await asyncio.sleep(pause_s)
        await session.execute(text(f"UPDATE numbers SET number = {number + 1}"))

async def main():
    async with (await config.engine()).begin() as connection:
        await connection.execute(text("CREATE TABLE numbers (number)"))
        await connection.execute(text("INSERT INTO numbers VALUES (0)"))
    try:
        await asyncio.gather(add_one(0.2), add_one(0.6))
    except OperationalError as error:
        print(error.orig)
    async with (await config.engine()).begin() as connection:
        print((await connection.execute(text("SELECT number FROM numbers"))).scalar())

asyncio.run(main())
"""


@pytest.mark.parametrize(("way", "told"), [("plain", "database is locked\n1"), ("turns", "2")])
def test_transactions_that_read_first_take_turns(tmp_path: Path, way: str, told: str) -> None:
    command = [sys.executable, "-c", TRANSACTIONS, str(tmp_path / "numbers.db"), way]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == told, done.stderr


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    """Return a client of an application that answers its own addresses alone."""
    from flows.servers.prefect_server import (
        OwnAddressOnly,  # it loads Prefect's server, for seconds
    )

    async def answer(request: object) -> PlainTextResponse:
        return PlainTextResponse("content")

    async def talk(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text("content")
        await socket.close()

    app = Starlette(routes=[Route("/", answer, methods=["GET", "POST"]), WebSocketRoute("/", talk)])
    app.add_middleware(OwnAddressOnly, origins=OWN)
    with TestClient(app, base_url=OWN[0]) as client:
        yield client


@pytest.mark.parametrize(
    ("host", "origin", "code"),
    [
        ("127.0.0.1:4200", None, 200),  # a program: only browsers send an origin
        ("127.0.0.1:4200", OWN[0], 200),
        ("ct.example.org:4200", OWN[0], 200),  # pages under one name, the API under another
        ("127.0.0.1:4200", "http://evil.example.org", 403),
        ("127.0.0.1:4200", "http://127.0.0.1:8000", 403),  # another program's pages
        ("127.0.0.1:4200", "null", 403),  # a file, or a page in a sandbox
        ("rebound.example.org:4200", None, 400),
        ("rebound.example.org:4200", "http://rebound.example.org:4200", 400),
        ("127.0.0.1:4201", None, 400),
    ],
)
def test_server_answers_its_own_addresses_alone(
    client: TestClient, host: str, origin: str | None, code: int
) -> None:
    headers = {"Host": host} | ({"Origin": origin} if origin else {})
    for method in ("GET", "POST"):
        answer = client.request(method, "/", headers=headers)
        assert answer.status_code == code
        assert (answer.text == "content") == (code == 200)
    if code == 200:
        with client.websocket_connect("/", headers=headers) as socket:
            assert socket.receive_text() == "content"
    else:
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/", headers=headers):
            pass


def test_options_are_those_of_prefects_own_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.servers.prefect_server", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "prefect server start" in done.stdout
    assert "--port" in done.stdout
