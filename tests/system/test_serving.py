"""The registered model behind real servers: MLflow's, its batch command, and `fullscale serve`.

Nothing may be fetched from anywhere: every way out leads to a port where no one listens.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import mlflow
import nibabel as nib
import numpy as np
import pandas as pd
import psutil
import pytest
from payloads import base64_of, malformed, nifti, request
from project import ROOT
from random_network import narrow, save_random
from running_services import free_port
from typer.testing import CliRunner
from watching import wait_until

from fullscale.params import load_params
from fullscale.prediction.network_files import WEIGHTS_NAME
from fullscale.runtime.files import file_sha256
from fullscale.serving.row_segmenter import ANSWERS
from fullscale.tracking.registry import CHAMPION, FILES_TAG, announce, log_model
from fullscale.tracking.store import WEIGHTS_TAG, connect, sqlite_store, use_tracking_uri
from tasks.cli import app
from tasks.register import package_networks

pytestmark = pytest.mark.slow
NAME = "fullscale-organs"
NUM_MALFORMED = 90  # each kind at least three times
MAX_GROWTH_BYTES = 64 << 20


class Registry:
    """A registry with two versions of random networks, the first of them the champion."""

    def __init__(self, folder, store_template) -> None:
        self.store = sqlite_store(Path(shutil.copy(store_template / "mlflow.db", folder)))
        params = narrow(load_params(ROOT / "params.yaml"))
        self.weights = {}
        for seed in (1, 2):
            trained_folder = save_random(folder / f"trained{seed}", params, seed=seed)
            self.weights[str(seed)] = file_sha256(trained_folder / WEIGHTS_NAME)
            self._register(trained_folder)
        self.client = mlflow.MlflowClient(self.store.uri)
        closed = f"http://127.0.0.1:{free_port()}"
        self.environment = {
            **os.environ,
            "MLFLOW_TRACKING_URI": self.store.uri,
            "HTTP_PROXY": closed,
            "HTTPS_PROXY": closed,
            "NO_PROXY": "127.0.0.1,localhost",
            "PYTHONPATH": str(ROOT),
        }

    def _register(self, folder) -> None:
        client, experiment_id = connect(self.store)
        version = log_model(
            self.store,
            client.create_run(experiment_id).info.run_id,
            NAME,
            package_networks([folder], ROOT, 0.5),
        )
        announce(self.store, NAME, version, {WEIGHTS_TAG: file_sha256(folder / WEIGHTS_NAME)})

    def promote(self, version: str) -> None:
        """Move the alias, as a person does in the UI."""
        self.client.set_registered_model_alias(NAME, CHAMPION, version)


@pytest.fixture(scope="module")
def registry(store_template, tmp_path_factory):
    return Registry(tmp_path_factory.mktemp("registry"), store_template)


class Process:
    """A server that was started by a command."""

    def __init__(self, registry, log_path, *command: str, **environment: str) -> None:
        self.log_path = log_path
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=ROOT,
                env=registry.environment | environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self, url: str) -> httpx.Client:
        """Wait until it answers."""
        client = httpx.Client(base_url=url, timeout=120, trust_env=False)

        def answers() -> bool:
            assert self.process.poll() is None, self.log()
            try:
                return client.get("/ping").status_code == 200
            except httpx.TransportError:
                return False

        assert wait_until(answers, 180), self.log()
        return client

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start(registry, tmp_path):
    """Starts a server whose port is {port}; gives it and a client."""
    started = []

    def run(*command, **environment):
        port = str(free_port())
        server = Process(
            registry,
            tmp_path / f"server{len(started)}.log",
            *(word.replace("{port}", port) for word in command),
            **environment,
        )
        started.append(server)
        return server, server.wait(f"http://127.0.0.1:{port}")

    yield run
    for server in started:
        server.kill()


def ask(client, body):
    return client.post("/invocations", content=body, headers={"Content-Type": "application/json"})


def version_of(client):
    """Which version answers a request, by the checksum of its weights."""
    answer = ask(client, request(scan=base64_of(nifti())))
    assert answer.status_code == 200, answer.text
    statistics = json.loads(answer.json()["predictions"][0]["statistics"])
    return statistics["model"]["version"], statistics["model"]["weights_sha256"]


def test_server_follows_the_champion_and_outlives_what_is_malformed(registry, start):
    registry.promote("1")
    server, client = start("tasks.cli", "serve", "--port", "{port}", "--every-s", "0.5")
    assert version_of(client) == ("1", registry.weights["1"])

    registry.promote("2")
    assert wait_until(lambda: client.get("/model").json()["version"] == "2", 60), server.log()
    assert version_of(client) == ("2", registry.weights["2"])
    assert f"serve: models:/{NAME}@champion is version 2 now" in server.log()

    process = psutil.Process(server.process.pid)
    highest = 0
    for number, body in enumerate(malformed(seed=0, num=NUM_MALFORMED)):
        answer = ask(client, body)
        assert 400 <= answer.status_code < 500, (number, answer.text)
        assert answer.json()["message"]
        size = process.memory_info().rss
        if number < NUM_MALFORMED // 4:
            highest = max(highest, size)
        assert size < highest + MAX_GROWTH_BYTES, number
    assert version_of(client) == ("2", registry.weights["2"])

    registry.promote("1")
    assert wait_until(lambda: client.get("/model").json()["version"] == "1", 60), server.log()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == -signal.SIGTERM, server.log()  # passed on when all is done
    assert "Traceback" not in server.log()


def run_cli(registry, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        env=registry.environment | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def run_fullscale(registry, *arguments):
    """Run a command of ours in this process, which has imported what it needs."""
    settings = {"MLFLOW_TRACKING_URI": registry.store.uri}
    return CliRunner().invoke(app, [str(each) for each in arguments], env=settings)


def test_server_that_cannot_start_says_why_in_one_line(registry):
    registry.promote("1")
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        for arguments, reason in (
            (("--port", taken), f"can listen on 127.0.0.1:{taken} (Address already in use)"),
            (("--model", f"models:/{NAME}/99"), f"has no models:/{NAME}/99"),
        ):
            done = run_fullscale(registry, "serve", *arguments)
            assert done.exit_code == 1
            assert isinstance(done.exception, SystemExit)
            assert [line for line in done.stderr.splitlines() if reason in line]


def test_mlflow_serves_it_and_refuses_with_a_clear_error(registry, start, tmp_path):
    registry.promote("1")
    (tmp_path / "scan.nii.gz").write_bytes(gzip.compress(nifti()))
    _, client = start(
        "mlflow", "models", "serve", "--model-uri", f"models:/{NAME}@champion",
        "--env-manager", "local", "--host", "127.0.0.1", "--port", "{port}",
        FULLSCALE_SCAN_ROOT=str(tmp_path),
    )  # fmt: skip
    answers = [
        ask(client, request(**row)).json()["predictions"][0]["mask"]
        for row in ({"scan": base64_of(nifti())}, {"path": "scan.nii.gz"})
    ]
    assert answers[0] == answers[1]
    answer = ask(client, request(scan="not base64!"))
    assert answer.status_code == 400
    assert "found row 0: text that is not base64; wanted base64 of" in answer.json()["message"]
    answer = ask(client, request(path="../outside.nii"))
    assert answer.status_code == 400
    assert "found row 0: a path to no file that may be read here" in answer.json()["message"]


def test_mlflow_predicts_a_batch(registry, tmp_path):
    registry.promote("2")
    scans = tmp_path / "scans"
    scans.mkdir()
    for number in range(3):
        shifted = nib.Nifti1Image.from_bytes(nifti())
        nib.save(shifted.slicer[number:], scans / f"scan{number}.nii.gz")
    names = [f"scan{number}.nii.gz" for number in range(3)]
    pd.DataFrame({"path": names}).to_csv(tmp_path / "in.csv", index=False)
    run_cli(
        registry, "mlflow", "models", "predict", "--model-uri", f"models:/{NAME}@champion",
        "--env-manager", "local", "--content-type", "csv",
        "--input-path", tmp_path / "in.csv", "--output-path", tmp_path / "out.json",
        FULLSCALE_SCAN_ROOT=str(scans),
    )  # fmt: skip
    predictions = json.loads((tmp_path / "out.json").read_text())["predictions"]
    assert [json.loads(each["statistics"])["input"] for each in predictions] == names
    # In a process of its own, too: this one may compute with other kernels.
    run_cli(
        registry, "tasks.cli", "predict", scans, tmp_path / "out",
        "--model", f"models:/{NAME}@champion", "--device", "cpu",
    )  # fmt: skip
    for name, prediction in zip(names, predictions, strict=True):
        ours = np.asarray(nib.load(tmp_path / "out" / name).dataobj)
        theirs = nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(prediction["mask"])))
        assert np.array_equal(ours, np.asarray(theirs.dataobj))


def test_version_has_a_signature_and_an_example_that_it_answers(registry):
    with use_tracking_uri(registry.store):
        model = mlflow.pyfunc.load_model(f"models:/{NAME}/1")
    schema = model.metadata.get_input_schema()
    assert [(each.name, str(each.type), each.required) for each in schema] == [
        ("scan", "DataType.string", False),
        ("path", "DataType.string", False),
    ]
    assert [each.name for each in model.metadata.get_output_schema()] == list(ANSWERS)
    answer = model.predict(model.input_example)
    assert json.loads(answer["statistics"][0])["shape"] == [48, 48, 32]


@pytest.fixture
def alter(registry):
    """Return a function after which the files of version 2 are not those registered."""
    known = registry.client.get_model_version(NAME, "2").tags[FILES_TAG]
    yield lambda: registry.client.set_model_version_tag(NAME, "2", FILES_TAG, "0" * 64)
    registry.client.set_model_version_tag(NAME, "2", FILES_TAG, known)


def test_server_keeps_its_version_where_the_promoted_one_was_altered(registry, alter, start):
    registry.promote("1")
    server, client = start("tasks.cli", "serve", "--port", "{port}", "--every-s", "0.5")
    alter()
    registry.promote("2")
    assert wait_until(lambda: "version 1 stays in use" in server.log(), 60)
    assert "are not those that were registered" in server.log()
    assert version_of(client) == ("1", registry.weights["1"])
    registry.client.delete_registered_model_alias(NAME, CHAMPION)
    assert wait_until(lambda: f"has no models:/{NAME}@champion" in server.log(), 60)
    assert version_of(client) == ("1", registry.weights["1"])
