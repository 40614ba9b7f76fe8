"""The server does not wait for itself where SQLite's database is locked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT

pytestmark = pytest.mark.slow

# As in the server: one connection holds the database and this thread releases it; another waits for
# the database in a second thread, and left a cursor in the garbage.
SCRIPT = """
import gc, sqlite3, sys, threading, time
from flows.prefect_server import PAUSE_S, collect_in_thread

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


def test_options_are_those_of_prefects_own_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.prefect_server", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "prefect server start" in done.stdout
    assert "--port" in done.stdout
