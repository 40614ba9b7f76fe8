from __future__ import annotations

import shutil
from pathlib import Path

import mlflow
import pytest

from fullscale.tracking.registry import CHAMPION, EXTERNAL_TAG, announce
from fullscale.tracking.retired import RetiredVersion, find_retired, remove_retired
from fullscale.tracking.store import Store, connect, sqlite_store, use_tracking_uri

pytestmark = pytest.mark.slow  # a registry in a new database

NAME = "organs"
CODE = """
import mlflow

class Empty(mlflow.pyfunc.PythonModel):
    def predict(self, model_input: list[str]) -> list[str]:
        return model_input

mlflow.models.set_model(Empty())
"""


@pytest.fixture(scope="module")
def template(store_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry of five versions, announced one after the other: the first is champion."""
    folder = tmp_path_factory.mktemp("template")
    shutil.copytree(store_template, folder / "mlruns")
    store = sqlite_store(folder / "mlruns/mlflow.db")
    client, experiment_id = connect(store)
    (folder / "model.py").write_text(CODE)
    with use_tracking_uri(store):
        for number in range(1, 6):
            run = client.create_run(experiment_id)
            with mlflow.start_run(run_id=run.info.run_id):
                mlflow.pyfunc.log_model(
                    name="model",
                    python_model=str(folder / "model.py"),
                    pip_requirements=[],
                    registered_model_name=NAME,
                )
            announce(store, NAME, str(number), {"fullscale.verdict": "pass"})
    return folder / "mlruns"


@pytest.fixture
def registry(template: Path, tmp_path: Path) -> Store:
    """A copy of it for one test."""
    shutil.copytree(template, tmp_path / "mlruns")
    return sqlite_store(tmp_path / "mlruns/mlflow.db")


def numbers(found: list[RetiredVersion]) -> list[str]:
    return [each.version for each in found]


def files(store: Store, model_id: str) -> list[Path]:
    folder = Path(store.uri.removeprefix("sqlite:///")).parent / "artifacts"
    return [path for path in folder.rglob(f"models/{model_id}/**/*") if path.is_file()]


def test_old_version_that_nobody_marked_is_retired(registry: Store) -> None:
    client, _ = connect(registry)
    client.set_registered_model_alias(NAME, CHAMPION, "2")  # the first was champion until now
    client.set_model_version_tag(NAME, "3", "approved by", "a person")
    client.set_model_version_tag(NAME, "4", f"{EXTERNAL_TAG}.elsewhere", "{}")
    assert find_retired(registry, NAME, 2) == []
    client.delete_model_version_tag(NAME, "3", "approved by")
    assert numbers(find_retired(registry, NAME, 2)) == ["3"]
    assert find_retired(registry, NAME, 3) == []
    client.update_model_version(NAME, "3", "Do not remove.")
    assert find_retired(registry, NAME, 2) == []
    client.update_model_version(NAME, "3", "")
    client.set_registered_model_alias(NAME, "trial", "3")
    assert find_retired(registry, NAME, 2) == []
    assert find_retired(registry, "nothing", 1) == []


def test_retired_version_goes_with_its_files_and_nothing_else(registry: Store) -> None:
    client, experiment_id = connect(registry)
    ids = {
        each.version: each.source.removeprefix("models:/")
        for each in client.search_model_versions()
    }
    found = find_retired(registry, NAME, 2)
    assert numbers(found) == ["2", "3"]
    assert found[0].num_bytes == sum(path.stat().st_size for path in files(registry, ids[2]))
    client.copy_model_version(f"models:/{NAME}/3", "copied")
    assert numbers(find_retired(registry, NAME, 2)) == ["2"]
    remove_retired(registry, found[0])
    left = client.search_model_versions(f"name = '{NAME}'")
    assert sorted(int(each.version) for each in left) == [1, 3, 4, 5]
    assert files(registry, ids[2]) == []
    assert files(registry, ids[3])
    assert find_retired(registry, NAME, 2) == []
    assert len(client.search_runs([experiment_id])) == 5


@pytest.mark.parametrize("failing", ["delete_model_version", "delete_logged_model"])
def test_interrupted_removal_is_finished_by_the_next_one(
    registry: Store, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    client, _ = connect(registry)
    ids = {
        each.version: each.source.removeprefix("models:/")
        for each in client.search_model_versions()
    }
    (retired,) = find_retired(registry, NAME, 3)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(mlflow.MlflowClient, failing, interrupt)
        with pytest.raises(KeyboardInterrupt):
            remove_retired(registry, retired)
    (again,) = find_retired(registry, NAME, 3)
    assert (again.version, again.model_id) == ("2", ids[2])
    remove_retired(registry, again)
    assert files(registry, ids[2]) == []
    assert find_retired(registry, NAME, 3) == []
