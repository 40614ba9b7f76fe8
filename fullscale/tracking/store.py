"""The MLflow store in use, and a client for it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from fullscale.tracking.errors import UnreachableError, translate_mlflow_errors
from fullscale.tracking.locations import (
    PORTABLE_LOCATION,
    SQLITE,
    database_file,
    make_portable,
    own_database,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

EXPERIMENT = "fullscale"
WEIGHTS_TAG = "fullscale.weights_sha256"
NETWORK_TAG, SEED_TAG = "fullscale.network", "fullscale.seed"
COMMIT_TAG, DATA_VERSION_TAG = "fullscale.git_commit", "fullscale.data_version"
MEMBERS_TAG = "fullscale.members"
"""Seeds of the trainings that segment together in a run or a registered version."""
# With MLflow's defaults a request to a server that is gone takes minutes to fail.
REQUEST_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


@dataclass(frozen=True)
class Store:
    """An MLflow store of runs and models.

    Attributes:
        uri: an MLflow tracking URI.
        artifact_location: of new experiments, see `fullscale.tracking.locations`; None
            leaves it to the server.
    """

    uri: str
    artifact_location: str | None = None


def default_store(root: Path) -> Store:
    """Return the store named by MLFLOW_TRACKING_URI, else SQLite in `root`/mlruns."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        own = own_database(root)
        own.parent.mkdir(exist_ok=True)
        uri = f"{SQLITE}{own}"
    database = database_file(uri)
    return Store(uri) if database is None else sqlite_store(database)


def has_store(root: Path) -> bool:
    """Return whether there is a store to look into; MLflow would create one as an empty database.

    A server named by MLFLOW_TRACKING_URI counts, whether it answers or not.
    """
    return bool(os.environ.get("MLFLOW_TRACKING_URI")) or own_database(root).is_file()


def sqlite_store(database: Path) -> Store:
    """Return the store of a SQLite database, whose files are in artifacts/ beside it."""
    return Store(f"{SQLITE}{database.resolve()}", PORTABLE_LOCATION)


def connect(store: Store) -> tuple[MlflowClient, str]:
    """Open the store, creating its database and experiment the first time.

    Returns:
        A client, and the id of the experiment.

    Raises:
        UnreachableError: the store does not answer, or its experiment is deleted.
    """
    for name, value in REQUEST_SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # logs every retry
    with translate_mlflow_errors(store.uri), _first_start_lock(store) as database:
        client = MlflowClient(store.uri)  # makes the tables of a new database
        if database is not None:
            make_portable(database, EXPERIMENT, os.environ.get("MLFLOW_ARTIFACTS_DESTINATION"))
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            made = client.create_experiment(EXPERIMENT, store.artifact_location)
            experiment = client.get_experiment(made)
    if experiment.lifecycle_stage != "active":
        raise UnreachableError(store.uri, f"experiment {EXPERIMENT} is deleted: restore it there")
    if store.artifact_location == PORTABLE_LOCATION:
        _warn_of_location(store.uri, str(experiment.artifact_location))
    return client, str(experiment.experiment_id)


@cache
def _warn_of_location(uri: str, location: str) -> None:
    """Log once if the files of a SQLite store are not in the folder beside it."""
    if not location.startswith(PORTABLE_LOCATION):
        logger.warning(
            f"warning: {uri} keeps the files of runs and models in {location}, not beside the "
            "database: they do not move with it, and a copy of it shares them"
        )


@contextmanager
def use_tracking_uri(store: Store) -> Iterator[None]:
    """Make this store the default of MLflow's functions that take no client; undo it at the end.

    Meanwhile MLflow passes the address to child processes, in MLFLOW_TRACKING_URI.
    """
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")
    # MLflow changes the variable only where the address differs from the one it remembers, so it
    # has to forget that first.
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    mlflow.set_tracking_uri(store.uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


@contextmanager
def _first_start_lock(store: Store) -> Iterator[Path | None]:
    """Keep two first starts from racing to create one SQLite database; yield its file."""
    database = database_file(store.uri)
    if database is None:
        yield None
        return
    with FileLock(f"{database}.lock"):
        yield database
