"""One DVC stage as one Prefect task; what is transient is tried again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from prefect import Task, get_run_logger, task
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError

from flows.devices import count_slots, device_slot
from flows.progress import TrainingProgress
from fullscale.params import Params
from fullscale.runtime.processes import stage_environment
from fullscale.versioning.data_version import restore_data

REGISTER = "register"
RETRY_DELAYS_S = [10.0, 60.0, 300.0]
RETRY_JITTER = 0.5
# How a stage says that the tracking server is away: before it asks anything, and in the middle.
TRANSIENT = (
    re.compile(r"error: the MLflow store \S+ does not answer "),
    re.compile(
        r"mlflow\.exceptions\.MlflowException: API request to .* failed with "
        r"(timeout exception|exception|error code 5\d\d)"
    ),
)


class StageFailedError(Exception):
    """A stage ended with an error; its lines are in the log."""


class TransientError(StageFailedError):
    """A program failed because something it needs is away; trying again may help."""


def run_logged(
    command: list[str],
    root: Path,
    environment: Mapping[str, str] | None = None,
    listen: Callable[[str], None] | None = None,
) -> None:
    """Run a program in `root`, each line of its output to the Prefect log.

    The child stays in this process group, so that cancelling the flow ends it too; it is also
    ended when the task is interrupted, and by the kernel when this process is killed.

    Args:
        command: program and arguments; no shell.
        root: the working directory.
        environment: what is set besides this process's own variables.
        listen: is given each line.

    Raises:
        TransientError: it failed because the tracking server is away.
        StageFailedError: it ended with another code than 0.
    """
    logger = get_run_logger()
    lines = []
    # The kernel ends the child with the thread that started it: this one, which waits for it.
    with subprocess.Popen(
        [sys.executable, "-m", "fullscale.runtime.processes", *command],
        cwd=root,
        env=stage_environment({**os.environ, **(environment or {})}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None  # noqa: S101 - a pipe was asked for
        try:
            for line in process.stdout:
                lines.append(line.rstrip())
                logger.info(lines[-1])
                if listen is not None:
                    listen(lines[-1])
        except BaseException:
            process.terminate()
            raise
    code = process.returncode
    if code:
        told = [line for line in lines if line.startswith(("error:", "ERROR:"))] or lines
        kind = TransientError if is_transient(lines) else StageFailedError
        raise kind(f"{' '.join(command)} ended with code {code}: {' | '.join(told[-3:])}")


def is_transient(lines: Iterable[str]) -> bool:
    """Whether the lines of a failed stage say that the tracking server is away."""
    return any(pattern.match(line) for line in lines for pattern in TRANSIENT)


def _may_pass(task: Any, run: Any, state: Any) -> bool:
    """Whether a failed stage is tried again: what it needs was away, or Prefect had no answer."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, TransientError | ConcurrencySlotAcquisitionError)


@task(task_run_name="data", retry_jitter_factor=RETRY_JITTER)
def _pull_data(root: Path) -> None:
    run_logged(["dvc", "pull", "data.dvc"], root)


def pull_data(root: Path) -> None:
    """Fetch the version of the scans that data.dvc names, unless it is there.

    A remote that does not answer is asked again after `RETRY_DELAYS_S`.
    """
    _pull_data.with_options(**_retries())(root)


@task(task_run_name="data", retry_jitter_factor=RETRY_JITTER)
def _restore_data(folder: Path) -> None:
    restore_data(folder)


def restore_checkout(folder: Path) -> None:
    """As `pull_data` in a checkout of our own, where files that a killed run left may go."""
    _restore_data.with_options(**_retries())(folder)


@task(task_run_name="push", retry_jitter_factor=RETRY_JITTER)
def _push(root: Path) -> None:
    try:
        run_logged(["dvc", "push", "data.dvc", "dvc.yaml"], root)
    except StageFailedError as error:
        raise TransientError(str(error)) from None


def push(root: Path) -> None:
    """Send scans and artefacts to the DVC remote, which is asked again as by `pull_data`.

    Raises:
        TransientError: they were not sent.
    """
    _push.with_options(**_retries())(root)


@task(retry_jitter_factor=RETRY_JITTER, retry_condition_fn=_may_pass)
def reproduce_stage(stage: str, root: Path, environment: Mapping[str, str]) -> None:
    """Reproduce one stage; DVC skips it when nothing it reads has changed."""
    _repro(stage, root, environment)


@task(retry_jitter_factor=RETRY_JITTER, retry_condition_fn=_may_pass)
def reproduce_training(
    stage: str, root: Path, environment: Mapping[str, str], devices_root: Path, num_devices: int
) -> None:
    """As `reproduce_stage`, with devices of its own and its progress shown."""
    progress = TrainingProgress(stage.partition("@")[2])
    with device_slot(devices_root, num_devices) as visible:
        _repro(stage, root, {**environment, **visible}, progress.read)


def _repro(
    stage: str,
    root: Path,
    environment: Mapping[str, str],
    listen: Callable[[str], None] | None = None,
) -> None:
    command = ["dvc", "--wait-for-lock", "repro", "--single-item", stage]
    run_logged(command, root, environment, listen)


def _retries() -> dict[str, Any]:
    return {"retries": len(RETRY_DELAYS_S), "retry_delay_seconds": RETRY_DELAYS_S}


def plan(params: Params) -> list[str]:
    """The stages of dvc.yaml in an order in which each follows what it needs."""
    return [
        "slice",
        "split",
        *(f"train@{network}" for network in params.networks),
        *(f"evaluate@{network}" for network in params.networks),
        REGISTER,
    ]


def run_stages(
    params: Params,
    root: Path,
    environment: Mapping[str, str] | None = None,
    devices_root: Path | None = None,
    before_register: Callable[[], None] | None = None,
) -> None:
    """Reproduce all stages, each as a task of its own: `train@unet` is named `train-unet`.

    Trainings run side by side where the server has several devices for them, else one after the
    other, as all other stages do.

    Args:
        params: of the project at `root`.
        root: the project, or a checkout of it.
        environment: what is set for every stage besides this process's own variables.
        devices_root: where GPUs in use are noted; None is `root`.
        before_register: is called when everything but stage register is done.

    Raises:
        StageFailedError: a stage failed; trainings beside it went on to their end.
    """
    set_for_all = environment or {}
    is_side_by_side = count_slots() > 1
    for kind, stages in groupby(plan(params), key=lambda stage: stage.partition("@")[0]):
        if kind != "train":
            for stage in stages:
                if stage == REGISTER and before_register is not None:
                    before_register()
                _named(reproduce_stage, stage)(stage, root, set_for_all)
            continue
        running = []
        for stage in stages:
            training = _named(reproduce_training, stage)
            arguments = (stage, root, set_for_all, devices_root or root, params.train.devices)
            if is_side_by_side:
                running.append(training.submit(*arguments))
            else:
                training(*arguments)
        for future in running:
            future.wait()
        for future in running:
            future.result()


def _named(stage_task: Task[Any, None], stage: str) -> Task[Any, None]:
    return stage_task.with_options(task_run_name=stage.replace("@", "-"), **_retries())
