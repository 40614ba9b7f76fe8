"""Prefect's server, with Python's garbage collector in a separate thread.

`python -m flows.prefect_server OPTIONS` is `prefect server start OPTIONS` without one deadlock. A
query that SQLite refuses because its database is locked leaves a cursor in a cycle of references.
Python collects the cycle in the thread that allocates next, mostly the event loop's, and resetting
the cursor waits for its connection. If that connection is waiting for the database by then, and the
holder of the database needs the event loop to release it, nothing moves until SQLite's timeout, a
minute later. A cancelled query also leaves a cursor, which keeps the database locked until it is
collected; a thread that collects every second makes that time short.
"""

from __future__ import annotations

import gc
import sys
import time
from itertools import count
from threading import Thread

import prefect.server.api.server  # noqa: F401 - loaded before the first collection
from prefect.cli import app

PAUSE_S = 1.0
FULL_EVERY = 10  # a full collection stops the server for a tenth of a second


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
    collect_in_thread()
    sys.argv[1:1] = ["server", "start"]
    app()


if __name__ == "__main__":
    main()
