"""Load a model by its name: a registered version, or the folder of a trained network."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from fullscale.params import load_params
from fullscale.prediction.network_files import (
    DESCRIPTION_NAME,
    WEIGHTS_NAME,
    digest_weights,
    load_members,
    member_folders,
)
from fullscale.prediction.predictor import Refine
from fullscale.prediction.segmentation import Model
from fullscale.runtime.errors import StageError
from fullscale.tracking.registry import (
    CHALLENGER,
    CHAMPION,
    FILES_TAG,
    Registered,
    digest_files,
    download_model,
    find_alias,
    find_numbered,
    model_settings,
)
from fullscale.tracking.store import Store, default_store, has_store
from model.output import Gating

DEFAULT_THRESHOLD = 0.5
DEFAULT_GATE: Gating = "hard"
DEFAULT_REFINE: Refine = "none"
"""Also of versions that were registered before there was another, as is DEFAULT_GATE."""
_REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


def default_model(root: Path) -> str:
    """Return the name of the champion of the model that params.yaml registers.

    Raises:
        StageError: params.yaml is missing or invalid.
    """
    params_file = root / "params.yaml"
    if not params_file.is_file():
        raise StageError(
            "no params.yaml here names a registered model; run from the project's root, or name a "
            "model with --model"
        )
    return f"models:/{load_params(params_file).register_.model_name}@{CHAMPION}"


def find_model(wanted: str, root: Path) -> Model:
    """Load a model by its name.

    Args:
        wanted: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or a folder that stage train wrote:
            of one training, or of all trainings of a network, which then segment together.
        root: the project's root folder. Its registry is used unless MLFLOW_TRACKING_URI is set.
            Threshold, gate and refine of its params.yaml apply to a folder; a version has its own.

    Raises:
        StageError: there is no such model, or its files are missing, damaged or altered since the
            registration.
    """
    if not wanted.startswith("models:"):
        return _from_folder(Path(wanted), root)
    return _from_registry(wanted, root)


def _from_folder(folder: Path, root: Path) -> Model:
    folders = member_folders(folder)
    trained = load_members(folders)
    params_file = root / "params.yaml"
    threshold, gate, refine = DEFAULT_THRESHOLD, DEFAULT_GATE, DEFAULT_REFINE
    if params_file.is_file():
        settings = load_params(params_file).evaluate
        threshold, gate, refine = settings.threshold, settings.gate, settings.refine
    digest = digest_weights(folders)
    return Model(trained.description.name, None, digest, threshold, trained, gate, refine)


def find_version_number(wanted: str, root: Path) -> str | None:
    """Return the number of the version that a name points to now; None for a folder.

    Args:
        wanted: as `find_model` takes it.
        root: as `find_model` takes it.

    Raises:
        StageError: the registry has no such version, or does not answer.
    """
    if not wanted.startswith("models:"):
        return None
    _, version = _look_up(wanted, root)
    return version.version


def _open_registry(root: Path) -> Store:
    """Return the registry; refuse a missing one, which MLflow would create as an empty database."""
    if not has_store(root):
        raise StageError(
            "there is no registry in mlruns/; run from the project's root, set "
            "MLFLOW_TRACKING_URI, or name the folder of a trained network with --model"
        )
    return default_store(root)


def _look_up(wanted: str, root: Path) -> tuple[Store, Registered]:
    parts = _REGISTERED.fullmatch(wanted)
    if parts is None:
        raise StageError(
            f"found model {wanted!r}; wanted models:/NAME@ALIAS, models:/NAME/VERSION or the "
            "folder of a trained network"
        )
    store = _open_registry(root)
    version = (
        find_alias(store, parts["name"], parts["alias"])
        if parts["alias"]
        else find_numbered(store, parts["name"], parts["version"])
    )
    if version is None:
        usable = ", ".join(_list_usable(store, parts["name"], root)) or "nothing so far"
        raise StageError(
            f"{store.uri} has no {wanted}; look at what is registered with `fullscale verdict`, "
            f"or name another one with --model. Here can be used: {usable}"
        )
    return store, version


def _list_usable(store: Store, name: str, root: Path) -> list[str]:
    """Return what `find_model` takes here: versions with an alias, and trained networks."""
    registered = [
        f"models:/{name}@{alias}"
        for alias in (CHAMPION, CHALLENGER)
        if find_alias(store, name, alias) is not None
    ]
    weights = root.glob(f"artifacts/train/*/*/{WEIGHTS_NAME}")
    networks = sorted({path.parent.parent.relative_to(root).as_posix() for path in weights})
    return [*registered, *networks]


def _from_registry(wanted: str, root: Path) -> Model:
    store, version = _look_up(wanted, root)
    known = version.tags.get(FILES_TAG)
    if not known:
        raise StageError(
            f"{wanted} has no tag {FILES_TAG}, so its files cannot be verified; "
            "register it with `dvc repro register`"
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = download_model(store, version, Path(temporary))
        folders = member_folders(folder)
        needed = [each / name for each in folders for name in (WEIGHTS_NAME, DESCRIPTION_NAME)]
        for file in (*needed, folder.parent / "MLmodel"):
            if not file.is_file():
                raise StageError(f"{wanted} has lost its file {file.name}; register it again")
        digest = digest_files(folder.parent)
        if digest != known:
            raise StageError(
                f"the files of {wanted} are not those that were registered: found SHA-256 "
                f"{digest}, wanted {known}; restore the store's artefacts, or register it again"
            )
        settings = model_settings(folder)
        return Model(
            version.name,
            version.version,
            digest_weights(folders),
            float(settings.get("threshold", DEFAULT_THRESHOLD)),
            load_members(folders),
            settings.get("gate", DEFAULT_GATE),
            settings.get("refine", DEFAULT_REFINE),
        )
