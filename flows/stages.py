"""One DVC stage as one Prefect task; transient failures are retried."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from itertools import groupby, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prefect import Task, get_run_logger, task
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError

from flows.devices import count_slots, device_slot
from flows.progress import TrainingProgress
from fullscale.params import Params
from fullscale.runtime.errors import EX_TEMPFAIL
from fullscale.runtime.events import EVENTS_VARIABLE, EventReader
from fullscale.runtime.processes import bind_to_parent, stage_environment
from fullscale.runtime.progress import training_title
from fullscale.versioning.data_version import restore_data

REGISTER = "register"
RETRY_DELAYS_S = [10.0, 60.0, 300.0]
RETRY_JITTER = 0.5
NUM_QUOTED_LINES = 3

Event = Mapping[str, Any]


class StageFailedError(Exception):
    """A program ended with an error; its lines are in the run's log."""


class TransientError(StageFailedError):
    """A program failed because something it needs is away; trying again may help."""


def run_logged(
    command: list[str],
    root: Path,
    environment: Mapping[str, str] | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> None:
    """Run a program in `root` and log each line of its output in the Prefect run.

    The program stays in this process group, so that cancelling the flow ends it too. It also ends
    when the task is interrupted, and by the kernel when this process is killed.

    Args:
        command: program and arguments; no shell.
        root: the working directory.
        environment: variables to set in addition to this process's own.
        on_event: called with each event of `fullscale.runtime.events` while the program runs.

    Raises:
        TransientError: it, or a stage that it ran, failed with exit code 75 (EX_TEMPFAIL).
        StageFailedError: it ended with another code than 0.
    """
    logger = get_run_logger()
    lines: list[str] = []
    failures: list[Event] = []
    with TemporaryDirectory(prefix="fullscale-events-") as folder:
        reader = EventReader(Path(folder) / "events.jsonl")

        def read_events() -> None:
            for event in reader.read_new():
                if event["event"] == "failed":
                    failures.append(event)
                if on_event is not None:
                    on_event(event)

        given = {**os.environ, **(environment or {}), EVENTS_VARIABLE: f"{folder}/events.jsonl"}
        # The kernel ends the program when the thread that started it ends, so the same thread
        # must wait for it. A task's timeout would not interrupt this wait.
        with subprocess.Popen(
            bind_to_parent(command),
            cwd=root,
            env=stage_environment(given),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None  # noqa: S101 - a pipe was asked for
            try:
                for line in process.stdout:
                    lines.append(line.rstrip())
                    logger.info(lines[-1])
                    read_events()
            except BaseException:
                process.terminate()
                raise
        read_events()
    code = process.returncode
    if code:
        quoted = [str(event["message"]) for event in failures]
        quoted = quoted or [line for line in lines if line.startswith(("error:", "ERROR:"))]
        # DVC's own exit code does not depend on that of the stage that failed.
        codes = {code, *(event["exit_code"] for event in failures)}
        kind = TransientError if EX_TEMPFAIL in codes else StageFailedError
        reason = " | ".join((quoted or lines)[-NUM_QUOTED_LINES:])
        raise kind(f"{' '.join(command)} ended with code {code}: {reason}")


def _may_succeed_later(task: Any, run: Any, state: Any) -> bool:
    """Return whether to retry: a service was away, or Prefect did not answer about its slots."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, TransientError | ConcurrencySlotAcquisitionError)


@task(task_run_name="data", retry_jitter_factor=RETRY_JITTER)
def _pull_data(root: Path) -> None:
    run_logged(["dvc", "pull", "data.dvc"], root)


def pull_data(root: Path) -> None:
    """Fetch the version of the scans that data.dvc names, unless it is there.

    Retried after `RETRY_DELAYS_S` where the DVC remote does not answer.
    """
    _pull_data.with_options(**_retries())(root)


@task(task_run_name="data", retry_jitter_factor=RETRY_JITTER)
def _restore_data(folder: Path) -> None:
    restore_data(folder)


def restore_checkout(folder: Path) -> None:
    """Fetch scans as `pull_data` does, in a checkout whose leftover files may be overwritten."""
    _restore_data.with_options(**_retries())(folder)


@task(task_run_name="push", retry_jitter_factor=RETRY_JITTER)
def _push(root: Path) -> None:
    try:
        run_logged(["dvc", "push", "data.dvc", "dvc.yaml"], root)
    except StageFailedError as error:
        raise TransientError(str(error)) from None


def push(root: Path) -> None:
    """Send scans and artefacts to the DVC remote; retried as `pull_data`.

    Raises:
        TransientError: they were not sent.
    """
    _push.with_options(**_retries())(root)


@task(retry_jitter_factor=RETRY_JITTER, retry_condition_fn=_may_succeed_later)
def reproduce_stage(stage: str, root: Path, environment: Mapping[str, str]) -> None:
    """Reproduce one stage; DVC skips it when nothing it reads has changed."""
    _repro(stage, root, environment)


@task(retry_jitter_factor=RETRY_JITTER, retry_condition_fn=_may_succeed_later)
def reproduce_training(
    stage: str, root: Path, environment: Mapping[str, str], devices_root: Path, num_devices: int
) -> None:
    """Reproduce a training on devices that no other training uses, and show its progress."""
    progress = TrainingProgress(stage.partition("@")[2])
    with device_slot(devices_root, num_devices) as visible:
        _repro(stage, root, {**environment, **visible}, progress.show)


def _repro(
    stage: str,
    root: Path,
    environment: Mapping[str, str],
    on_event: Callable[[Event], None] | None = None,
) -> None:
    # DVC waits only 3 s for another process's lock unless this option comes before the command.
    command = ["dvc", "--wait-for-lock", "repro", "--single-item", stage]
    run_logged(command, root, environment, on_event)


def _retries() -> dict[str, Any]:
    """Return the options of a task that is retried; read at each call, so that they can change."""
    return {"retries": len(RETRY_DELAYS_S), "retry_delay_seconds": RETRY_DELAYS_S}


def plan(params: Params) -> list[str]:
    """Return the stages of dvc.yaml, each after those it depends on."""
    return [
        "slice",
        "split",
        *(f"train@{training_title(*each)}" for each in product(params.networks, params.seeds)),
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
    """Reproduce all stages, each as one task: the task of `train@unet-0` is named `train-unet-0`.

    Trainings run at the same time where the server's limit allows several, else one after another.
    All other stages run one after another.

    Args:
        params: of the project at `root`.
        root: the project, or a checkout of it.
        environment: variables to set for every stage in addition to this process's own.
        devices_root: the project whose .cache/devices locks the GPUs in use; None is `root`.
        before_register: called after all other stages and before stage register.

    Raises:
        StageFailedError: a stage failed; other trainings that had started were run to their end.
    """
    set_for_all = environment or {}
    is_parallel = count_slots() > 1
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
            if is_parallel:
                running.append(training.submit(*arguments))
            else:
                training(*arguments)
        for future in running:
            future.wait()  # all of them, before the first failure is raised
        for future in running:
            future.result()


def _named(stage_task: Task[Any, None], stage: str) -> Task[Any, None]:
    return stage_task.with_options(task_run_name=stage.replace("@", "-"), **_retries())
