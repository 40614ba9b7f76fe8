"""Prefect's server, with its garbage collected beside its event loop.

`python -m flows.prefect_server OPTIONS` is `prefect server start OPTIONS`, but for one thing. A
query that SQLite refused because its database was locked leaves a cursor in a cycle of references.
Python collects it in whatever thread happens to allocate, mostly that of the event loop, and
resetting it waits for its connection. Where that connection is waiting for the database by then,
and who has the database needs the event loop to let go of it, nothing moves until SQLite gives up,
a minute later. A query that was cancelled leaves one, too, which keeps the database locked until it
is collected: that is soon here.
"""

from __future__ import annotations

import gc
import sys
import time
from itertools import count
from threading import Thread

import prefect.server.api.server  # noqa: F401 - so that it is there before the first collection
from prefect.cli import app

PAUSE_S = 1.0
FULL_EVERY = 10  # a full collection stops the server for a tenth of a second


def collect_beside() -> None:
    """Collect garbage in a thread of its own from now on, and in no other."""
    gc.disable()
    gc.collect()
    gc.freeze()  # what is there now stays, and is looked at no more
    Thread(target=_collect, name="garbage", daemon=True).start()


def _collect() -> None:
    for turn in count(1):
        time.sleep(PAUSE_S)
        gc.collect(1 if turn % FULL_EVERY else 2)


def main() -> None:
    """Start the server with the options of this program; it ends as `prefect` does."""
    collect_beside()
    sys.argv[1:1] = ["server", "start"]
    app()


if __name__ == "__main__":
    main()
