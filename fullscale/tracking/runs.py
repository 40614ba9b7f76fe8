"""Runs of trainings in MLflow, through outages of its server."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fullscale.runtime.locks import LockedError, acquire_lock
from fullscale.tracking.errors import UnreachableError
from fullscale.tracking.run_record import RUNNING, RunDescription, RunRecord, list_records, now_ms
from fullscale.tracking.store import Store, connect
from fullscale.tracking.sync import sync_run
from fullscale.tracking.system_metrics import SystemMetrics

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"
RETRY_PAUSE_S, LAST_RETRY_PAUSE_S = 5.0, 1.0
CLOSING_TIMEOUT_S = 60.0
INTERRUPTED_CLOSING_TIMEOUT_S = 5.0  # kept short: the user is waiting
SIGNAL_CODES = (129, 130, 143)  # 128 + SIGHUP, SIGINT, SIGTERM


@contextmanager
def training_run(
    description: RunDescription, folder: Path, *, resume: bool = False
) -> Iterator[RunRecord]:
    """Track a run that ends as FINISHED, as FAILED on an error, or as KILLED on an interruption.

    What is logged is recorded in `folder`, and sent by a thread: no call waits for the server. What
    the store does not have at the end stays in `folder`; `send_leftovers` or the next training
    sends it.

    Args:
        description: of a new run. A resumed one takes over the store and the tags.
        folder: for the records of this network's runs.
        resume: continue the newest run in `folder`, if there is one, whether its store answers or
            not. Where the store no longer knows the run, a new one gets all recorded values.

    Raises:
        StageError: another process uses `folder`, or a run must be started and the store does not
            answer.
    """
    with acquire_lock(folder / LOCK_NAME, wait=False), SystemMetrics() as system:
        record = _open_record(folder, description, resume=resume)
        record.measure = system.averages
        sync = BackgroundSync(record)
        status, timeout_s = "FINISHED", CLOSING_TIMEOUT_S
        try:
            yield record
        except BaseException as error:
            status = "FAILED"
            if isinstance(error, KeyboardInterrupt) or (
                isinstance(error, SystemExit) and error.code in SIGNAL_CODES
            ):
                status, timeout_s = "KILLED", INTERRUPTED_CLOSING_TIMEOUT_S
            raise
        finally:
            record.update(status=status, ended_ms=now_ms())
            sync.close(timeout_s)


def write_finished_run(
    description: RunDescription,
    folder: Path,
    epochs: Iterable[Mapping[str, float]],
    files: Path | None = None,
) -> str:
    """Write the finished run of something that its store never saw; return the run's id.

    Args:
        description: of the run.
        folder: for its record.
        epochs: metrics of each epoch, with its number under the key epoch.
        files: folder of the trained network, logged as trained/; None logs no files.

    Raises:
        StageError: another process uses `folder`, or the store does not answer.
    """
    with acquire_lock(folder / LOCK_NAME, wait=False):
        record = _open_record(folder, description)
        for metrics in epochs:
            values = {key: value for key, value in metrics.items() if key != "epoch"}
            record.log_metrics(values, step=int(metrics["epoch"]))
        if files is not None:
            record.log_files(files, "trained")
        record.update(status="FINISHED", ended_ms=now_ms())
        sync_run(record)
        return record.run_id


def send_leftovers(folder: Path) -> None:
    """Send what earlier trainings left in `folder` because the store did not answer to the end.

    The run of a training that was killed outright is marked as KILLED. While another process trains
    in the folder, nothing is done. What still cannot be sent stays, with a warning.

    Args:
        folder: as given to `training_run`; it need not exist.
    """
    if not folder.is_dir():
        return
    try:
        with acquire_lock(folder / LOCK_NAME, wait=False):
            for record in list_records(folder):
                _finish(record)
    except LockedError:
        logger.info(f"a training is using {folder}; it sends what is kept there itself")


def _open_record(folder: Path, run: RunDescription, *, resume: bool = False) -> RunRecord:
    """Start a run in its store, or resume the newest one in the folder."""
    records = list_records(folder)
    record = records[-1] if resume and records else None
    if record is None or record.run.store_uri != run.store_uri:
        connect(Store(run.store_uri, run.artifact_location))  # fails before anything is changed
    if record is None:
        for earlier in records:
            _finish(earlier)
            if earlier.is_sent():
                shutil.rmtree(earlier.folder)
        record = RunRecord.create(folder, run)
    else:
        record.update(
            store_uri=run.store_uri,
            artifact_location=run.artifact_location,
            run_id=record.run.run_id if record.run.store_uri == run.store_uri else None,
            tags={**record.run.tags, **run.tags},
            status=RUNNING,
        )
    if record.run.run_id is None:
        sync_run(record)
    return record


def _finish(record: RunRecord) -> None:
    """Send the rest of a run whose training is over."""
    if record.run.status == RUNNING:
        last_ms = record.rows[-1].timestamp_ms if record.rows else record.run.started_ms
        record.update(status="KILLED", ended_ms=last_ms)
    if record.is_sent():
        return
    try:
        num_values = sync_run(record)
    except UnreachableError as error:
        logger.warning(str(error))
        logger.warning(_describe_unsent(record))
    else:
        logger.info(
            f"MLflow at {record.run.store_uri} now has the {num_values} values of run "
            f"{record.run_id} that were kept in {record.folder}"
        )


def _describe_unsent(record: RunRecord) -> str:
    num_values, num_files = len(record.unsent_rows()), len(list(record.unsent_files()))
    return (
        f"{num_values} values and {num_files} files for MLflow at {record.run.store_uri} are kept "
        f"in {record.folder}; the next training or registration sends them"
    )


class BackgroundSync:
    """A thread that calls `sync_run` when the record has changed, and again after a failure."""

    def __init__(self, record: RunRecord) -> None:
        self._record = record
        self._closing = threading.Event()
        self._deadline_s = float("inf")
        self._thread = threading.Thread(target=self._work, name="mlflow-sync", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Send the rest for at most this long, then release the record; log what remains."""
        self._deadline_s = time.monotonic() + timeout_s
        self._closing.set()
        self._record.changed.set()
        self._thread.join(timeout_s)
        self._record.release()
        if not self._record.is_sent():
            logger.warning(_describe_unsent(self._record))

    def _is_over(self) -> bool:
        return time.monotonic() > self._deadline_s

    def _work(self) -> None:
        record, uri, is_away = self._record, self._record.run.store_uri, False
        while not self._is_over():
            record.changed.wait()
            record.changed.clear()
            is_last = self._closing.is_set()  # read before the sync, which then sends everything
            try:
                num_values = sync_run(record)
            except UnreachableError as error:
                if self._is_over():  # the record is released
                    return
                if not is_away:
                    logger.warning(
                        f"MLflow at {uri} does not answer ({error.reason}); training continues, "
                        f"metrics are kept in {record.path} and sent when it is back"
                    )
                is_away = True
                record.changed.set()
                time.sleep(LAST_RETRY_PAUSE_S) if is_last else self._closing.wait(RETRY_PAUSE_S)
            else:
                if is_away:
                    logger.info(f"MLflow at {uri} is back; {num_values} values were sent")
                is_away = False
                if is_last:
                    return
