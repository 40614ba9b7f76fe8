"""MLflow, and the only place that talks to it: runs, pictures and registered models."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from tasks.console import StageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

EXPERIMENT = "fullscale"
CHALLENGER, CHAMPION = "challenger", "champion"
WEIGHTS_TAG = "fullscale.weights_sha256"
RESULTS_TAG = "fullscale.results_sha256"


@dataclass(frozen=True)
class Store:
    """Where runs and models are kept.

    Attributes:
        uri: an MLflow tracking URI.
        artifact_location: folder URI for new experiments; None leaves it to the server.
    """

    uri: str
    artifact_location: str | None = None


def default_store(root: Path) -> Store:
    """The store named by MLFLOW_TRACKING_URI, else SQLite in `root`/mlruns."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return Store(uri)
    folder = root.resolve() / "mlruns"
    folder.mkdir(exist_ok=True)
    return Store(f"sqlite:///{folder / 'mlflow.db'}", (folder / "artifacts").as_uri())


def connect(store: Store) -> tuple[MlflowClient, str]:
    """Open the store, creating its database and experiment the first time.

    Returns:
        A client, and the id of the experiment.

    Raises:
        StageError: the store does not answer.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow
    from mlflow.exceptions import MlflowException

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    mlflow.set_tracking_uri(store.uri)
    client = mlflow.MlflowClient(store.uri)
    try:
        with _first_start_lock(store):
            if client.get_experiment_by_name(EXPERIMENT) is None:
                client.create_experiment(EXPERIMENT, artifact_location=store.artifact_location)
            experiment_id = mlflow.set_experiment(EXPERIMENT).experiment_id
    except MlflowException as error:
        reason = " ".join(str(error).split())[:200]
        raise StageError(
            f"the MLflow store {store.uri} does not answer ({reason}); start the server, or "
            "unset MLFLOW_TRACKING_URI to use the local store"
        ) from None
    return client, str(experiment_id)


@contextmanager
def _first_start_lock(store: Store) -> Iterator[None]:
    """Keep two first starts from racing to create one SQLite database."""
    if not store.uri.startswith("sqlite:///"):
        yield
        return
    with FileLock(store.uri.removeprefix("sqlite:///") + ".lock"):
        yield


class TrainingRun:
    """One training as MLflow sees it while it happens."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client = client
        self.run_id = run_id

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Add values at a step; those that are not a number are left out."""
        from mlflow.entities import Metric

        now_ms = time.time_ns() // 1_000_000
        values = [
            Metric(key, value, now_ms, step)
            for key, value in metrics.items()
            if not math.isnan(value)
        ]
        self._client.log_batch(self.run_id, metrics=values)

    def log_picture(self, figure: Figure, path: str) -> None:
        """Store a picture under an artifact path that ends in .png."""
        self._client.log_figure(self.run_id, figure, path)

    def log_files(self, folder: Path, path: str) -> None:
        """Store a folder's files under an artifact path."""
        self._client.log_artifacts(self.run_id, str(folder), path)

    def set_tag(self, key: str, value: str) -> None:
        """Describe the run."""
        self._client.set_tag(self.run_id, key, value)


@contextmanager
def training_run(
    store: Store,
    name: str,
    parameters: Mapping[str, Any],
    tags: Mapping[str, str],
    data_version: str,
) -> Iterator[TrainingRun]:
    """A run that ends as FINISHED, as FAILED on an error, or as KILLED on an interruption.

    Args:
        store: where it is kept.
        name: the run's name, a network's.
        parameters: flat mapping of what was set.
        tags: what describes the run.
        data_version: MD5 of the annotated scans, shown as the run's data set.
    """
    client, experiment_id = connect(store)
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag, Param

    run = client.create_run(experiment_id, run_name=name, tags=dict(tags))
    run_id = run.info.run_id
    client.log_batch(run_id, params=[Param(key, str(value)) for key, value in parameters.items()])
    dataset = MetaDataset(  # type: ignore[abstract]
        CodeDatasetSource(tags={"dvc": "data.dvc"}), name="data.dvc", digest=data_version[:36]
    )
    entry = DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", "training")])
    client.log_inputs(run_id, datasets=[entry])
    try:
        yield TrainingRun(client, run_id)
    except KeyboardInterrupt:
        client.set_terminated(run_id, "KILLED")
        raise
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")


def find_training_run(store: Store, weights_sha256: str) -> str | None:
    """The id of the newest run that made these weights, if this store knows one."""
    client, experiment_id = connect(store)
    runs = client.search_runs(
        [experiment_id],
        filter_string=f"tags.`{WEIGHTS_TAG}` = '{weights_sha256}' and status = 'FINISHED'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    return str(runs[0].info.run_id) if runs else None


def add_test_results(store: Store, run_id: str, summary: Mapping[str, Any], folder: Path) -> None:
    """Add test metrics, tables and pictures to a run; the same results are added once."""
    client, _ = connect(store)
    text = json.dumps(dict(summary), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    if client.get_run(run_id).data.tags.get(RESULTS_TAG) == digest:
        return
    run = TrainingRun(client, run_id)
    run.log_metrics(
        {key: value for key, value in summary.items() if isinstance(value, int | float)}, step=0
    )
    run.log_files(folder, "test")
    run.set_tag("fullscale.test_set", str(summary["test_set"]))
    run.set_tag(RESULTS_TAG, digest)


def find_version(store: Store, model_name: str, weights_sha256: str) -> str | None:
    """The newest registered version with these weights, if there is one."""
    client, _ = connect(store)
    versions = client.search_model_versions(
        f"name = '{model_name}' and tag.`{WEIGHTS_TAG}` = '{weights_sha256}'"
    )
    return max((str(found.version) for found in versions), key=int, default=None)


def list_aliases(store: Store, model_name: str, version: str) -> tuple[str, ...]:
    """The aliases that point to a version."""
    client, _ = connect(store)
    aliases = client.get_registered_model(model_name).aliases
    return tuple(sorted(alias for alias, target in aliases.items() if str(target) == version))


def announce(store: Store, model_name: str, version: str, tags: Mapping[str, str]) -> None:
    """Describe a version that passed the gate and make it the challenger.

    It becomes the champion, too, where no version is.
    """
    client, _ = connect(store)
    for key, value in tags.items():
        client.set_model_version_tag(model_name, version, key, value)
    client.set_registered_model_alias(model_name, CHALLENGER, version)
    if find_alias(store, model_name, CHAMPION) is None:
        client.set_registered_model_alias(model_name, CHAMPION, version)


def find_alias(store: Store, model_name: str, alias: str) -> ModelVersion | None:
    """The version an alias points to, if there is one."""
    from mlflow.exceptions import MlflowException

    client, _ = connect(store)
    try:
        return client.get_model_version_by_alias(model_name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def download_model(store: Store, version: ModelVersion, folder: Path) -> Path:
    """Fetch the trained network of a registered version into `folder`; returns its path."""
    connect(store)
    from mlflow.artifacts import download_artifacts

    uri = f"models:/{version.name}/{version.version}"
    return Path(download_artifacts(artifact_uri=uri, dst_path=str(folder))) / "artifacts"


def log_model(
    store: Store,
    run_id: str,
    model_name: str,
    trained_files: Mapping[str, Path],
    code: tuple[Path, ...],
    model_file: Path,
    model_config: Mapping[str, Any],
    pip_requirements: list[str],
) -> str:
    """Log a model to a run and register it; returns the new version.

    Args:
        store: where runs and models are kept.
        run_id: the run that trained it.
        model_name: the registered model's name.
        trained_files: artifact name to file.
        code: packages the model needs.
        model_file: the Python file that defines the model.
        model_config: settings the model is loaded with.
        pip_requirements: pinned libraries the model needs.
    """
    connect(store)
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    inputs = Schema([ColSpec("string", "scan")])
    outputs = Schema([ColSpec("string", "mask"), ColSpec("string", "statistics")])
    with mlflow.start_run(run_id=run_id):
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(model_file),
            code_paths=[str(path) for path in code],
            artifacts={name: str(path) for name, path in trained_files.items()},
            model_config=dict(model_config),
            signature=ModelSignature(inputs, outputs),
            pip_requirements=pip_requirements,
            registered_model_name=model_name,
        )
    return str(info.registered_model_version)
