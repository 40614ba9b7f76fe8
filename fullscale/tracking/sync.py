"""Send the record of a run to its MLflow store."""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from fullscale.runtime.errors import shorten
from fullscale.tracking.errors import translate_mlflow_errors
from fullscale.tracking.run_record import RUNNING, MetricRow, RunDescription, RunRecord
from fullscale.tracking.store import Store, connect

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

KEY_TAG = "fullscale.journal"
MAX_METRICS, MAX_PARAMETERS = 1000, 100  # MLflow's limits for one request
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


def sync_run(record: RunRecord) -> int:
    """Send what the run in the store does not have yet; start a run where the store has none.

    What the store refuses is left out with a warning. What it confirms is noted in the record.

    Returns:
        The number of metric values sent.

    Raises:
        UnreachableError: the store does not answer; a later call sends the rest.
    """
    num_values = 0
    with translate_mlflow_errors(record.run.store_uri):
        client = _find_or_start(record)
        run_id = record.run_id
        while rows := record.unsent_rows()[:MAX_METRICS]:
            _send_rows(client, run_id, rows)
            record.mark_sent(num_rows=len(rows))
            num_values += len(rows)
        if record.sent.state != (state := record.state()):
            if reason := _refusal(client, run_id, partial(_send_state, client, run_id, *state)):
                logger.warning(f"MLflow refuses the tags ({reason}); they are left out")
            record.mark_sent(state=state)
        for path, file, time_ns in record.unsent_files():
            folder = posixpath.dirname(path) or None
            request = partial(client.log_artifact, run_id, str(file), folder)
            if reason := _refusal(client, run_id, request):
                logger.warning(f"MLflow refuses {path} ({reason}); it is left out")
            record.mark_sent(files={path: time_ns})
    return num_values


def _send_rows(client: MlflowClient, run_id: str, rows: list[MetricRow]) -> None:
    """Send values; halve them until those that the store refuses are alone."""
    from mlflow.entities import Metric

    metrics = [Metric(row.key, row.value, row.timestamp_ms, row.step) for row in rows]
    request = partial(client.log_batch, run_id, metrics=metrics, synchronous=True)
    if reason := _refusal(client, run_id, request):
        if len(rows) == 1:
            logger.warning(f"MLflow refuses metric {rows[0].key} ({reason}); it is left out")
            return
        half = len(rows) // 2
        _send_rows(client, run_id, rows[:half])
        _send_rows(client, run_id, rows[half:])


def _send_state(
    client: MlflowClient, run_id: str, tags: dict[str, str], status: str, ended_ms: int | None
) -> None:
    from mlflow.entities import RunTag

    if status == RUNNING:
        client.update_run(run_id, status=RUNNING)
    else:
        client.set_terminated(run_id, status, end_time=ended_ms)
    client.log_batch(run_id, tags=[RunTag(*tag) for tag in tags.items()], synchronous=True)


def _refusal(client: MlflowClient, run_id: str, request: Callable[[], object]) -> str | None:
    """Make a request; return why the store refuses its content, None if it does not."""
    from mlflow.exceptions import MlflowException

    try:
        request()
    except MlflowException as error:
        # A deleted run refuses everything. Nothing is left out then: a new run gets all of it.
        if error.error_code not in REFUSALS or not _is_active(client, run_id):
            raise
        return shorten(error)
    return None


def _is_active(client: MlflowClient, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def _find_or_start(record: RunRecord) -> MlflowClient:
    """Open the store; start the run if it is not there."""
    run = record.run
    client, experiment_id = connect(Store(run.store_uri, run.artifact_location))
    if run.run_id is None or not _is_active(client, run.run_id):
        record.update(run_id=_start(client, experiment_id, run))
        if run.run_id is not None:
            logger.warning(
                f"MLflow at {run.store_uri} no longer has run {run.run_id}; all its values are "
                f"sent to a new one, {record.run_id}"
            )
    return client


def _start(client: MlflowClient, experiment_id: str, run: RunDescription) -> str:
    """Start the run, or find it where an earlier call was killed before it noted the id."""
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag, Param

    known = client.search_runs([experiment_id], f"tags.`{KEY_TAG}` = '{run.key}'", max_results=1)
    tags = {**run.tags, KEY_TAG: run.key}
    found = known[0] if known else client.create_run(experiment_id, run.started_ms, tags, run.name)
    run_id = str(found.info.run_id)
    parameters = [Param(key, str(value)) for key, value in run.parameters.items()]
    for start in range(0, len(parameters), MAX_PARAMETERS):
        part = parameters[start : start + MAX_PARAMETERS]
        client.log_batch(run_id, params=part, synchronous=True)
    dataset = MetaDataset(  # type: ignore[abstract]
        CodeDatasetSource(tags={"dvc": "data.dvc"}), name="data.dvc", digest=run.data_version[:36]
    )
    entry = DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", "training")])
    client.log_inputs(run_id, datasets=[entry])
    return run_id
