from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prefect import flow, task
from prefect.settings import get_current_settings
from prefect.testing.utilities import prefect_test_harness
from watching import is_alive, wait_until

from flows.stages import StageFailedError, run_logged

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]

# A flow whose stage starts a worker, as dvc starts a trainer; both write their numbers.
FLOW = """
import sys
from pathlib import Path
from prefect import flow, task
from flows.stages import run_logged

@task
def stage(folder):
    worker = [sys.executable, "-m", "tasks.processes", "sh", "-c"]
    worker += [f"echo $$ > {folder}/worker; exec sleep 120"]
    code = "import os, subprocess, sys; open(sys.argv[1], 'w').write(str(os.getpid()));"
    code += "subprocess.run(sys.argv[2:])"
    run_logged([sys.executable, "-c", code, f"{folder}/stage", *worker], Path())

@flow
def killed(folder, is_submitted):
    stage.submit(folder).result() if is_submitted else stage(folder)

killed(sys.argv[1], sys.argv[2] == "submitted")
"""


@pytest.fixture(scope="module", autouse=True)
def prefect():
    with prefect_test_harness(server_startup_timeout=60):
        yield


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a parent's death")
@pytest.mark.parametrize("way", ["called", "submitted"])
def test_killed_flow_leaves_no_process(tmp_path: Path, way: str) -> None:
    files = [tmp_path / "stage", tmp_path / "worker"]
    server = get_current_settings().to_environment_variables(exclude_unset=True)
    command = [sys.executable, "-c", FLOW, str(tmp_path), way]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **server}) as process:
        assert wait_until(lambda: all(f.exists() and f.read_text() for f in files), 120)
        numbers = [int(file.read_text()) for file in files]
        time.sleep(1)
        assert all(is_alive(pid) for pid in numbers)
        process.kill()
    assert wait_until(lambda: not any(is_alive(pid) for pid in numbers), 10)


def test_program_outlives_other_threads_of_the_flow(tmp_path: Path) -> None:
    @task
    def stage(name: str, duration_s: str) -> None:
        run_logged(["sh", "-c", f"sleep {duration_s}; echo done > {tmp_path / name}"], ROOT)

    @flow
    def several() -> None:
        runs = [stage.submit("short", "0.1"), stage.submit("long", "4")]
        for run in runs:
            run.result()
        stage("last", "1")

    several()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "long", "short"]


def test_missing_program_fails_the_stage_with_its_reason() -> None:
    @flow
    def failing() -> None:
        run_logged(["no-such-program"], ROOT)

    with pytest.raises(StageFailedError, match="code 127: error: cannot run 'no-such-program'"):
        failing()
