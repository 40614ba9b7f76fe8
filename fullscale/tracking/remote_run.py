"""The MLflow end of a journal: one run in the store, and what is sent to it."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fullscale.tracking.errors import LostRunError, RefusedError, UnreachableError, shorten
from fullscale.tracking.journal import RUNNING, Journal, Row, RunDescription

if TYPE_CHECKING:
    from mlflow import MlflowClient

OpenStore = Callable[[RunDescription], "tuple[MlflowClient, str]"]
KEY_TAG = "fullscale.journal"
MAX_METRICS, MAX_TEXTS = 1000, 100  # what MLflow takes in one request
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
LOST = "RESOURCE_DOES_NOT_EXIST"


@contextmanager
def told_apart(uri: str) -> Iterator[None]:
    """Turn whatever goes wrong on the way to a store into one of this module's errors.

    Everything but a refusal counts as no answer: what stands between here and a store fails in
    many ways, and none of them is a reason to give up what is to be sent.

    Raises:
        RefusedError: asking again is useless.
        LostRunError: the store has no such run.
        UnreachableError: asking again may help.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except UnreachableError:
        raise
    except MlflowException as error:
        reason = shorten(error)
        if error.error_code in REFUSALS:
            raise RefusedError(reason) from None
        if error.error_code == LOST:
            raise LostRunError(reason) from None
        raise UnreachableError(uri, reason) from None
    except Exception as error:
        raise UnreachableError(uri, f"{type(error).__name__}: {shorten(error)}") from error


class RemoteRun:
    """The run that a journal belongs to, as its store has it.

    Args:
        journal: what is to be sent.
        open_store: opens the store a run is tracked in, and gives a client and the experiment's id.
    """

    def __init__(self, journal: Journal, open_store: OpenStore) -> None:
        self._journal = journal
        self._open_store = open_store
        self._client: MlflowClient | None = None

    @property
    def is_linked(self) -> bool:
        """Whether the run is known to be in the store."""
        return self._client is not None

    def unlink(self) -> None:
        """Look for the run again: what answers after an outage may be another store."""
        self._client = None

    def link(self) -> bool:
        """Find the run in its store, or start it there.

        Returns:
            Whether it had to be started. All rows of the journal then count as unsent.

        Raises:
            UnreachableError: the store does not answer.
        """
        run = self._journal.run
        try:
            with told_apart(run.store_uri):
                client, experiment_id = self._open_store(run)
                started = run.run_id is None or not _is_active(client, run.run_id)
                if started:
                    run_id = _start(client, experiment_id, run)
                    self._journal.describe(replace(run, run_id=run_id))
        except (RefusedError, LostRunError) as error:
            raise UnreachableError(run.store_uri, str(error)) from None
        self._client = client
        return started

    def send_rows(self, rows: list[Row]) -> None:
        """Send rows of one kind; what the store has already is not doubled.

        Raises:
            RefusedError, LostRunError, UnreachableError: as `told_apart`.
        """
        from mlflow.entities import Metric, RunTag

        with self._asking() as (client, run_id):
            if rows[0].kind == "status":
                _set_status(client, run_id, rows[-1])
            else:
                client.log_batch(
                    run_id,
                    metrics=[
                        Metric(row.key, float(row.value), row.timestamp_ms, row.step)
                        for row in rows
                        if row.kind == "metric"
                    ],
                    tags=[RunTag(row.key, row.value) for row in rows if row.kind == "tag"],
                    synchronous=True,
                )

    def send_file(self, file: Path, path: str) -> None:
        """Store a file under an artifact path, which ends in the file's own name.

        Raises:
            RefusedError, LostRunError, UnreachableError: as `told_apart`.
        """
        with self._asking() as (client, run_id):
            client.log_artifact(run_id, str(file), posixpath.dirname(path) or None)

    @contextmanager
    def _asking(self) -> Iterator[tuple[MlflowClient, str]]:
        client, uri, run_id = self._client, self._journal.run.store_uri, self._journal.run.run_id
        if client is None or run_id is None:
            raise RuntimeError("link() comes before anything is sent")
        try:
            with told_apart(uri):
                yield client, run_id
        except RefusedError:
            # A deleted run refuses everything; that is no reason to leave anything out.
            with told_apart(uri):
                is_active = _is_active(client, run_id)
            if not is_active:
                raise LostRunError(f"run {run_id} is deleted") from None
            raise


def _set_status(client: MlflowClient, run_id: str, row: Row) -> None:
    if row.value == RUNNING:
        client.update_run(run_id, status=RUNNING)
    else:
        client.set_terminated(run_id, row.value, end_time=row.timestamp_ms)


def _is_active(client: MlflowClient, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code == LOST:
            return False
        raise


def _start(client: MlflowClient, experiment_id: str, run: RunDescription) -> str:
    """Start the run, or find it where an earlier attempt came as far as that."""
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag, Param

    known = client.search_runs(
        [experiment_id], filter_string=f"tags.`{KEY_TAG}` = '{run.key}'", max_results=1
    )
    found = (
        known[0]
        if known
        else client.create_run(
            experiment_id,
            start_time=run.started_ms,
            tags={**run.tags, KEY_TAG: run.key},
            run_name=run.name,
        )
    )
    run_id = str(found.info.run_id)
    parameters = [Param(key, value) for key, value in run.parameters.items()]
    for start in range(0, len(parameters), MAX_TEXTS):
        part = parameters[start : start + MAX_TEXTS]
        client.log_batch(run_id, params=part, synchronous=True)
    dataset = MetaDataset(  # type: ignore[abstract]
        CodeDatasetSource(tags={"dvc": "data.dvc"}), name="data.dvc", digest=run.data_version[:36]
    )
    entry = DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", "training")])
    client.log_inputs(run_id, datasets=[entry])
    return run_id
