"""Where the seconds of the pipeline go: each stage by itself, in a fresh clone of the last commit.

    python -m benchmarks.pipeline

It takes as long as `make repro` without the environment. Every stage runs, also one that DVC would
skip. Training and validation are timed by the trainer itself; the import is that of the stage's
module in a process of its own.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine
from fullscale.params import Params, load_params
from fullscale.runtime.processes import stage_environment
from fullscale.tracking.store import NETWORK_TAG, SEED_TAG, connect, default_store

ROOT = Path(__file__).parents[1]
TIMES = ("train/time/training_s", "train/time/validation_s")


class Cost(NamedTuple):
    """Seconds of a program.

    Attributes:
        wall_s: from its start to its end.
        processor_s: of all cores, its children's included.
    """

    wall_s: float
    processor_s: float


def run(command: Sequence[str], folder: Path) -> Cost:
    """Run a program to its end; it must succeed."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        command,
        cwd=folder,
        env=stage_environment({**os.environ, "PYTHONPATH": str(folder)}),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(
        time.perf_counter() - started,
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    )


def list_stages(params: Params) -> list[str]:
    """Return the stages of dvc.yaml in the order in which they run."""
    trainings = [f"train@{name}-{seed}" for name in params.networks for seed in params.seeds]
    return ["slice", "split", *trainings, *(f"evaluate@{n}" for n in params.networks), "register"]


def sum_times(folder: Path) -> dict[str, list[float]]:
    """Return the seconds of training and of validation for the stage of each training."""
    client, experiment_id = connect(default_store(folder))
    return {
        f"train@{tags[NETWORK_TAG]}-{tags[SEED_TAG]}": [
            sum(value.value for value in client.get_metric_history(each.info.run_id, key))
            for key in TIMES
        ]
        for each in client.search_runs([experiment_id])
        if SEED_TAG in (tags := each.data.tags)  # not of an ensemble
    }


def main() -> None:
    """Run all stages and print a row for each."""
    console = Console()
    console.print(describe_machine(torch.device("cpu")))
    table = Table(title="Seconds of the pipeline")
    for heading in ("stage", "all", "processor", "import", "training", "validation"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "project"
        run(["git", "clone", "--quiet", str(ROOT), str(folder)], ROOT)
        run(["dvc", "pull", "--quiet", "data.dvc"], folder)
        stages = list_stages(load_params(folder / "params.yaml"))
        costs = {}
        for stage in stages:
            # Not skipped, though the weights come out as dvc.lock has them.
            repro = ["dvc", "repro", "--quiet", "--single-item", "--force", stage]
            costs[stage] = run(repro, folder)
            console.print(f"{stage}: {costs[stage].wall_s:.1f} s")
        times = sum_times(folder)
        for stage, cost in costs.items():
            module = f"tasks.{stage.partition('@')[0]}"
            imported = run([sys.executable, "-c", f"import {module}"], folder)
            parts = [f"{seconds:.1f}" for seconds in times.get(stage, [])] or ["", ""]
            row = (cost.wall_s, cost.processor_s, imported.wall_s)
            table.add_row(stage, *(f"{seconds:.1f}" for seconds in row), *parts)
        total = Cost(*(sum(column) for column in zip(*costs.values(), strict=True)))
        table.add_row("all", f"{total.wall_s:.1f}", f"{total.processor_s:.1f}", "", "", "")
    console.print(table)


if __name__ == "__main__":
    main()
