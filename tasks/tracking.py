"""Runs of trainings in MLflow, through outages of its server."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from tasks.console import say
from tasks.delivery import UnreachableError, shorten
from tasks.journal import Journal, RunDescription, list_journals, now_ms
from tasks.run_folder import FolderInUseError, begin, go_on, hold, send_left
from tasks.sender import Sender
from tasks.system_metrics import SystemMetrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

EXPERIMENT = "fullscale"
WEIGHTS_TAG = "fullscale.weights_sha256"
DRAIN_TIMEOUT_S = 60.0
INTERRUPTED_DRAIN_TIMEOUT_S = 5.0  # who interrupts waits for the end
SIGNAL_CODES = (129, 130, 143)
# MLflow would ask for minutes before it says that a server is gone.
REQUEST_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


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
        UnreachableError: the store does not answer, or somebody deleted the experiment in it.
    """
    for name, value in REQUEST_SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # tells of every retry
    client = MlflowClient(store.uri)
    try:
        with _first_start_lock(store):
            experiment = client.get_experiment_by_name(EXPERIMENT)
            if experiment is None:
                made = client.create_experiment(EXPERIMENT, store.artifact_location)
                experiment = client.get_experiment(made)
    except MlflowException as error:
        raise UnreachableError(store.uri, shorten(error)) from None
    if experiment.lifecycle_stage != "active":
        raise UnreachableError(store.uri, f"experiment {EXPERIMENT} is deleted: restore it there")
    return client, str(experiment.experiment_id)


@contextmanager
def spoken_to(store: Store) -> Iterator[None]:
    """Have MLflow's functions that take no client use this store, and then what they used before.

    MLflow hands the address on to programs started meanwhile, by MLFLOW_TRACKING_URI.
    """
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(store.uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)  # type: ignore[arg-type]  # None unsets it


def open_run(run: RunDescription) -> tuple[MlflowClient, str]:
    """Open the store that a run is tracked in; as `connect`."""
    return connect(Store(run.store_uri, run.artifact_location))


@contextmanager
def _first_start_lock(store: Store) -> Iterator[None]:
    """Keep two first starts from racing to create one SQLite database."""
    if not store.uri.startswith("sqlite:///"):
        yield
        return
    with FileLock(store.uri.removeprefix("sqlite:///") + ".lock"):
        yield


class TrainingRun:
    """One training as MLflow sees it while it happens. No call waits for the server."""

    def __init__(self, journal: Journal, sender: Sender, system: SystemMetrics) -> None:
        self._journal = journal
        self._sender = sender
        self._system = system

    @property
    def run_id(self) -> str:
        """MLflow's id; another one once a store that lost the run answers again."""
        return str(self._journal.run.run_id)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Add values at a step, and how busy the machine was since the last time.

        Left out are values that are not a number, and those that the run has at this step, because
        a training that goes on repeats the epochs after its last checkpoint.
        """
        self._journal.add_metrics({**metrics, **self._system.averages()}, step, now_ms())
        self._sender.wake()

    def log_picture(self, figure: Figure, path: str) -> None:
        """Store a picture under an artifact path that ends in .png."""
        self._journal.outbox.add_picture(figure, path)
        self._sender.wake()

    def log_files(self, folder: Path, path: str) -> None:
        """Store a folder's files under an artifact path.

        They are sent from where they are: one that changes or goes before the server could have it
        is left out, and the log says so.
        """
        self._journal.outbox.add_files(folder, path)
        self._sender.wake()

    def set_tag(self, key: str, value: str) -> None:
        """Describe the run."""
        self._journal.add_tag(key, value, now_ms())
        self._sender.wake()


@contextmanager
def training_run(
    store: Store,
    name: str,
    parameters: Mapping[str, Any],
    tags: Mapping[str, str],
    data_version: str,
    folder: Path,
    *,
    resume: bool = False,
) -> Iterator[TrainingRun]:
    """A run that ends as FINISHED, as FAILED on an error, or as KILLED on an interruption.

    What it is told is written to `folder` first and sent from there in the background, so the
    training neither waits for the server nor loses anything to its outage. What could not be sent
    by the end stays there, and `send_leftovers` or the next training sends it.

    Args:
        store: where it is kept.
        name: the run's name, a network's.
        parameters: flat mapping of what was set.
        tags: what describes the run.
        data_version: MD5 of the annotated scans, shown as the run's data set.
        folder: this network's own, for what is not sent yet.
        resume: go on with the run that `folder` holds, whether the store answers or not. Where it
            holds none, or the store no longer knows it, a new run begins with all that was logged.

    Raises:
        StageError: another process uses `folder`, or a new run is needed and the store does not
            answer.
    """
    description = RunDescription(
        key=f"{now_ms()}-{secrets.token_hex(4)}",
        store_uri=store.uri,
        artifact_location=store.artifact_location,
        name=name,
        parameters={key: str(value) for key, value in parameters.items()},
        tags=dict(tags),
        data_version=data_version,
        started_ms=now_ms(),
    )
    with hold(folder):
        recorded = list_journals(folder)[-1:] if resume else []
        journal, remote = (
            go_on(recorded[0], description, open_run)
            if recorded
            else begin(folder, description, open_run)
        )
        sender = Sender(journal, remote)
        status, timeout_s = "FINISHED", DRAIN_TIMEOUT_S
        try:
            with SystemMetrics() as system:
                yield TrainingRun(journal, sender, system)
        except BaseException as error:
            if _is_interruption(error):
                status, timeout_s = "KILLED", INTERRUPTED_DRAIN_TIMEOUT_S
            else:
                status = "FAILED"
            raise
        finally:
            journal.add_status(status, now_ms())
            sender.close(timeout_s)


def send_leftovers(store: Store, folder: Path) -> None:
    """Send what trainings left in `folder` because the server did not answer to the end.

    A run whose training was killed outright is marked as KILLED. A training that is using the
    folder now is left alone. What still cannot be sent stays, and the log says where.

    Args:
        store: the one in use now. Values of a run that was tracked in another one go to that.
        folder: as given to `training_run`; it need not exist.
    """
    if not folder.is_dir():
        return
    try:
        with hold(folder):
            for journal in list_journals(folder):
                if journal.run.store_uri != store.uri and not journal.is_sent():
                    say(
                        f"run {journal.run.run_id} was tracked at {journal.run.store_uri}, not at "
                        f"{store.uri}, and what {journal.folder} keeps of it goes there"
                    )
                send_left(journal, open_run)
    except FolderInUseError:
        say(f"a training is using {folder}; it sends what is kept there itself")


def _is_interruption(error: BaseException) -> bool:
    """Whether a signal ended the training: a hang-up, Ctrl-C or a request to terminate."""
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, SystemExit) and error.code in SIGNAL_CODES
    )
