"""Two seeds, from the trainings to the ensemble that is registered, exported and served."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from dataclasses import replace

import httpx
import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from project import Project, copy_project
from quick_project import set_seeds
from running_services import free_port
from watching import wait_until

from fullscale.prediction.network_files import digest_weights, load_trained
from fullscale.prediction.predictor import Predictor
from fullscale.scans.volume import read_image, read_labels
from model.inference import Prediction

pytestmark = pytest.mark.slow
SEEDS = (0, 1)
NETWORKS = ("unet", "unet3plus")
MODEL = "models:/fullscale-organs@champion"


@pytest.fixture(scope="module")
def project(reproduced_template, forget_runs, tmp_path_factory) -> Project:
    """A small project that trained both networks with a second seed, and registered an ensemble."""
    project = copy_project(reproduced_template, tmp_path_factory.mktemp("ensemble"))
    forget_runs(project)
    set_seeds(project, SEEDS)
    project.run("git", "commit", "--all", "--quiet", "--message", "Two seeds")
    project.output = project.run("dvc", "repro")
    return project


@pytest.fixture(scope="module")
def scan(project):
    return next(iter(sorted((project.root / "data/imagesTr").glob("*.nii.gz"))))


@pytest.fixture(scope="module")
def probabilities(project, scan):
    """The mean of what both members predict, each alone: organ to array (Z, Y, X)."""
    volume = read_image(scan)
    folder = project.root / "artifacts/train/unet3plus"
    predictors = [
        Predictor(load_trained(folder / str(seed)), 0.5, 8, precision="auto") for seed in SEEDS
    ]
    alone = [each.predict(each.slice_scan(volume)) for each in predictors]
    # On the slices, as an ensemble joins them; then from there to the voxels.
    mean_KZHW = torch.stack([each.prediction.probabilities for each in alone]).mean(dim=0)
    found = replace(alone[0], prediction=Prediction(mean_KZHW, None))
    return {organ: found.restore(organ) for organ in found.organs}


@pytest.fixture(scope="module")
def predicted(project, scan, tmp_path_factory):
    """The mask that `fullscale predict` writes with the champion."""
    path = tmp_path_factory.mktemp("predicted") / "mask.nii.gz"
    project.run(sys.executable, "-m", "tasks.cli", "predict", str(scan), str(path))
    return voxels(path)


def voxels(path):
    return read_labels(path).values_ZYX


def read_json(path):
    return json.loads(path.read_text())


def test_each_seed_is_a_training_of_its_own(project):
    # Stage split looks at the fold of each seed, and writes what it wrote before.
    stages = [line for line in project.output.splitlines() if "Running stage 'train" in line]
    assert sorted(stages) == [f"Running stage 'train@{network}-1':" for network in NETWORKS]
    folders = [project.root / "artifacts/train/unet" / str(seed) for seed in SEEDS]
    assert digest_weights(folders[:1]) != digest_weights(folders[1:])
    client = mlflow.MlflowClient(f"sqlite:///{project.root}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name("fullscale")
    found = client.search_runs([experiment.experiment_id])
    runs = {run.info.run_name.partition(",")[0]: run.data for run in found}
    trainings = [f"{network}-{seed}" for network in NETWORKS for seed in SEEDS]
    assert sorted(runs) == sorted([*trainings, *(f"{network}-ensemble" for network in NETWORKS)])
    for title in trainings:
        assert runs[title].tags["fullscale.seed"] == title[-1]
        assert "test/dice" in runs[title].metrics
    assert runs["unet3plus-ensemble"].tags["fullscale.members"] == "0, 1"


def test_scores_of_trainings_and_ensemble_are_kept_apart_and_summarised(project):
    for network in NETWORKS:
        scores = pd.read_csv(project.root / f"reports/{network}/cases.csv")
        by_seed = scores.groupby("seed")["dice"].mean()
        assert sorted(by_seed.index) == ["0", "1", "ensemble"]
        summary = read_json(project.root / f"reports/{network}/summary.json")
        assert (summary["seeds"], summary["members"]) == ([0, 1], [0, 1])
        assert summary["test/dice"] == pytest.approx(by_seed["ensemble"], abs=1e-5)
        seeds = by_seed[["0", "1"]]
        assert summary["test/dice_seeds_mean"] == pytest.approx(seeds.mean(), abs=1e-5)
        assert summary["test/dice_seeds_sd"] == pytest.approx(seeds.std(), abs=1e-5)


def test_verdict_is_on_the_means_and_on_what_is_registered(project):
    gate = read_json(project.root / "reports/gate.json")
    assert gate["status"] == "pass"
    means = []
    for network in reversed(NETWORKS):
        scores = pd.read_csv(project.root / f"reports/{network}/cases.csv")
        scores = scores[scores["seed"] != "ensemble"]
        means.append(scores.groupby(["patient", "organ"])["dice"].mean().groupby("patient").mean())
    assert gate["dice_gain"]["mean"] == pytest.approx((means[0] - means[1]).mean(), abs=1e-5)
    folders = [project.root / "artifacts/train/unet3plus" / str(seed) for seed in SEEDS]
    assert gate["members"] == [0, 1]
    assert gate["weights_sha256"] == digest_weights(folders)
    summary = read_json(project.root / "reports/unet3plus/summary.json")
    floor = next(each for each in gate["criteria"] if each["name"] == "slice_fpr/liver")
    assert floor["value"] == pytest.approx(summary["test/slice_fpr/liver"], abs=1e-5)
    told = project.run(sys.executable, "-m", "tasks.cli", "verdict")
    assert "these weights against those weights (2 and 2 trainings; from 3 each on" in told
    assert "A pass registers the ensemble of 2 trainings, seeds 0, 1." in told
    assert "Mean Dice of 2 trainings of unet3plus: liver 0." in told
    assert "Registered: fullscale-organs version 1 (aliases: challenger, champion)" in told


def test_prediction_is_the_mean_of_the_members(project, scan, predicted, probabilities, tmp_path):
    labels_ZYX = np.zeros(next(iter(probabilities.values())).shape, dtype=np.uint8)
    highest_ZYX = np.full(labels_ZYX.shape, 0.5, dtype=np.float32)
    for label, mean_ZYX in enumerate(probabilities.values(), start=1):
        labels_ZYX[mean_ZYX >= highest_ZYX] = label
        highest_ZYX = np.maximum(highest_ZYX, mean_ZYX)
    assert labels_ZYX.any()
    np.testing.assert_array_equal(predicted, labels_ZYX)
    by_folder = tmp_path / "mask.nii.gz"
    folder = project.root / "artifacts/train/unet3plus"
    project.run(
        *(sys.executable, "-m", "tasks.cli", "predict", str(scan), str(by_folder)),
        *("--model", str(folder)),
    )
    np.testing.assert_array_equal(predicted, voxels(by_folder))


def test_model_loaded_by_mlflow_predicts_the_same(project, scan, predicted, tmp_path):
    script = (
        "import base64, pathlib, sys, mlflow, pandas\n"
        "mlflow.set_tracking_uri('sqlite:///mlruns/mlflow.db')\n"
        f"model = mlflow.pyfunc.load_model('{MODEL}')\n"
        "scan = base64.b64encode(pathlib.Path(sys.argv[1]).read_bytes()).decode()\n"
        "answer = model.predict(pandas.DataFrame({'scan': [scan]}))\n"
        "pathlib.Path(sys.argv[2]).write_bytes(base64.b64decode(answer['mask'][0]))\n"
    )
    mask = tmp_path / "mask.nii.gz"
    project.run(sys.executable, "-c", script, str(scan), str(mask))
    np.testing.assert_array_equal(predicted, voxels(mask))


def test_server_answers_with_the_same_mask(project, scan, predicted, tmp_path):
    port = free_port()
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "tasks.cli", "serve", "--port", str(port)],
            cwd=project.root,
            env=project.environment,
            stdout=log,
            stderr=log,
        )
    try:
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False)

        def answers() -> bool:
            assert server.poll() is None, (tmp_path / "server.log").read_text()
            try:
                return client.get("/ping").status_code == 200
            except httpx.TransportError:
                return False

        assert wait_until(answers, 180)
        row = {"scan": base64.b64encode(scan.read_bytes()).decode()}
        answer = client.post("/invocations", json={"dataframe_records": [row]})
        assert answer.status_code == 200, answer.text
        (found,) = answer.json()["predictions"]
    finally:
        server.terminate()
        server.wait(30)
    mask = tmp_path / "mask.nii.gz"
    mask.write_bytes(base64.b64decode(found["mask"]))
    np.testing.assert_array_equal(predicted, voxels(mask))
    gate = read_json(project.root / "reports/gate.json")
    model = json.loads(found["statistics"])["model"]
    assert (model["version"], model["weights_sha256"]) == ("1", gate["weights_sha256"])


def test_best_seed_alone_can_be_registered(project, tmp_path):
    project = copy_project(project, tmp_path / "best")
    project.change_params("register", deploy="best")
    told = project.run("dvc", "repro")
    assert "train@" not in "".join(line for line in told.splitlines() if "Running" in line)
    gate = read_json(project.root / "reports/gate.json")
    folder = project.root / "artifacts/train/unet3plus"
    dice = {seed: load_trained(folder / str(seed)).description.val_dice for seed in SEEDS}
    best = max(SEEDS, key=dice.get)
    assert gate["members"] == [best]
    assert gate["weights_sha256"] == digest_weights([folder / str(best)])
    summary = read_json(project.root / "reports/unet3plus/summary.json")
    scores = pd.read_csv(project.root / "reports/unet3plus/cases.csv")
    rows = scores[scores["seed"] == str(best)]
    assert summary["test/dice"] == pytest.approx(rows["dice"].mean(), abs=1e-5)


def test_cross_validation_scores_every_patient_with_a_training_that_had_not_seen_them(
    project, tmp_path
):
    project = copy_project(project, tmp_path / "rotated")
    project.change_params("split", folds=2, rotate=True)
    told = project.run("dvc", "repro", "evaluate@unet")
    assert "Running stage 'train@unet-0'" in told
    assert "Running stage 'train@unet-1'" in told
    split = pd.read_csv(project.root / "artifacts/split.csv", dtype=str)
    left = split[split["fold"] != "test"].set_index("case")["fold_index"]
    scores = pd.read_csv(project.root / "reports/unet/cases.csv", dtype={"seed": str})
    rows = scores[scores["fold"] == "val"]
    assert dict(zip(rows["case"], rows["seed"], strict=True)) == dict(left)
    assert set(scores[scores["fold"] == "test"]["seed"]) == {"0", "1", "ensemble"}
    summary = read_json(project.root / "reports/unet/summary.json")
    assert summary["out_of_fold/num_patients"] == len(left)
    assert summary["out_of_fold/dice"] == pytest.approx(rows["dice"].mean(), abs=1e-5)
    tested = scores[(scores["fold"] == "test") & (scores["seed"] == "ensemble")]
    assert summary["test/dice"] == pytest.approx(tested["dice"].mean(), abs=1e-5)
    history = read_json(project.root / "artifacts/train/unet/1/network.json")
    own = rows[rows["seed"] == "1"].groupby("organ")["dice"].mean()
    assert history["val_dice"] == pytest.approx(own.mean(), abs=0.1)  # on the slices, not the scan
