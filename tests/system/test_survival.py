"""A real `dvc repro` is killed in every way at random moments, and ends as if it never had been."""

import fcntl
import os
import pty
import random
import shutil
import signal
import subprocess
import termios
import time

import mlflow
import psutil
import pytest
from project import copy_project
from watching import wait_until

from fullscale.runtime.files import file_sha256

pytestmark = pytest.mark.slow
NETWORK = "unet3plus"
STAGE = f"train@{NETWORK}-0"
REPRO = ["dvc", "--wait-for-lock", "repro", "--single-item", "--force", STAGE]
OUTPUTS = ("weights.safetensors", "network.json", "history.csv")
KILLS = ("trainer", "dvc", "group", "ctrl-c", "terminate", "terminal")
ON_TERMINAL = ("ctrl-c", "terminal")
LONGEST_STOP_S = 20
LONGEST_START_S = 120


@pytest.fixture(scope="module")
def project(reproduced_template, tmp_path_factory):
    """Slices and split are there; a checkpoint is due after every step, two workers read."""
    project = copy_project(reproduced_template, tmp_path_factory.mktemp("survival"))
    project.change_params("train", num_epochs=2, batch_size=1)
    project.change_params("compute", checkpoint_interval_s=0, num_loader_workers=2)
    return project


@pytest.fixture(scope="module")
def undisturbed(project, forget_runs):
    """Checksums of what a training leaves that nothing disturbs; its run is the only one."""
    shutil.rmtree(project.root / ".cache/train", ignore_errors=True)
    forget_runs(project)
    project.run(*REPRO)
    return outputs(project)


def outputs(project):
    folder = project.root / "artifacts/train" / NETWORK / "0"
    return {name: file_sha256(folder / name) for name in OUTPUTS}


def checkpoints(project):
    folder = project.root / f".cache/train/{NETWORK}/0/checkpoints"
    return sorted(folder.glob("*.ckpt"))


def number(checkpoint):
    """Return the number that its name begins with: the count of checkpoints up to it."""
    return int(checkpoint.name[:6])


def processes(project):
    """Every process that works in the project, as pid: command line."""
    found = {}
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(project.root) and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


class Repro:
    """`dvc repro`, on a terminal of its own if asked."""

    def __init__(self, project, log, on_terminal):
        self.project = project
        self.terminal, slave = pty.openpty()
        self.process = subprocess.Popen(
            REPRO,
            cwd=project.root,
            env=project.environment,
            stdin=slave,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=(lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)) if on_terminal else None,
        )
        os.close(slave)

    def trainer(self):
        """The pid of the training process, which is the oldest of its command."""
        return min(pid for pid, line in processes(self.project).items() if "tasks.train" in line)

    def kill(self, kind):
        """End it in some way, and wait until nothing of it is left."""
        if kind == "trainer":
            os.kill(self.trainer(), signal.SIGKILL)
        elif kind == "dvc":
            self.process.kill()
        elif kind == "group":
            os.killpg(self.process.pid, signal.SIGKILL)
        elif kind == "ctrl-c":
            os.write(self.terminal, b"\x03")
        elif kind == "terminate":
            os.kill(self.trainer(), signal.SIGTERM)
        elif kind == "terminal":
            os.close(self.terminal)
        started = time.monotonic()
        self.process.wait(timeout=LONGEST_STOP_S)
        assert wait_until(lambda: not processes(self.project), LONGEST_STOP_S), kind
        if kind != "terminal":
            os.close(self.terminal)
        return time.monotonic() - started


def test_training_killed_at_random_moments_ends_with_the_same_weights(
    project, undisturbed, tmp_path
):
    chance = random.Random(os.environ.get("SURVIVAL_SEED", "7"))
    damaged = None
    for kind in KILLS:
        before = checkpoints(project)
        with (tmp_path / "log").open("w") as log:
            repro = Repro(project, log, kind in ON_TERMINAL)
            more = chance.randint(12, 16)  # 6 kills in 2 epochs of 64 steps, most after the first

            def has_trained(before=before, more=more):
                now = checkpoints(project)
                return now and (not before or number(now[-1]) >= number(before[-1]) + more)

            assert wait_until(has_trained, LONGEST_START_S), kind
            time.sleep(chance.random() * 0.1)
            repro.kill(kind)
        told = (tmp_path / "log").read_text()
        assert repro.process.returncode != 0, told
        assert "epoch 2/2" not in told
        if kind in ("ctrl-c", "terminate"):
            assert "run again to resume from there" in told
            assert f"exited with {130 if kind == 'ctrl-c' else 143}" in told
        if damaged is not None:
            assert f"{damaged.relative_to(project.root)} is damaged" in told
            damaged = None
        if kind == "group":
            damaged = checkpoints(project)[-1]
            os.truncate(damaged, damaged.stat().st_size // 2)
    told = project.run(*REPRO)
    assert "epoch 2/2" in told
    assert "epoch 1/2" not in told
    assert outputs(project) == undisturbed
    assert checkpoints(project) == []

    client = mlflow.MlflowClient(f"sqlite:///{project.root}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name("fullscale")
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]
    for run in runs:
        points = client.get_metric_history(run.info.run_id, "train/total")
        assert [point.step for point in points] == [1, 2]
    again, first = (run.data.metrics["val/dice"] for run in runs)
    assert again == first


def train_until(project, condition):
    """Train until something is true, stop; returns what the trainer said."""
    process = subprocess.Popen(
        ["python", "-m", "tasks.train", NETWORK, "0"],
        cwd=project.root,
        env=project.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert wait_until(condition, LONGEST_START_S)
    process.terminate()
    told, _ = process.communicate(timeout=LONGEST_STOP_S)
    assert process.returncode == 143, told
    return told


def test_checkpoint_of_another_configuration_or_data_is_refused(project):
    for left in checkpoints(project):
        left.unlink()
    train_until(project, lambda: len(checkpoints(project)) == 2)
    old = checkpoints(project)[-1]
    about = project.root / "artifacts/slices" / training_case(project) / "case.json"
    content = about.read_text()
    project.change_params("train", weight_decay=0.002)
    about.write_text(content.replace("{", "{ ", 1))
    try:
        told = train_until(project, lambda: number(checkpoints(project)[-1]) >= number(old) + 2)
    finally:
        about.write_text(content)
        project.change_params("train", weight_decay=0.0001)
    assert "is not continued, training starts anew: " in told
    assert "train.weight_decay was 0.0001, is 0.002" in told
    assert f"slices of train case {about.parent.name} was" in told
    assert f"stopped in epoch 1 after step {number(checkpoints(project)[-1]) - number(old)}" in told


def training_case(project):
    rows = (project.root / "artifacts/split.csv").read_text().splitlines()
    return next(row.split(",")[0] for row in rows if row.endswith(",train"))
