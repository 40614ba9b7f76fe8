"""Sends a journal to its store, from a thread of its own, through outages."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fullscale.runtime.console import say
from fullscale.tracking.errors import LostRunError, RefusedError, UnreachableError
from fullscale.tracking.journal import Journal, Row
from fullscale.tracking.remote_run import MAX_METRICS, MAX_TEXTS, RemoteRun

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 15.0


def count_values(rows: list[Row]) -> int:
    """How many rows are values of metrics."""
    return sum(row.kind == "metric" for row in rows)


def describe_unsent(journal: Journal) -> str:
    """What waits in a journal, where, and who sends it."""
    num_values = count_values(journal.unsent_rows())
    num_files = len(journal.outbox.pictures()) + sum(
        len(reference.sha256) for reference in journal.outbox.files()
    )
    return (
        f"{num_values} values and {num_files} files for MLflow at {journal.run.store_uri} are kept "
        f"in {journal.folder}; the next training or registration sends them"
    )


def send_all(
    journal: Journal, remote: RemoteRun, is_over: Callable[[], bool] = lambda: False
) -> None:
    """Send what the store lacks: rows in their order, then pictures, then files.

    Args:
        journal: what is to be sent.
        remote: the run in its store.
        is_over: asked between two requests; once it is true, the rest is left.

    Raises:
        LostRunError, UnreachableError: the store does not know the run, or does not answer.
    """
    if not remote.is_linked:
        old_id = journal.run.run_id
        if remote.link() and old_id is not None:
            say(
                f"MLflow at {journal.run.store_uri} no longer has run {old_id}; "
                f"all its values are sent to a new one, {journal.run.run_id}"
            )
    while (rows := _next_rows(journal.unsent_rows())) and not is_over():
        _send_rows(remote, rows)
        journal.mark_sent(journal.num_sent + len(rows))
    for path, file in journal.outbox.pictures().items():
        if is_over():
            return
        state = file.stat()
        _send_file(remote, file, path)
        journal.outbox.drop_picture(file, state)
    for reference in journal.outbox.files():
        for name in reference.sha256:
            if is_over():
                return
            file, path = reference.folder / name, f"{reference.path}/{name}"
            if reference.is_unchanged(name):
                _send_file(remote, file, path)
            else:
                say(f"{file} changed or went before MLflow could have it; the run has no {path}")
        reference.note.unlink()


def _next_rows(rows: list[Row]) -> list[Row]:
    """The first rows of one kind, as many as fit one request."""
    if not rows:
        return []
    kind = rows[0].kind
    limit = {"metric": MAX_METRICS, "tag": MAX_TEXTS, "status": 1}[kind]
    return list(itertools.takewhile(lambda row: row.kind == kind, rows[:limit]))


def _send_rows(remote: RemoteRun, rows: list[Row]) -> None:
    try:
        remote.send_rows(rows)
    except RefusedError as error:
        if len(rows) == 1:
            say(f"MLflow refuses {rows[0].kind} {rows[0].key} ({error}); it is left out")
            return
        for row in rows:
            _send_rows(remote, [row])


def _send_file(remote: RemoteRun, file: Path, path: str) -> None:
    try:
        remote.send_file(file, path)
    except RefusedError as error:
        say(f"MLflow refuses {path} ({error}); it is left out")


class Sender:
    """A thread that keeps a store up to date with a journal.

    While the store does not answer, the journal grows and the thread asks again after 1, 2, 4, ...,
    at most `LONGEST_WAIT_S` seconds.

    Args:
        journal: what is to be sent.
        remote: the run in its store.
    """

    def __init__(self, journal: Journal, remote: RemoteRun) -> None:
        self._journal = journal
        self._remote = remote
        self._news = threading.Event()
        self._closing = threading.Event()
        self._deadline_s = float("inf")
        self._silent_since: tuple[str | None, int] | None = None  # run, rows sent at that time
        self._thread = threading.Thread(target=self._work, name="mlflow-sender", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Say that there is something to send."""
        self._news.set()

    def close(self, timeout_s: float) -> None:
        """Send what is left, for so long at most; say where it is if that was not enough."""
        self._deadline_s = time.monotonic() + timeout_s
        self._closing.set()
        self._news.set()
        self._thread.join(timeout_s)
        if not self._journal.is_sent():
            say(describe_unsent(self._journal))

    def _work(self) -> None:
        wait_s = FIRST_WAIT_S
        while True:
            is_last = self._closing.is_set()  # asked first: what comes before close() is sent
            self._news.clear()
            try:
                self._send()
            except (UnreachableError, LostRunError) as error:
                self._remote.unlink()
                if isinstance(error, UnreachableError):
                    self._begin_outage(error.reason)
                if self._is_over():
                    return
                wait_s = self._wait(wait_s)
            else:
                wait_s = FIRST_WAIT_S
                if is_last:
                    return
                self._news.wait()

    def _send(self) -> None:
        send_all(self._journal, self._remote, self._is_over)
        if self._silent_since is None or self._is_over():
            return
        run_id, num_sent = self._silent_since
        start = num_sent if run_id == self._journal.run.run_id else 0
        num_values = count_values(self._journal.rows[start : self._journal.num_sent])
        say(f"MLflow at {self._journal.run.store_uri} is back; {num_values} values were sent")
        self._silent_since = None

    def _begin_outage(self, reason: str) -> None:
        if self._silent_since is None:
            self._silent_since = (self._journal.run.run_id, self._journal.num_sent)
            say(
                f"MLflow at {self._journal.run.store_uri} does not answer ({reason}); training "
                f"goes on, metrics are kept in {self._journal.path} and sent when it is back"
            )

    def _wait(self, wait_s: float) -> float:
        """Wait until the store may be asked again; returns how long to wait the next time."""
        if self._closing.is_set():
            time.sleep(max(0.0, min(wait_s, self._deadline_s - time.monotonic())))
        elif self._closing.wait(wait_s):
            return FIRST_WAIT_S
        return min(2 * wait_s, LONGEST_WAIT_S)

    def _is_over(self) -> bool:
        return time.monotonic() > self._deadline_s
