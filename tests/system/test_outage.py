"""The MLflow server goes away while a real training runs, and comes back."""

import shutil
import subprocess
import time

import mlflow
import pytest
from mlflow_server import Server

from fullscale.runtime.errors import EX_TEMPFAIL

pytestmark = pytest.mark.slow
NUM_EPOCHS = 8


@pytest.fixture
def server(store_template, tmp_path):
    server = Server(shutil.copytree(store_template, tmp_path / "mlflow"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def project(reproduced_project):
    """Each epoch takes long enough for a server to go and come back within a few."""
    reproduced_project.change_params("train", num_epochs=NUM_EPOCHS, batch_size=1)
    reproduced_project.change_params("train", num_picture_slices=2)
    return reproduced_project


def test_training_continues_while_the_server_is_away(project, server):
    project.environment["MLFLOW_TRACKING_URI"] = server.uri
    training = subprocess.Popen(
        ["python", "-m", "tasks.train", "unet", "0"],
        cwd=project.root,
        env=project.environment | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    told = []

    def read_until(start):
        for line in training.stdout:
            told.append(line)
            if line.startswith(start):
                return
        raise AssertionError("".join(told))

    read_until("unet-0 epoch 2/")
    server.kill()
    read_until(f"MLflow at {server.uri} does not answer")
    server.start()
    told.append(training.communicate(timeout=120)[0])
    text = "".join(told)
    assert training.returncode == 0, text
    assert text.count("does not answer") == 1
    assert "training continues" in text
    assert f"MLflow at {server.uri} is back; " in text

    client = mlflow.MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("fullscale")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    for key in (
        "train/total", "val/dice", "train/learning_rate", "system/cpu_utilization_percentage",
    ):  # fmt: skip
        points = client.get_metric_history(run.info.run_id, key)
        assert [point.step for point in points] == list(range(1, NUM_EPOCHS + 1)), key
    assert "fullscale.weights_sha256" in run.data.tags
    trained = {item.path for item in client.list_artifacts(run.info.run_id, "trained")}
    assert "trained/weights.safetensors" in trained


def test_training_does_not_begin_without_its_server(project):
    project.environment["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:9"
    started = time.monotonic()
    told = project.run("python", "-m", "tasks.train", "unet", "0", code=EX_TEMPFAIL)
    assert time.monotonic() - started < 60
    assert "error: the MLflow store http://127.0.0.1:9 does not answer" in told
    assert "Traceback" not in told
