from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from mlflow.artifacts import download_artifacts
from project import ROOT
from random_network import save_random

from fullscale.prediction.network_files import DESCRIPTION_NAME, WEIGHTS_NAME, load_trained
from fullscale.runtime.errors import StageError
from fullscale.runtime.files import file_sha256
from fullscale.serving.model_lookup import DEFAULT_THRESHOLD, default_model, find_model
from fullscale.serving.row_segmenter import ANSWERS, COLUMNS, example_rows
from fullscale.tracking.errors import UnreachableError
from fullscale.tracking.registry import CHAMPION, FILES_TAG, ModelPackage, announce, log_model
from fullscale.tracking.store import connect

pytestmark = pytest.mark.slow

NAME = "organs"


@pytest.fixture(scope="module")
def folder(tiny_params, tmp_path_factory):
    """A trained network on disk."""
    return save_random(tmp_path_factory.mktemp("trained"), tiny_params)


def register(store, folder, tags=None):
    """A version made of a folder's files, as stage register makes it; returns its number."""
    client, experiment_id = connect(store)
    version = log_model(
        store,
        client.create_run(experiment_id).info.run_id,
        NAME,
        ModelPackage(
            {"weights": folder / WEIGHTS_NAME, "description": folder / DESCRIPTION_NAME},
            code=(ROOT / "fullscale",),
            model_file=ROOT / "fullscale/serving/pyfunc_model.py",
            model_config={"threshold": 0.25, "gate": "slab", "refine": "crf"},
            pip_requirements=["torch"],
            inputs=COLUMNS,
            outputs=ANSWERS,
            input_example=example_rows(),
        ),
    )
    announce(store, NAME, version, tags or {})
    return version


@pytest.fixture(scope="module")
def versions(mlflow_store, folder):
    """A good version, one without the digest of its files, and one whose digest is another's."""
    client = mlflow.MlflowClient(mlflow_store.uri)
    good = register(mlflow_store, folder)
    client.set_registered_model_alias(NAME, CHAMPION, good)  # a test before may have had the first
    untagged = register(mlflow_store, folder)
    client.delete_model_version_tag(NAME, untagged, FILES_TAG)
    other = register(mlflow_store, folder, {FILES_TAG: "0" * 64})
    return good, untagged, other


@pytest.fixture
def registry(mlflow_store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store.uri)
    return mlflow_store


def stored(version):
    """Return the place where the store keeps a version's files."""
    client = mlflow.MlflowClient()
    source = client.get_model_version_download_uri(NAME, version)
    return Path(download_artifacts(artifact_uri=source))


def artifact(version, name):
    return stored(version) / "artifacts" / name


def test_folder_is_a_model_of_the_network_in_it(folder, tmp_path):
    model = find_model(str(folder), tmp_path)
    assert (model.name, model.version) == ("unet3plus", None)
    assert model.weights_sha256 == file_sha256(folder / WEIGHTS_NAME)
    assert (model.threshold, model.gate) == (DEFAULT_THRESHOLD, "hard")
    assert model.trained.description == load_trained(folder).description


def test_folder_goes_with_threshold_and_gate_of_the_project(folder, tmp_path):
    text = (ROOT / "params.yaml").read_text().replace("threshold: 0.5", "threshold: 0.375")
    text = text.replace("refine: none", "refine: largest_component")
    (tmp_path / "params.yaml").write_text(text.replace("gate: hard", "gate: soft"))
    model = find_model(str(folder), tmp_path)
    assert (model.threshold, model.gate) == (0.375, "soft")
    assert model.refine == "largest_component"


def test_folder_without_a_network_is_named(tmp_path):
    with pytest.raises(StageError, match=r"no trained network in .*weights.safetensors is missing"):
        find_model(str(tmp_path), tmp_path)


@pytest.mark.parametrize("wanted", ["models:/", "models:/organs", "models:organs@a", "models:/a/b"])
def test_name_that_is_none_is_refused(wanted, tmp_path):
    with pytest.raises(StageError, match=r"wanted models:/NAME@ALIAS, models:/NAME/VERSION or"):
        find_model(wanted, tmp_path)


def test_default_is_the_champion_that_params_name(tmp_path):
    assert default_model(ROOT) == "models:/fullscale-organs@champion"
    with pytest.raises(StageError, match=r"no params\.yaml here names a registered model"):
        default_model(tmp_path)


def test_registry_that_does_not_exist_is_not_made(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(StageError, match="there is no registry in mlruns/; run from"):
        find_model("models:/organs@champion", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["/{good}", "@champion"])
def test_version_is_found_by_number_and_by_alias(versions, registry, folder, tmp_path, form):
    good, _, _ = versions
    model = find_model(f"models:/{NAME}{form.format(good=good)}", tmp_path)
    assert (model.name, model.version, model.threshold) == (NAME, good, 0.25)
    assert (model.gate, model.refine) == ("slab", "crf")
    assert model.weights_sha256 == file_sha256(folder / WEIGHTS_NAME)
    assert model.trained.description == load_trained(folder).description


@pytest.mark.parametrize("wanted", ["organs@nobody", "organs/99", "nothing@champion", "nothing/1"])
def test_version_that_is_not_there_is_named(versions, registry, tmp_path, wanted):
    with pytest.raises(StageError, match=f"has no models:/{wanted}; look at what is registered"):
        find_model(f"models:/{wanted}", tmp_path)


def test_what_can_be_used_instead_is_named(versions, registry, folder, tmp_path):
    trained = tmp_path / "artifacts/train/unet3plus/0"
    shutil.copytree(folder, trained)
    # Which aliases there are depends on the tests before.
    usable = rf"Here can be used: (models:/{NAME}@\w+, )+artifacts/train/unet3plus$"
    with pytest.raises(StageError, match=usable):
        find_model(f"models:/{NAME}@nobody", tmp_path)
    assert find_model(str(trained.parent), tmp_path).version is None


def test_version_that_does_not_say_its_files_is_refused(versions, registry, tmp_path):
    with pytest.raises(StageError, match=f"has no tag {FILES_TAG}, so its files cannot be"):
        find_model(f"models:/{NAME}/{versions[1]}", tmp_path)


def test_version_with_other_files_is_refused(versions, registry, tmp_path):
    with pytest.raises(StageError, match=r"not those that were registered: found SHA-256 .* 0000"):
        find_model(f"models:/{NAME}/{versions[2]}", tmp_path)


@pytest.mark.parametrize(
    "name",
    [WEIGHTS_NAME, DESCRIPTION_NAME, "../MLmodel", "../code/fullscale/serving/row_segmenter.py"],
)
def test_version_whose_file_was_altered_is_refused(registry, folder, tmp_path, name):
    version = register(registry, folder)
    path = artifact(version, name)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StageError, match=f"files of models:/{NAME}/{version} are not those that"):
        find_model(f"models:/{NAME}/{version}", tmp_path)


@pytest.mark.parametrize(
    "name", ["artifacts/more.txt", "code/more.pyc", "code/__pycache__/more.py"]
)
def test_version_with_a_file_more_is_refused(registry, folder, tmp_path, name):
    version = register(registry, folder)
    path = stored(version) / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("put here later")
    with pytest.raises(StageError, match="are not those that were registered"):
        find_model(f"models:/{NAME}/{version}", tmp_path)


@pytest.mark.parametrize("lost", ["artifacts", "MLmodel", f"artifacts/{WEIGHTS_NAME}"])
def test_version_that_lost_files_is_refused(registry, folder, tmp_path, lost):
    version = register(registry, folder)
    path = artifact(version, WEIGHTS_NAME).parents[1] / lost
    path.rename(path.with_name("elsewhere"))
    missing = "MLmodel" if lost == "MLmodel" else WEIGHTS_NAME
    with pytest.raises(StageError, match=f"has lost its file {missing}; register it again"):
        find_model(f"models:/{NAME}/{version}", tmp_path)


def test_version_whose_place_does_not_answer_is_refused(versions, registry, tmp_path):
    client = mlflow.MlflowClient(registry.uri)
    source = "http://127.0.0.1:9/api/2.0/mlflow-artifacts/artifacts/gone"
    tags = {FILES_TAG: "0" * 64}
    version = client.create_model_version(NAME, source, tags=tags).version
    with pytest.raises(UnreachableError, match=r"does not answer \(.*http://127\.0\.0\.1:9/"):
        find_model(f"models:/{NAME}/{version}", tmp_path)


def test_nothing_is_left_of_a_download(versions, registry, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    model = find_model(f"models:/{NAME}/{versions[0]}", tmp_path)
    assert list(temporary.iterdir()) == []
    assert all(bool(value.isfinite().all()) for value in model.trained.network.parameters())


def test_description_of_a_version_is_json(versions, registry):
    content = json.loads(artifact(versions[0], DESCRIPTION_NAME).read_text())
    assert content["name"] == "unet3plus"


def test_version_whose_code_was_imported_where_it_is_stored_is_taken(registry, folder, tmp_path):
    """Python writes compiled files next to the code."""
    version = register(registry, folder)
    code = stored(version) / "code"
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPATH": str(code)}
    load = [sys.executable, "-c", "import fullscale.params, sys; print(fullscale.__file__)"]
    subprocess.run(load, cwd=tmp_path, env=environment, check=True)
    assert list(code.rglob("__pycache__/*.pyc"))
    assert find_model(f"models:/{NAME}/{version}", tmp_path).version == version
