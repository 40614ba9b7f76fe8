"""The MLflow server goes away while a real training runs, and comes back."""

import os
import socket
import subprocess
import time
import urllib.request

import mlflow
import pytest
from conftest import clone_project

pytestmark = pytest.mark.slow
NUM_EPOCHS = 8


class Server:
    """A real MLflow server that can be stopped and started again at the same address."""

    def __init__(self, folder):
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        self.process = subprocess.Popen(
            ["mlflow", "server", "-w", "1", "--host", "127.0.0.1", "--port", str(self.port),
             "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db",
             "--default-artifact-root", f"file://{self.folder}/artifacts"],
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                              "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        end = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1)  # noqa: S310
                return
            except OSError:
                assert time.monotonic() < end, "the server did not start"
                time.sleep(0.2)

    def stop(self):
        os.killpg(self.process.pid, 9)
        self.process.wait()


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    server.start()
    yield server
    if server.process.poll() is None:
        server.stop()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = clone_project(tmp_path_factory.mktemp("outage") / "project")
    project.run("dvc", "pull", "--quiet", "data.dvc")
    project.change_params("slice", size_px=32)
    project.change_params("train", width=4, num_epochs=NUM_EPOCHS, num_picture_slices=2)
    project.run("dvc", "repro", "split")
    return project


def test_training_goes_on_while_the_server_is_away(project, server):
    project.environment["MLFLOW_TRACKING_URI"] = server.uri
    training = subprocess.Popen(
        ["python", "-m", "tasks.train", "unet"],
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

    read_until("unet epoch 2/")
    server.stop()
    read_until(f"unet epoch {NUM_EPOCHS - 3}/")
    server.start()
    told.append(training.communicate(timeout=120)[0])
    text = "".join(told)
    assert training.returncode == 0, text
    assert text.count("does not answer") == 1
    assert "training goes on" in text
    assert f"MLflow at {server.uri} is back; " in text

    client = mlflow.MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("fullscale")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    for key in ("train/total", "val/dice", "learning_rate", "system/cpu_utilization_percentage"):
        points = client.get_metric_history(run.info.run_id, key)
        assert [point.step for point in points] == list(range(1, NUM_EPOCHS + 1)), key
    assert "fullscale.weights_sha256" in run.data.tags
    trained = {item.path for item in client.list_artifacts(run.info.run_id, "trained")}
    assert "trained/weights.safetensors" in trained


def test_training_does_not_begin_without_its_server(project):
    project.environment["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:9"
    started = time.monotonic()
    told = project.run("python", "-m", "tasks.train", "unet", code=1)
    assert time.monotonic() - started < 60
    assert "error: the MLflow store http://127.0.0.1:9 does not answer" in told
    assert "Traceback" not in told
