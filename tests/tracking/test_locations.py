import shutil
import sqlite3
from pathlib import Path

import mlflow
import pytest

from fullscale.tracking.locations import artifact_folder, from_portable_uri, to_portable_uri
from fullscale.tracking.run_record import RunDescription, RunRecord
from fullscale.tracking.runs import send_leftovers, training_run
from fullscale.tracking.store import (
    EXPERIMENT,
    connect,
    default_store,
    sqlite_store,
    use_tracking_uri,
)

NAME = "located-organs"  # other tests of the process register models in the same store


@pytest.fixture(scope="module")
def template(mlflow_store, tmp_path_factory):
    """The store of a project with a run, its file, and a registered version of a logged model."""
    folder = tmp_path_factory.mktemp("located")
    database = Path(mlflow_store.uri.removeprefix("sqlite:///"))
    shutil.copytree(database.parent, folder / "mlruns")
    store = sqlite_store(folder / "mlruns/mlflow.db")
    client, experiment_id = connect(store)
    run_id = client.create_run(experiment_id).info.run_id
    client.log_text(run_id, "first", "note.txt")
    (folder / "model.py").write_text(
        "from mlflow.models import set_model\nset_model(lambda model_input: model_input)\n"
    )
    with use_tracking_uri(store), mlflow.start_run(run_id=run_id):
        mlflow.pyfunc.log_model(
            name="model", python_model=str(folder / "model.py"), pip_requirements=[],
            registered_model_name=NAME,
        )  # fmt: skip
    return folder, run_id


@pytest.fixture
def project(template, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder, run_id = template
    return shutil.copytree(folder, tmp_path / "project"), run_id


def read_note(root, run_id):
    with use_tracking_uri(default_store(root)):
        return Path(mlflow.artifacts.download_artifacts(f"runs:/{run_id}/note.txt")).read_text()


def read_model(root, folder):
    with use_tracking_uri(default_store(root)):
        return mlflow.artifacts.download_artifacts(f"models:/{NAME}/1", dst_path=str(folder))


def write_former(root, suffix=""):
    """Write the locations as earlier versions did: absolute, and by a server with a suffix."""
    former = artifact_folder(root / "mlruns/mlflow.db").as_uri()
    connection = sqlite3.connect(root / "mlruns/mlflow.db")
    with connection:
        for table, column in (
            ("runs", "artifact_uri"),
            ("logged_models", "artifact_location"),
            ("model_versions", "storage_location"),
        ):
            connection.execute(
                f"UPDATE {table} SET {column} = replace({column}, 'mlflow-artifacts:', ?)",  # noqa: S608
                (former,),
            )
        connection.execute(
            "UPDATE experiments SET artifact_location = ? || ? WHERE name = ?",
            (former, suffix, EXPERIMENT),
        )
    connection.close()


@pytest.mark.slow
def test_no_location_holds_the_folder(project):
    root, run_id = project
    client, experiment_id = connect(default_store(root))
    assert client.get_run(run_id).info.artifact_uri == f"mlflow-artifacts:/{run_id}/artifacts"
    assert client.get_experiment(experiment_id).artifact_location == "mlflow-artifacts:/"
    assert (root / f"mlruns/artifacts/{run_id}/artifacts/note.txt").read_text() == "first"


@pytest.mark.parametrize("suffix", [None, "", "/1"])
def test_moved_project_has_its_files(project, tmp_path, suffix):
    root, run_id = project
    if suffix is not None:
        write_former(root, suffix)
    moved = root.rename(tmp_path / "elsewhere")
    client, experiment_id = connect(default_store(moved))
    assert read_note(moved, run_id) == "first"
    assert Path(read_model(moved, tmp_path / "fetched"), "model.py").is_file()
    location = client.get_experiment(experiment_id).artifact_location
    assert location == f"mlflow-artifacts:/{(suffix or '').lstrip('/')}"
    assert not root.exists()


def test_copy_writes_nothing_into_the_original(project, tmp_path):
    root, run_id = project
    write_former(root)
    copy = shutil.copytree(root, tmp_path / "copy")
    client, _ = connect(default_store(copy))
    new_run = client.create_run(client.get_run(run_id).info.experiment_id).info.run_id
    client.log_text(new_run, "second", "note.txt")
    assert read_note(copy, new_run) == "second"
    assert (copy / f"mlruns/artifacts/{new_run}").is_dir()
    assert not (root / f"mlruns/artifacts/{new_run}").exists()


def test_files_elsewhere_stay_there_and_are_told_of(project, tmp_path, caplog):
    root, _ = project
    connection = sqlite3.connect(root / "mlruns/mlflow.db")
    with connection:
        connection.execute("UPDATE experiments SET artifact_location = 's3://bucket/team'")
    connection.close()
    client, experiment_id = connect(default_store(root))
    assert client.get_experiment(experiment_id).artifact_location == "s3://bucket/team"
    assert "keeps the files of runs and models in s3://bucket/team, not beside" in caplog.text


def test_record_of_a_training_moves_with_its_project(project, tmp_path):
    root, _ = project
    store = default_store(root)
    records = Path(".cache/train/unet/0/tracking")
    run = RunDescription(store.uri, store.artifact_location, "unet", {}, {}, "d" * 32)
    with training_run(run, root / records) as first:
        pass
    killed = RunRecord.create(root / records, RunDescription(**vars(run) | {"key": "9-killed"}))
    killed.log_metrics({"val/dice": 0.5}, 1)
    assert str(tmp_path) not in (first.folder / "run.json").read_text()
    copy = shutil.copytree(root, tmp_path / "copy")
    before = (root / "mlruns/mlflow.db").read_bytes()
    assert RunRecord(copy / records / first.run.key).is_sent()
    send_leftovers(copy / records)
    found = RunRecord(copy / records / "9-killed")
    assert found.run.store_uri == default_store(copy).uri
    client, _ = connect(default_store(copy))
    assert client.get_run(found.run_id).data.metrics["val/dice"] == 0.5
    assert (root / "mlruns/mlflow.db").read_bytes() == before


def test_store_outside_of_the_project_keeps_its_place(tmp_path):
    folder = tmp_path / "project/.cache/checkouts/retrain/.cache/train"
    own = f"sqlite:///{tmp_path}/project/mlruns/mlflow.db"
    assert to_portable_uri(own, folder) == "sqlite:///../../../../../mlruns/mlflow.db"
    for uri in (own, f"sqlite:///{tmp_path}/other/mlflow.db", "http://127.0.0.1:5000"):
        assert from_portable_uri(to_portable_uri(uri, folder), folder) == uri
