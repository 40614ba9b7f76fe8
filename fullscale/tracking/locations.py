"""Places of MLflow's database and files, written down so that a project can be moved or copied.

The locations in MLflow's database begin with `mlflow-artifacts:/`. A server looks for them at its
artifacts destination; without one they are in the folder artifacts/ beside the SQLite database.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

SCHEME = "mlflow-artifacts:"
PORTABLE_LOCATION = f"{SCHEME}/"
SQLITE = "sqlite:///"
FORMER_FOLDER = "/mlruns/artifacts"
_FORMER_COLUMNS = (
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
    ("model_versions", "source"),
)


def database_file(uri: str) -> Path | None:
    """Return the file of a SQLite store, None for another store."""
    return Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else None


def to_portable_uri(uri: str, folder: Path) -> str:
    """Return the URI of a store for a file in `folder`: relative if both are in one project.

    Args:
        uri: a database's path in it is absolute.
        folder: below .cache of a project, or of a worktree below the project's .cache.
    """
    database, folder = database_file(uri), folder.resolve()
    projects = [parent.parent for parent in folder.parents if parent.name == ".cache"]
    if database is None or not any(database.is_relative_to(project) for project in projects):
        return uri
    return f"{SQLITE}{os.path.relpath(database, folder)}"


def from_portable_uri(uri: str, folder: Path) -> str:
    """Return the URI of a store that a file in `folder` names; undoes `to_portable_uri`."""
    database = database_file(uri)
    if database is None or database.parts[0] != os.pardir:
        return uri
    return f"{SQLITE}{os.path.normpath(folder.resolve() / database)}"


def own_database(root: Path) -> Path:
    """Return the SQLite database of a project's own store."""
    return root / "mlruns/mlflow.db"


def artifact_folder(database: Path) -> Path:
    """Return the folder that portable locations in a SQLite database stand for."""
    return database.resolve().parent / "artifacts"


def open_artifacts(
    artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None
) -> ArtifactRepository:
    """Return MLflow's access to a portable location.

    MLflow finds this function by the entry point in pyproject.toml.

    Args:
        artifact_uri: begins with `mlflow-artifacts:`.
        tracking_uri: of the store; None means MLflow's current one.
        registry_uri: passed on.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository
    from mlflow.tracking import get_tracking_uri

    store = tracking_uri or get_tracking_uri()
    database = database_file(store)
    if database is None:
        return MlflowArtifactsRepository(artifact_uri, store, registry_uri)
    path = artifact_uri.removeprefix(SCHEME).strip("/")
    # The variable of MLflow's server, so that both look in the same place.
    given = os.environ.get("MLFLOW_ARTIFACTS_DESTINATION") or artifact_folder(database).as_uri()
    place = f"{given.rstrip('/')}/{path}".rstrip("/")
    return get_artifact_repository(place, tracking_uri=store, registry_uri=registry_uri)


def make_portable(database: Path, experiment: str, destination: str | None) -> None:
    """Rewrite the locations that earlier versions wrote as absolute paths of the project.

    Locations elsewhere, as in a bucket, stay. Killed at any moment, it leaves all or none
    rewritten.

    Args:
        database: SQLite database of a store; it need not exist.
        experiment: name of the experiment of the project's runs.
        destination: of MLFLOW_ARTIFACTS_DESTINATION, if set.
    """
    own = artifact_folder(database).as_uri()
    if (destination or own) != own or not own.endswith(FORMER_FOLDER) or not database.is_file():
        return
    with closing(sqlite3.connect(database, timeout=30)) as connection:
        if not connection.execute(
            "SELECT 1 FROM sqlite_master WHERE name = 'logged_models'"
        ).fetchone():
            return
        row = connection.execute(
            "SELECT experiment_id, artifact_location FROM experiments WHERE name = ?", (experiment,)
        ).fetchone()
        location = row[1] if row else ""
        # A server added the experiment's id.
        former = location.removesuffix(f"/{row[0]}") if row else ""
        if not (former.startswith("file:") and former.endswith(FORMER_FOLDER)):
            return
        place = PORTABLE_LOCATION + location.removeprefix(former).lstrip("/")
        with connection:  # one transaction
            connection.execute(
                "UPDATE experiments SET artifact_location = ? WHERE name = ?", (place, experiment)
            )
            for table, column in _FORMER_COLUMNS:
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "  # noqa: S608
                    f"WHERE substr({column}, 1, ?) = ?",
                    (SCHEME, len(former) + 1, len(former) + 1, f"{former}/"),
                )
