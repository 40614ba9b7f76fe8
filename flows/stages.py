"""One DVC stage as one Prefect task."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from prefect import get_run_logger, task

from tasks.processes import stage_environment


class StageFailedError(Exception):
    """A stage ended with an error; its lines are in the log."""


def run_logged(command: list[str], root: Path) -> None:
    """Run a program in `root`, each line of its output to the Prefect log.

    The child stays in this process group, so that cancelling the flow ends it too; it is also
    ended when the task is interrupted, and by the kernel when this process is killed.

    Raises:
        StageFailedError: it ended with another code than 0.
    """
    logger = get_run_logger()
    lines = []
    # The kernel ends the child with the thread that started it: this one, which waits for it.
    with subprocess.Popen(
        [sys.executable, "-m", "tasks.processes", *command],
        cwd=root,
        env=stage_environment(os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None  # noqa: S101 - a pipe was asked for
        try:
            for line in process.stdout:
                lines.append(line.rstrip())
                logger.info(lines[-1])
        except BaseException:
            process.terminate()
            raise
    code = process.returncode
    if code:
        told = [line for line in lines if line.startswith(("error:", "ERROR:"))] or lines
        raise StageFailedError(
            f"{' '.join(command)} ended with code {code}: {' | '.join(told[-3:])}"
        )


@task(task_run_name="data")
def pull_data(root: Path) -> None:
    """Fetch the version of the scans that data.dvc names, unless it is there."""
    run_logged(["dvc", "pull", "data.dvc"], root)


@task
def reproduce_stage(stage: str, root: Path) -> None:
    """Reproduce one stage; DVC skips it when nothing it reads has changed."""
    run_logged(["dvc", "--wait-for-lock", "repro", "--single-item", stage], root)


def run_stage(stage: str, root: Path) -> None:
    """Reproduce a stage such as `train@unet` as a task named `train-unet`."""
    reproduce_stage.with_options(task_run_name=stage.replace("@", "-"))(stage, root)
