"""What a tracked run is told, kept on disk until the tracking server has it.

A run's folder holds

    run.json        what the run is: its store, its MLflow id, parameters, tags, data version
    journal.csv     kind, step, key, value, timestamp_ms: metrics, tags and changes of status
    sent            how many rows of journal.csv the server has confirmed

and, in pictures/ and files/, what fullscale/tracking/artifact_queue.py keeps there.

Rows are appended, flushed and synced, so a kill loses nothing that was logged. A row is sent with
the timestamp it was written with: MLflow knows a point of a metric by key, step, timestamp and
value, so a row that is sent twice is kept once.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from fullscale.runtime.errors import StageError
from fullscale.runtime.files import write_atomically
from fullscale.tracking.artifact_queue import Outbox

Kind = Literal["metric", "tag", "status"]
COLUMNS = ("kind", "step", "key", "value", "timestamp_ms")
RUNNING = "RUNNING"


@dataclass(frozen=True)
class Row:
    """A line of the journal.

    Attributes:
        kind: metric, tag or status.
        step: of a metric, usually the epoch; 0 otherwise.
        key: of a metric or tag; empty for a status.
        value: a number in full precision for a metric, text otherwise.
        timestamp_ms: when it was written, in milliseconds since 1970.
    """

    kind: Kind
    step: int
    key: str
    value: str
    timestamp_ms: int


@dataclass(frozen=True)
class RunDescription:
    """What is needed to start the run, or to start it once more where its store lost it.

    Attributes:
        key: name of the run's folder; also a tag, by which a store knows the run.
        store_uri: where it is tracked.
        artifact_location: for a new experiment in that store.
        name: a network's.
        parameters: what was set.
        tags: what describes the run.
        data_version: MD5 of the annotated scans.
        started_ms: in milliseconds since 1970.
        run_id: MLflow's, once it has the run and its parameters.
    """

    key: str
    store_uri: str
    artifact_location: str | None
    name: str
    parameters: dict[str, str]
    tags: dict[str, str]
    data_version: str
    started_ms: int
    run_id: str | None = None


class Journal:
    """The journal of one run. Written by the training, read by the thread that sends it.

    Raises:
        StageError: a file of it is not readable.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "journal.csv"
        self.outbox = Outbox(folder)
        self._lock = threading.Lock()
        try:
            self.run = RunDescription(**json.loads((folder / "run.json").read_text("utf-8")))
            self.num_sent = int((folder / "sent").read_text("utf-8"))
        except (ValueError, TypeError) as error:
            raise StageError(
                f"{folder} does not describe a tracked run ({error}); move the folder away"
            ) from None
        self.rows = _read_rows(self.path)
        self._logged = {(row.step, row.key) for row in self.rows if row.kind == "metric"}

    @classmethod
    def create(cls, folder: Path, run: RunDescription) -> Journal:
        """Begin the journal of a run in `folder`/KEY."""
        inner = folder / run.key
        write_atomically(inner / "journal.csv", ",".join(COLUMNS) + "\n")
        write_atomically(inner / "sent", "0")
        write_atomically(inner / "run.json", json.dumps(asdict(run), indent=2))
        return cls(inner)

    def describe(self, run: RunDescription) -> None:
        """Say anew what the run is; in another store, or under another id, all is sent again."""
        if (run.store_uri, run.run_id) != (self.run.store_uri, self.run.run_id):
            self.mark_sent(0)
        write_atomically(self.folder / "run.json", json.dumps(asdict(run), indent=2))
        self.run = run

    def add_metrics(self, metrics: Mapping[str, float], step: int, timestamp_ms: int) -> None:
        """Keep the values of a step, except those that are not a number or that it has already."""
        rows = [
            Row("metric", step, key, repr(float(value)), timestamp_ms)
            for key, value in metrics.items()
            if not math.isnan(value) and (step, key) not in self._logged
        ]
        self._add(rows)
        self._logged |= {(step, row.key) for row in rows}

    def add_tag(self, key: str, value: str, timestamp_ms: int) -> None:
        """Keep a tag."""
        self._add([Row("tag", 0, key, value, timestamp_ms)])

    def add_status(self, status: str, timestamp_ms: int) -> None:
        """Keep a change of the run's status."""
        self._add([Row("status", 0, "", status, timestamp_ms)])

    def _add(self, rows: list[Row]) -> None:
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        for row in rows:
            # As JSON a text has no line breaks: a line cut short by a kill stays recognisable.
            value = json.dumps(row.value) if row.kind == "tag" else row.value
            writer.writerow((row.kind, row.step, row.key, value, row.timestamp_ms))
        with self._lock:
            with self.path.open("ab") as stream:
                stream.write(buffer.getvalue().encode())
                stream.flush()
                os.fsync(stream.fileno())
            self.rows += rows

    @property
    def status(self) -> str:
        """The status the run was given last."""
        return next((row.value for row in reversed(self.rows) if row.kind == "status"), RUNNING)

    def unsent_rows(self) -> list[Row]:
        """Rows the server has not confirmed, oldest first."""
        with self._lock:
            return self.rows[self.num_sent :]

    def mark_sent(self, num_rows: int) -> None:
        """Remember how many rows, from the first on, the server has."""
        write_atomically(self.folder / "sent", str(num_rows))
        self.num_sent = num_rows

    def is_sent(self) -> bool:
        """Whether the server has everything."""
        return not self.unsent_rows() and self.outbox.is_empty()


def now_ms() -> int:
    """The time in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def list_journals(folder: Path) -> list[Journal]:
    """Journals of the runs in a folder, oldest first."""
    return [Journal(path.parent) for path in sorted(folder.glob("*/run.json"))]


def _read_rows(path: Path) -> list[Row]:
    """Rows of a journal; what a kill left of an unfinished last line is cut off."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    rows = []
    lines = csv.reader(io.StringIO(whole.decode("utf-8", errors="replace"), newline=""))
    for number, line in enumerate(lines, start=1):
        if number == 1 and tuple(line) == COLUMNS:
            continue
        try:
            kind, step, key, value, timestamp_ms = line
            if number == 1 or kind not in get_args(Kind):
                raise ValueError(kind)
            text = json.loads(value) if kind == "tag" else value
            rows.append(Row(kind, int(step), key, text, int(timestamp_ms)))  # type: ignore[arg-type]
        except ValueError:
            raise StageError(
                f"{path}, line {number}: found {','.join(line)[:80]!r}, expected "
                f"{','.join(COLUMNS)}; move {path.parent} away, or remove the line"
            ) from None
    return rows
