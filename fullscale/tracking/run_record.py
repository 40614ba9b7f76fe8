"""The record of a tracked run on disk, from which its MLflow run is written.

    run.json      store, MLflow run id, parameters, tags, status, data version
    journal.csv   values of metrics; rows are appended and synced to disk
    files/        pictures and other files, under their artifact paths
    sent.json     what the store has confirmed; without it, everything counts as unsent

All is recorded before it is sent, so a kill loses nothing. Sending twice is safe: MLflow identifies
a point of a metric by key, step, timestamp and value, and keeps it once.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fullscale.runtime.errors import StageError
from fullscale.runtime.files import save_picture, write_atomically
from fullscale.tracking.locations import from_portable_uri, to_portable_uri

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

IN_TRAIN = {"learning_rate", "slices", "time"}
"""First words of metrics that MLflow gets in group train. Its pages fold groups and sort them by
name: the first charts of a run are its test Dice, or its losses as long as it trains."""
COLUMNS = ("kind", "step", "key", "value", "timestamp_ms")
RUNNING = "RUNNING"


def now_ms() -> int:
    """Return the time in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True)
class RunDescription:
    """All that a store needs to start the run, also again where it was lost."""

    store_uri: str
    artifact_location: str | None  # for a new experiment
    name: str
    parameters: Mapping[str, object]  # values become text
    tags: Mapping[str, str]
    data_version: str  # MD5 of the annotated scans, shown as the run's data set
    key: str = field(default_factory=lambda: f"{now_ms()}-{secrets.token_hex(4)}")
    started_ms: int = field(default_factory=now_ms)
    run_id: str | None = None  # MLflow's; None until the store has the run
    status: str = RUNNING
    ended_ms: int | None = None

    def __post_init__(self) -> None:
        texts = {key: str(value) for key, value in self.parameters.items()}
        object.__setattr__(self, "parameters", texts)


class MetricRow(NamedTuple):
    """A value of a metric."""

    step: int
    key: str
    value: float
    timestamp_ms: int


@dataclass
class Confirmed:
    """The part of a record that a store has confirmed."""

    run: list[str | None]  # store URI as in run.json, and run id
    num_rows: int = 0
    files: dict[str, int] = field(default_factory=dict)  # time of change by artifact path
    state: list[Any] = field(default_factory=list)  # tags, status and its time


class RunRecord:
    """The record of one run. The training appends to it while a thread sends it.

    Attributes:
        changed: set after each change.
        measure: called by `log_metrics` for more values of the step.

    Raises:
        StageError: a file of it is not readable.
        RuntimeError: it was released.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "journal.csv"
        self.changed = threading.Event()
        self.measure: Callable[[], Mapping[str, float]] = dict
        self._lock = threading.Lock()  # both threads update run.json
        self._is_released = False
        try:
            content = json.loads((folder / "run.json").read_text("utf-8"))
            run = RunDescription(**content)
            self.run = replace(run, store_uri=from_portable_uri(run.store_uri, folder))
            self.sent = Confirmed([run.store_uri, run.run_id])
            if (folder / "sent.json").is_file():
                sent = Confirmed(**json.loads((folder / "sent.json").read_text("utf-8")))
                self.sent = sent if sent.run == self.sent.run else self.sent
        except (ValueError, TypeError, AttributeError) as error:
            raise StageError(
                f"{folder} does not describe a tracked run ({error}); move the folder away"
            ) from None
        self.rows, former_state = _read_journal(self.path)
        self._logged = {(row.step, row.key) for row in self.rows}
        if "status" not in content:
            _convert_former_files(folder)
            self.update(**{**former_state, "tags": {**self.run.tags, **former_state["tags"]}})

    @classmethod
    def create(cls, folder: Path, run: RunDescription) -> RunRecord:
        """Start the record of a run in `folder`/KEY."""
        inner = folder / run.key
        write_atomically(inner / "journal.csv", ",".join(COLUMNS) + "\n")
        _write_run(inner, run)
        return cls(inner)

    @property
    def run_id(self) -> str:
        """MLflow's id; it changes when a store that lost the run answers again."""
        return str(self.run.run_id)

    def update(self, **changes: Any) -> None:
        """Change fields of the description; another store or id makes everything unsent."""
        with self._writing():
            self.run = replace(self.run, **changes)
            _write_run(self.folder, self.run)
            place = [to_portable_uri(self.run.store_uri, self.folder), self.run.run_id]
            if self.sent.run != place:
                self.sent = Confirmed(place)
        self.changed.set()

    def set_tag(self, key: str, value: str) -> None:
        """Set a tag of the run."""
        self.update(tags={**self.run.tags, key: value})

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record values at a step, except NaN and those that it has already.

        A resumed training repeats the epochs after its last checkpoint.
        """
        time_ms = now_ms()
        rows = [
            MetricRow(step, key, float(value), time_ms)
            for name, value in {**metrics, **self.measure()}.items()
            if not math.isnan(value) and (step, key := _add_group(name)) not in self._logged
        ]
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows(("metric", *row) for row in rows)
        with self.path.open("ab") as stream:
            stream.write(buffer.getvalue().encode())
            stream.flush()
            os.fsync(stream.fileno())
        self._logged |= {(step, row.key) for row in rows}
        self.rows += rows
        self.changed.set()

    def log_picture(self, figure: Figure, artifact_path: str) -> None:
        """Record a picture under a path that ends in .png; a later one replaces it."""
        if not artifact_path.endswith(".png"):
            raise ValueError(f"the path of a picture must end in .png, found {artifact_path}")
        save_picture(figure, self.folder / "files" / artifact_path)
        self.changed.set()

    def log_files(self, folder: Path, artifact_path: str) -> None:
        """Record a folder's files as they are now.

        They are linked, because weights are large. The link keeps the content when the file is
        replaced; no stage writes into an existing file.
        """
        for file in (path for path in folder.rglob("*") if path.is_file()):
            link = self.folder / "files" / artifact_path / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            try:
                link.hardlink_to(file.resolve())
            except OSError:  # another file system, or one without links
                shutil.copy2(file, link)
        self.changed.set()

    def unsent_rows(self) -> list[MetricRow]:
        """Return the values that the store has not confirmed, oldest first."""
        return self.rows[self.sent.num_rows :]

    def unsent_files(self) -> Iterator[tuple[str, Path, int]]:
        """Yield artifact path, file and time of change of each file that is not confirmed."""
        root = self.folder / "files"
        for file in sorted(root.rglob("*")):
            if file.suffix == ".part" or not file.is_file():  # .part: a picture being written
                continue
            path, time_ns = file.relative_to(root).as_posix(), file.stat().st_mtime_ns
            if self.sent.files.get(path) != time_ns:
                yield path, file, time_ns

    def state(self) -> list[Any]:
        """Return tags and status, as `Confirmed.state` holds them."""
        return [self.run.tags, self.run.status, self.run.ended_ms]

    def is_sent(self) -> bool:
        """Return whether the store has everything."""
        is_rest = self.unsent_rows() or self.state() != self.sent.state
        return not is_rest and not any(self.unsent_files())

    def mark_sent(
        self,
        num_rows: int = 0,
        files: Mapping[str, int] | None = None,
        state: list[Any] | None = None,
    ) -> None:
        """Note what the store has confirmed: so many more rows, files, tags and status."""
        with self._writing():
            self.sent.num_rows += num_rows
            self.sent.files |= files or {}
            self.sent.state = state or self.sent.state
            write_atomically(self.folder / "sent.json", json.dumps(asdict(self.sent)))

    def release(self) -> None:
        """Write nothing from now on: a request that still hangs must not, once others may."""
        with self._lock:
            self._is_released = True

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._lock:
            if self._is_released:
                raise RuntimeError(f"{self.folder} is left to whoever opens it next")
            yield


def _add_group(name: str) -> str:
    """Return the name of a metric in MLflow."""
    return f"train/{name}" if name.partition("/")[0] in IN_TRAIN else name


def list_records(folder: Path) -> list[RunRecord]:
    """Return the records of the runs in a folder, oldest first."""
    return [RunRecord(path.parent) for path in sorted(folder.glob("*/run.json"))]


def _write_run(folder: Path, run: RunDescription) -> None:
    content = asdict(run) | {"store_uri": to_portable_uri(run.store_uri, folder)}
    write_atomically(folder / "run.json", json.dumps(content, indent=2))


def _read_journal(path: Path) -> tuple[list[MetricRow], dict[str, Any]]:
    """Return the rows of journal.csv, without a last line that a kill cut short.

    Earlier versions wrote tags and status there, too; those are returned as fields of the run.
    """
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    lines = csv.reader(io.StringIO(whole.decode("utf-8", errors="replace"), newline=""))
    rows, state = [], dict[str, Any](tags={})
    for number, line in enumerate(lines, start=1):
        try:
            match tuple(line) if number > 1 or tuple(line) != COLUMNS else ():
                case ("metric", step, key, value, time_ms):
                    rows.append(MetricRow(int(step), key, float(value), int(time_ms)))
                case ("tag", _, key, value, _):
                    state["tags"][key] = json.loads(value)
                case ("status", _, _, value, time_ms):
                    state |= {"status": value, "ended_ms": int(time_ms)}
                case found if found:
                    raise ValueError
        except ValueError:
            raise StageError(
                f"{path}, line {number}: found {','.join(line)[:80]!r}, expected "
                f"{','.join(COLUMNS)}; move {path.parent} away, or remove the line"
            ) from None
    return rows, state


def _convert_former_files(folder: Path) -> None:
    """Convert pictures/, and files/ with references, which earlier versions wrote."""
    for note in (folder / "files").glob("*.json"):
        logger.warning(f"{note} was written by an earlier version; MLflow does not get its files")
        note.unlink()
    if (folder / "pictures").is_dir():
        shutil.copytree(folder / "pictures", folder / "files", dirs_exist_ok=True)
        shutil.rmtree(folder / "pictures")
