"""Training on two processes of this machine: the same curve, one run, one checkpoint."""

import subprocess
import time

import mlflow
import pytest
from project import clone_project

from fullscale.training.history import read_history

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = clone_project(tmp_path_factory.mktemp("distributed") / "project")
    project.run("dvc", "pull", "--quiet", "data.dvc")
    project.change_params("slice", size_px=32)
    project.change_params(
        "train",
        width=4,
        num_epochs=2,
        num_picture_slices=0,
        optimizer="sgd",
        learning_rate=0.0003,  # with larger ones rounding grows from step to step
    )
    # Dropout draws in each process for itself: without its gate, a step is the same in all.
    recipes = {"architecture": "unet3plus", "deep_supervision": True, "cgm": False}
    project.change_params(
        "recipes", unet3plus=recipes | {"loss_terms": ["focal", "ms_ssim", "iou"]}
    )
    project.run("dvc", "repro", "split")
    return project


def set_processes(project, count):
    project.change_params("train", devices=count, strategy="ddp" if count > 1 else "auto")


def history(project, name):
    return read_history(project.root / f"artifacts/train/{name}/history.csv")


def runs(project):
    client = mlflow.MlflowClient(f"sqlite:///{project.root}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name("fullscale")
    return client, client.search_runs([experiment.experiment_id])


@pytest.fixture(scope="module")
def alone(project):
    """Histories of both networks, trained by one process."""
    set_processes(project, 1)
    found = {}
    for name in ("unet", "unet3plus"):
        project.run("python", "-m", "tasks.train", name)
        found[name] = history(project, name)
    return found


def assert_same_curve(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key, value in other.items():
            assert one[key] == pytest.approx(value, abs=5e-4), key


@pytest.mark.parametrize("name", ["unet", "unet3plus"])
def test_two_processes_give_the_curve_of_one(project, alone, name):
    _, before = runs(project)
    set_processes(project, 2)
    told = project.run("python", "-m", "tasks.train", name)
    assert told.count(f"{name} epoch 2/2") == 1
    assert_same_curve(history(project, name), alone[name])
    client, after = runs(project)
    assert len(after) == len(before) + 1
    points = client.get_metric_history(after[0].info.run_id, "val/dice")
    assert [point.step for point in points] == [1, 2]


def test_torchrun_gives_the_same_curve(project, alone):
    set_processes(project, 2)
    told = project.run(
        "torchrun", "--standalone", "--nproc-per-node=2", "-m", "tasks.train", "unet"
    )
    assert told.count("unet epoch 2/2") == 1
    assert_same_curve(history(project, "unet"), alone["unet"])


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_other_number_of_processes_goes_on(project, alone, before, after):
    project.change_params("compute", checkpoint_interval_s=0)
    set_processes(project, before)
    folder = project.root / ".cache/train/unet/checkpoints"
    process = subprocess.Popen(
        ["python", "-m", "tasks.train", "unet"],
        cwd=project.root,
        env=project.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    end = time.monotonic() + 120
    while not any(int(path.name[:6]) >= 12 for path in folder.glob("*.ckpt")):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.05)
    process.terminate()
    told, _ = process.communicate(timeout=30)
    assert process.returncode == 143, told
    assert len(list(folder.glob("*.ckpt"))) == 2
    _, runs_before = runs(project)
    set_processes(project, after)
    told = project.run("python", "-m", "tasks.train", "unet")
    assert_same_curve(history(project, "unet"), alone["unet"])
    _, runs_after = runs(project)
    assert len(runs_after) == len(runs_before)
