"""Every command of docs/predict.md, word for word, except the benchmarks."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import mlflow
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from bodies import make_body, save_nifti
from cohorts import SPACING_MM, write_series
from literal_networks import random_state
from project import ROOT
from random_network import narrow, save_random
from running_services import is_listening
from typer.testing import CliRunner
from watching import wait_until

from fullscale.params import load_params
from fullscale.tracking.registry import CHAMPION, announce, log_model
from fullscale.tracking.store import connect, sqlite_store
from tasks.cli import app
from tasks.register import package_networks

pytestmark = pytest.mark.slow
NAME = "fullscale-organs"
TEXT = (ROOT / "docs/predict.md").read_text()


def commands(program):
    """The indented lines of the document that start with `program`."""
    lines = re.findall(r"^    (\S(?:.*\\\n)*.*)$", TEXT, flags=re.M)
    return [line for line in lines if line.startswith(program)]


@pytest.fixture(scope="module")
def folder(store_template, tmp_path_factory):
    """The files that the document names, and a registry with a champion."""
    root = tmp_path_factory.mktemp("documented")
    (root / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    hu = make_body(seed=1)[0]
    save_nifti(root / "scan.nii.gz", hu, SPACING_MM, "RAS")
    write_series(root / "SERIES", hu)
    save_nifti(root / "SCANS/case_17.nii.gz", hu, SPACING_MM)
    pd.DataFrame({"path": ["case_17.nii.gz"]}).to_csv(root / "rows.csv", index=False)
    torch.save(random_state("unet3plus_ds_cgm", width=4), root / "unet3plus.pth")
    # A UNet, whose conversion to ONNX takes a tenth of that of a UNet 3+.
    trained = save_random(root / "trained", narrow(load_params(ROOT / "params.yaml")), "unet")
    store = sqlite_store(Path(shutil.copy(store_template / "mlflow.db", root)))
    client, experiment_id = connect(store)
    version = log_model(
        store,
        client.create_run(experiment_id).info.run_id,
        NAME,
        package_networks([trained], ROOT, 0.5),
    )
    announce(store, NAME, version, {})
    mlflow.MlflowClient(store.uri).set_registered_model_alias(NAME, CHAMPION, version)
    return root


@pytest.fixture(scope="module")
def environment(folder):
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {
        "PATH": programs,
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "FULLSCALE_SCAN_ROOT": str(folder / "SCANS"),
    }


@pytest.fixture
def here(folder, environment, monkeypatch):
    """Work in the folder, with its environment: a command of ours then needs no new process."""
    monkeypatch.chdir(folder)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)


def run_here(line):
    program, *arguments = shlex.split(line.replace("\\\n", " "), comments=True)
    assert program == "fullscale"
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, f"{line}\n{done.output}{done.exception}"


def run(command, folder, environment):
    done = subprocess.run(
        command, cwd=folder, env=environment,
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


@pytest.mark.usefixtures("here")
def test_predict_writes_what_the_document_names(folder):
    lines = commands("fullscale import-checkpoint") + commands("fullscale predict")
    assert len(lines) == 5
    for line in lines:
        run_here(line)
    for name in ("organs.nii.gz", "out.nii.gz", "out.dcm", "out.png", "out.json",
                 "OUT/case_17.nii.gz", "OUT/case_17.json", "liver.nii.gz"):  # fmt: skip
        assert (folder / name).is_file(), name


@pytest.mark.usefixtures("here")
def test_export_and_mlflow_predict_write_their_files(folder, environment):
    (line,) = commands("fullscale export")
    run_here(line)
    (line,) = commands("mlflow models predict")
    run(["bash", "-c", line], folder, environment)
    assert (folder / "organs.onnx").is_file()
    assert '"mask"' in (folder / "answers.json").read_text()


def is_up(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.mark.parametrize("line", [*commands("fullscale serve"), *commands("mlflow models serve")])
def test_server_starts_and_answers_the_documented_request(folder, environment, line):
    found = re.search(r"--port (\d+)", line)
    port = int(found[1]) if found else 5001
    if is_listening(port):
        pytest.skip(f"another program uses port {port}")
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            ["bash", "-c", line], cwd=folder, env=environment, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    try:
        assert wait_until(lambda: is_up(port) or server.poll() is not None, 120)
        assert server.poll() is None, (folder / "server.log").read_text()
        (example,) = re.findall(r"^```python\n(import base64.*?)^```$", TEXT, flags=re.M | re.S)
        run([sys.executable, "-c", example.replace(":5001/", f":{port}/")], folder, environment)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
        assert wait_until(lambda: not is_listening(port), 30)
    mask, scan = (nib.load(folder / name) for name in ("mask.nii.gz", "scan.nii.gz"))
    assert mask.shape == scan.shape
    assert np.asarray(mask.dataobj).any()
    (folder / "mask.nii.gz").unlink()
