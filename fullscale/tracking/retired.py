"""Registered versions that nobody needs any more, and the files of their models."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fullscale.tracking.errors import translate_mlflow_errors
from fullscale.tracking.generated_text import is_ours
from fullscale.tracking.registry import EXTERNAL_TAG, list_champions
from fullscale.tracking.store import Store, connect, use_tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

RETIRED_TAG = "fullscale.retired"
"""Of the files of a version that is being removed: its number."""
_MODEL_ID = re.compile(r"m-[0-9a-f]{32}")
_OUR_TAGS = ("fullscale.", "mlflow.")


@dataclass(frozen=True)
class RetiredVersion:
    """A version to remove.

    Attributes:
        name: of the model.
        version: its number.
        model_id: of its files in MLflow.
        num_bytes: size of its files.
    """

    name: str
    version: str
    model_id: str
    num_bytes: int


def find_retired(store: Store, model_name: str, num_kept: int) -> list[RetiredVersion]:
    """Return the versions that `remove_retired` may remove, the oldest first.

    A version stays if it is one of the newest, has an alias, was a champion, was scored on other
    cohorts, was copied to another registered model, or if a person added a tag or wrote its
    description. What an interrupted removal left is returned again.

    Args:
        store: the registry.
        model_name: the registered model.
        num_kept: how many of the newest versions stay.

    Raises:
        UnreachableError: the store does not answer.
    """
    with translate_mlflow_errors(store.uri):
        client, experiment_id = connect(store)
        every = list(_list_versions(client))
        known = [each for each in every if each.name == model_name]
        known.sort(key=lambda each: int(each.version))
        kept = set[str]()
        if known:
            model = client.get_registered_model(model_name)
            kept = {str(target) for target in model.aliases.values()} | {
                *list_champions(model.tags)
            }
        old = [
            each
            for each in known[: max(0, len(known) - num_kept)]
            if str(each.version) not in kept and not _is_wanted(each)
        ]
        used = {_model_id(client, each) for each in every if each not in old}
        found = {_model_id(client, each): str(each.version) for each in old}
        found |= _list_left(client, experiment_id)
        return [
            RetiredVersion(model_name, version, model_id, _size(_open(store, client, model_id)))
            for model_id, version in sorted(found.items(), key=lambda item: int(item[1]))
            if model_id and model_id not in used
        ]


def remove_retired(store: Store, retired: RetiredVersion) -> None:
    """Remove a version from the registry, then its files; the run that trained it stays.

    Interrupted, it leaves a version that is whole or gone; `find_retired` returns the rest again.

    Raises:
        UnreachableError: the store does not answer.
    """
    from mlflow.exceptions import MlflowException

    with translate_mlflow_errors(store.uri):
        client, _ = connect(store)
        client.set_logged_model_tags(retired.model_id, {RETIRED_TAG: retired.version})
        try:
            client.delete_model_version(retired.name, retired.version)
        except MlflowException as error:  # an interrupted removal came this far
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        files = _open(store, client, retired.model_id)
        files.delete_artifacts()  # type: ignore[no-untyped-call]
        client.delete_logged_model(retired.model_id)


def _is_wanted(version: ModelVersion) -> bool:
    """Return whether a person may want a version, by its tags and its description."""
    tags: Mapping[str, str] = version.tags
    return (
        any(key.startswith(f"{EXTERNAL_TAG}.") for key in tags)
        or any(not key.startswith(_OUR_TAGS) for key in tags)
        or not is_ours(version.description)
    )


def _model_id(client: MlflowClient, version: ModelVersion) -> str:
    """Return the id of the files that a version, or a copy of one, consists of; "" if unknown."""
    place = str(version.source)
    if "/" in place.removeprefix("models:/"):  # it was copied from another version
        place = client.get_model_version_download_uri(version.name, version.version)
    found = _MODEL_ID.search(place)
    return found.group() if found else ""


def _list_versions(client: MlflowClient) -> Iterator[ModelVersion]:
    token = None
    while True:
        page = client.search_model_versions(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _list_left(client: MlflowClient, experiment_id: str) -> dict[str, str]:
    """Return what interrupted removals left: ids of files, and the versions' numbers."""
    found = client.search_logged_models([experiment_id], f"tags.`{RETIRED_TAG}` != ''")
    return {str(each.model_id): each.tags[RETIRED_TAG] for each in found}


def _open(store: Store, client: MlflowClient, model_id: str) -> ArtifactRepository:
    """Return MLflow's access to the files of a model."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    location = client.get_logged_model(model_id).artifact_location
    with use_tracking_uri(store):
        return get_artifact_repository(location, tracking_uri=store.uri)


def _size(files: ArtifactRepository, folder: str | None = None) -> int:
    """Return the size of all files of a model, in bytes."""
    return sum(
        _size(files, each.path) if each.is_dir else int(each.file_size or 0)
        for each in files.list_artifacts(folder)
    )
