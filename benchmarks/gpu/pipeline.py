"""Measure the pipeline itself on the sample, in a clone: each stage as `dvc repro` runs it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.settings import Report, Settings

LAST_LINES = 5


def run(settings: Settings, report: Report) -> None:
    """Measure; a stage that fails ends the part, because the next ones need it."""
    with tempfile.TemporaryDirectory() as temporary:
        clone = Path(temporary) / "project"
        call(Path(), "git", "clone", "--quiet", str(Path().resolve()), str(clone))
        call(clone, "dvc", "pull", "--quiet", "data.dvc")
        for stage in settings.stages:
            started = time.perf_counter()
            try:
                call(clone, "dvc", "repro", "--force", "--single-item", stage)
            except RuntimeError as error:
                report.add(stage, {"error": str(error)})
                return
            report.add(stage, {"seconds": time.perf_counter() - started})


def call(folder: Path, *command: str) -> None:
    """Run a program of this environment.

    Raises:
        RuntimeError: it failed; the message is the end of its output.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(folder.resolve())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)}: " + " / ".join(done.stdout.splitlines()[-LAST_LINES:])
        )
