"""Training on two processes of this machine: the same curve, one run, one checkpoint."""

import subprocess
import time

import mlflow
import pytest
from project import copy_project

from fullscale.training.history import read_history

pytestmark = pytest.mark.slow
NETWORK = "unet3plus"


@pytest.fixture(scope="module")
def project(reproduced_template, tmp_path_factory):
    project = copy_project(reproduced_template, tmp_path_factory.mktemp("distributed"))
    project.change_params(
        "train",
        num_epochs=2,
        optimizer="sgd",
        learning_rate=0.0003,  # with larger ones rounding grows from step to step
    )
    # Dropout draws in each process for itself: without its gate, a step is the same in all.
    recipes = {"architecture": "unet3plus", "deep_supervision": True, "cgm": False}
    project.change_params(
        "recipes", unet3plus=recipes | {"loss_terms": ["focal", "ms_ssim", "iou"]}
    )
    return project


def set_processes(project, count):
    project.change_params("train", devices=count, strategy="ddp" if count > 1 else "auto")


def history(project):
    return read_history(project.root / f"artifacts/train/{NETWORK}/0/history.csv")


def runs(project):
    client = mlflow.MlflowClient(f"sqlite:///{project.root}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name("fullscale")
    return client, client.search_runs([experiment.experiment_id])


@pytest.fixture(scope="module")
def alone(project):
    """History of the network, trained by one process."""
    set_processes(project, 1)
    project.run("python", "-m", "tasks.train", NETWORK, "0")
    return history(project)


def assert_same_curve(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key, value in other.items():
            assert one[key] == pytest.approx(value, abs=5e-4), key


def stop_after(project, num_checkpoints):
    """Train until some checkpoints have been written since the beginning, then interrupt."""
    folder = project.root / f".cache/train/{NETWORK}/0/checkpoints"
    process = subprocess.Popen(
        ["python", "-m", "tasks.train", NETWORK, "0"],
        cwd=project.root,
        env=project.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    end = time.monotonic() + 120
    while not any(int(path.name[:6]) >= num_checkpoints for path in folder.glob("*.ckpt")):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.05)
    process.terminate()
    told, _ = process.communicate(timeout=30)
    assert process.returncode == 143, told
    assert len(list(folder.glob("*.ckpt"))) == 2


def test_processes_of_another_number_resume_with_the_curve_of_one(project, alone):
    """Two processes begin, one resumes, and two that torchrun starts end the training."""
    project.change_params("compute", checkpoint_interval_s=0)
    _, before = runs(project)
    set_processes(project, 2)
    stop_after(project, 6)
    set_processes(project, 1)
    stop_after(project, 14)
    set_processes(project, 2)
    told = project.run(
        "torchrun", "--standalone", "--nproc-per-node=2", "-m", "tasks.train", NETWORK, "0"
    )
    assert told.count(f"{NETWORK}-0 epoch 2/2") == 1
    assert_same_curve(history(project), alone)
    client, after = runs(project)
    assert len(after) == len(before) + 1
    points = client.get_metric_history(after[0].info.run_id, "val/dice")
    assert [point.step for point in points] == [1, 2]
