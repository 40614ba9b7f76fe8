"""Registered models in MLflow, and the runs that trained them."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fullscale.runtime.errors import StageError, shorten
from fullscale.runtime.files import file_sha256
from fullscale.tracking.errors import UnreachableError
from fullscale.tracking.generated_text import is_ours
from fullscale.tracking.outages import is_outage
from fullscale.tracking.run_record import now_ms
from fullscale.tracking.store import (
    NETWORK_TAG,
    SEED_TAG,
    WEIGHTS_TAG,
    Store,
    connect,
    use_tracking_uri,
)

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

CHALLENGER, CHAMPION = "challenger", "champion"
TEST_SET_TAG, VERDICT_TAG = "fullscale.test_set", "fullscale.verdict"
RESULTS_TAG = "fullscale.results_sha256"
FILES_TAG = "fullscale.files_sha256"
CHAMPIONS_TAG = "fullscale.champions"
"""Of a registered model: the numbers of the versions that were seen as champion."""
EXTERNAL_TAG = "fullscale.external"
"""Followed by "." and the name of a cohort: a version's scores on it, as JSON."""
_WRITTEN_BY_DOWNLOAD = "registered_model_meta"


@dataclass(frozen=True)
class Registered:
    """A registered version.

    Attributes:
        name: of the model.
        version: its number.
        tags: of the version; `announce` writes the verdict to them.
        description: its page, as Markdown.
        run_id: the MLflow run that it belongs to.
    """

    name: str
    version: str
    tags: Mapping[str, str]
    description: str = ""
    run_id: str = ""


def find_training_run(store: Store, weights_sha256: str) -> str | None:
    """Return the id of the newest finished run that trained these weights, None without one."""
    client, experiment_id = connect(store)
    runs = client.search_runs(
        [experiment_id],
        filter_string=f"tags.`{WEIGHTS_TAG}` = '{weights_sha256}' and status = 'FINISHED'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    return str(runs[0].info.run_id) if runs else None


def add_test_results(
    store: Store, run_id: str, summary: Mapping[str, Any], folder: Path | None = None
) -> None:
    """Add test metrics, and a folder's tables and pictures, to a run that lacks them.

    Its name gets data version and Dice, unless a person gave it another name.
    """
    client, _ = connect(store)
    from mlflow.entities import Metric

    text = json.dumps(dict(summary), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    run = client.get_run(run_id)
    if run.data.tags.get(RESULTS_TAG) == digest:
        return
    time_ms = now_ms()
    values = [
        Metric(key, value, time_ms, 0)
        for key, value in summary.items()
        if isinstance(value, int | float) and not math.isnan(value)
    ]
    client.log_batch(run_id, metrics=values)
    if folder is not None:
        client.log_artifacts(run_id, str(folder), "test")
    if name := _full_name(run, summary):
        client.update_run(run_id, name=name)
    client.set_tag(run_id, TEST_SET_TAG, str(summary["test_set"]))
    client.set_tag(run_id, RESULTS_TAG, digest)


def _full_name(run: Run, summary: Mapping[str, Any]) -> str | None:
    """Return a run's name with test Dice and data version; None for one that a person named."""
    tags = run.data.tags
    title = f"{tags.get(NETWORK_TAG)}-{tags.get(SEED_TAG, 'ensemble')}"
    inputs = run.inputs.dataset_inputs if run.inputs else []
    if run.info.run_name.partition(", ")[0] != title or not inputs:
        return None
    dice = summary.get("test/dice")
    # MLflow's table of runs shows some 22 characters of a name, so the number comes first.
    scored = f", {dice:.3f} test Dice" if isinstance(dice, int | float) else ""
    return f"{title}{scored}, scans {inputs[0].dataset.digest[:8]}"


def add_verdict(store: Store, run_id: str, status: str) -> None:
    """Tag the run of a candidate with the promotion gate's verdict on it."""
    client, _ = connect(store)
    client.set_tag(run_id, VERDICT_TAG, status)


def count_judged(store: Store, test_set: str, weights_sha256: str) -> int:
    """Return how many other candidates the promotion gate has judged on a test set.

    Args:
        store: all its runs are counted, also those whose verdict was not a pass.
        test_set: digest of the test set.
        weights_sha256: of the candidate that is not counted.
    """
    client, experiment_id = connect(store)
    token, judged = None, set[str]()
    while True:
        runs = client.search_runs(
            [experiment_id],
            filter_string=f"tags.`{TEST_SET_TAG}` = '{test_set}' and tags.`{VERDICT_TAG}` != ''",
            page_token=token,
        )
        judged |= {run.data.tags.get(WEIGHTS_TAG, run.info.run_id) for run in runs}
        token = runs.token
        if not token:
            return len(judged - {weights_sha256})


def add_files(store: Store, run_id: str, folder: Path, path: str) -> None:
    """Add a folder's files to a run, under an artifact path; existing files are replaced."""
    client, _ = connect(store)
    client.log_artifacts(run_id, str(folder), path)


def find_version(store: Store, model_name: str, weights_sha256: str) -> str | None:
    """Return the newest complete version with these weights, None if there is none."""
    client, _ = connect(store)
    versions = client.search_model_versions(
        f"name = '{model_name}' and tag.`{WEIGHTS_TAG}` = '{weights_sha256}'"
    )
    whole = (str(found.version) for found in versions if FILES_TAG in found.tags)
    return max(whole, key=int, default=None)


def list_aliases(store: Store, model_name: str, version: str) -> tuple[str, ...]:
    """Return the aliases of a version."""
    client, _ = connect(store)
    aliases = client.get_registered_model(model_name).aliases
    return tuple(sorted(alias for alias, target in aliases.items() if str(target) == version))


def announce(store: Store, model_name: str, version: str, tags: Mapping[str, str]) -> None:
    """Tag a version that passed the promotion gate, and make it the challenger.

    Where the model has no champion, it becomes the champion, too.
    """
    client, _ = connect(store)
    for key, value in tags.items():
        client.set_model_version_tag(model_name, version, key, value)
    client.set_registered_model_alias(model_name, CHALLENGER, version)
    if find_alias(store, model_name, CHAMPION) is None:
        client.set_registered_model_alias(model_name, CHAMPION, version)
        mark_champion(store, model_name, version)


def mark_champion(store: Store, model_name: str, version: str) -> None:
    """Note on a registered model that a version is champion; what was one is never removed."""
    client, _ = connect(store)
    known = list_champions(client.get_registered_model(model_name).tags)
    if version not in known:
        client.set_registered_model_tag(model_name, CHAMPIONS_TAG, ", ".join([*known, version]))


def list_champions(tags: Mapping[str, str]) -> list[str]:
    """Return the versions that were champion, from the tags of their registered model."""
    return [text for text in tags.get(CHAMPIONS_TAG, "").split(", ") if text]


def describe_version(
    store: Store, model_name: str, version: str, page: str, model_text: str
) -> None:
    """Write the description of a version, and of its registered model where that has none.

    A version's description that a person wrote or changed is kept.
    """
    client, _ = connect(store)
    if is_ours(client.get_model_version(model_name, version).description):
        client.update_model_version(model_name, version, page)
    if not client.get_registered_model(model_name).description:
        client.update_registered_model(model_name, model_text)


def add_external_scores(
    store: Store, version: Registered, cohort: str, scores: Mapping[str, Any]
) -> None:
    """Keep a version's scores on a cohort that it was not trained on, in place of earlier ones.

    Args:
        store: the registry.
        version: that was scored.
        cohort: name of the cohort, of letters, digits, "_" and "-".
        scores: plain numbers and text.
    """
    client, _ = connect(store)
    key, value = f"{EXTERNAL_TAG}.{cohort}", json.dumps(dict(scores))
    client.set_model_version_tag(version.name, version.version, key, value)


def read_external_scores(tags: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return what `add_external_scores` kept in a version's tags, by cohort."""
    prefix = f"{EXTERNAL_TAG}."
    return {
        key.removeprefix(prefix): json.loads(value)
        for key, value in sorted(tags.items())
        if key.startswith(prefix)
    }


def find_alias(store: Store, model_name: str, alias: str) -> Registered | None:
    """Return the version that an alias points to, None if there is none."""
    client, _ = connect(store)
    return _find(lambda: client.get_model_version_by_alias(model_name, alias))


def find_numbered(store: Store, model_name: str, version: str) -> Registered | None:
    """Return the version with this number, None if there is none."""
    client, _ = connect(store)
    return _find(lambda: client.get_model_version(model_name, version))


def _find(request: Callable[[], ModelVersion]) -> Registered | None:
    """Return the version that a request finds, None if the registry has none."""
    from mlflow.exceptions import MlflowException

    try:
        found = request()
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return Registered(
        found.name,
        str(found.version),
        dict(found.tags),
        found.description or "",
        found.run_id or "",
    )


def download_model(store: Store, version: Registered, folder: Path) -> Path:
    """Fetch the trained network of a registered version into `folder`; return its path.

    Raises:
        UnreachableError: the store does not answer.
        StageError: the store does not have its files.
    """
    connect(store)
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    uri = f"models:/{version.name}/{version.version}"
    try:
        with use_tracking_uri(store):
            fetched = download_artifacts(artifact_uri=uri, dst_path=str(folder))
    except (MlflowException, OSError) as error:
        if is_outage(error):
            raise UnreachableError(store.uri, shorten(error)) from None
        raise StageError(
            f"the files of {uri} cannot be fetched from {store.uri} ({shorten(error)}); restore "
            "the store's artefacts, or register the model again"
        ) from None
    return Path(fetched) / "artifacts"


def model_settings(folder: Path) -> dict[str, Any]:
    """Return the settings that a version is loaded with, from the folder of its network."""
    content = yaml.safe_load((folder.parent / "MLmodel").read_text(encoding="utf-8"))
    return dict(content["flavors"]["python_function"].get("config") or {})


@dataclass(frozen=True)
class ModelPackage:
    """The content of a version that MLflow stores.

    Attributes:
        trained_files: artifact name to file.
        code: packages that the model imports.
        model_file: the Python file that defines the model.
        model_config: settings that the model is loaded with.
        pip_requirements: pinned libraries that the model needs.
        inputs: text columns that a row may fill.
        outputs: text columns of an answer.
        input_example: rows as the model takes them.
    """

    trained_files: Mapping[str, Path]
    code: tuple[Path, ...]
    model_file: Path
    model_config: Mapping[str, Any]
    pip_requirements: list[str]
    inputs: Sequence[str]
    outputs: Sequence[str]
    input_example: pd.DataFrame


def log_model(store: Store, run_id: str, model_name: str, package: ModelPackage) -> str:
    """Log a model to the run that trained it, and register it; return the new version.

    The version is tagged with the digest of its files, when they are complete.
    """
    client, _ = connect(store)
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    signature = ModelSignature(
        Schema([ColSpec("string", name, required=False) for name in package.inputs]),
        Schema([ColSpec("string", name) for name in package.outputs]),
    )
    with use_tracking_uri(store), mlflow.start_run(run_id=run_id):
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(package.model_file),
            code_paths=[str(path) for path in package.code],
            artifacts={name: str(path) for name, path in package.trained_files.items()},
            model_config=dict(package.model_config),
            signature=signature,
            pip_requirements=package.pip_requirements,
            input_example=package.input_example,
            registered_model_name=model_name,
        )
    version = Registered(model_name, str(info.registered_model_version), {})
    with tempfile.TemporaryDirectory() as folder:
        digest = digest_files(download_model(store, version, Path(folder)).parent)
    client.set_model_version_tag(model_name, version.version, FILES_TAG, digest)
    return version.version


def digest_files(folder: Path) -> str:
    """Return the SHA-256 of the names and checksums of a version's files, as fetched.

    Compiled Python files are left out. Python writes them next to the code when a version is loaded
    from a store on this machine, of which MLflow makes no copy.
    """
    lines = [
        f"{file_sha256(path)} {path.relative_to(folder).as_posix()}\n"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name != _WRITTEN_BY_DOWNLOAD
        and not path.match("__pycache__/*.pyc")
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
