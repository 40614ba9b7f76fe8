"""`python -m flows.services` on a clone of the project, with flows that do as tests tell them."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import psutil
from project import ROOT, Project, clone_project
from watching import is_alive, wait_until

from fullscale.runtime.processes import stage_environment

# A retraining as the engine sees it: a program below a flow that holds the device's slot.
RETRAIN = """
import os
from pathlib import Path
from prefect import flow
from prefect.concurrency.sync import concurrency
from flows.stages import run_logged

@flow(name="retrain", log_prints=True)
def retrain(root: Path | None = None, reason: str = "by hand"):
    Path("flow.pid").write_text(str(os.getpid()))
    with concurrency("fullscale-device", occupy=1, lease_duration=60, strict=False):
        run_logged(["sh", "trainer.sh"], Path())
"""
UNTIL_GO = "rm -f go; until [ -e go ]; do sleep 0.1; done"
DEPLOYMENTS = ["promote-check", "reproduce", "retrain", "watch-inbox"]
LOOK = """
from pathlib import Path
from prefect import flow
from prefect.runtime import flow_run

@flow(name="{name}")
def {function}(root: Path | None = None):
    with Path("{function}.txt").open("a") as runs:
        runs.write(flow_run.id + "\\n")
"""


def free_port() -> int:
    """A port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_listening(port: int) -> bool:
    """Return whether a program of this machine listens on a port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def make_project(folder: Path, databases: Path | None = None) -> Project:
    """A clone whose flows are those above, with ports of its own.

    Args:
        folder: new.
        databases: folders to copy into it, of the fixture `empty_databases`.
    """
    project = clone_project(folder, with_sample=False)
    if databases is not None:
        shutil.copytree(databases, project.root, dirs_exist_ok=True)
    flows = project.root / "flows"
    (flows / "retrain.py").write_text(RETRAIN)
    (flows / "watch_inbox.py").write_text(LOOK.format(name="watch-inbox", function="watch_inbox"))
    (flows / "promote_check.py").write_text(
        LOOK.format(name="promote-check", function="promote_check")
    )
    write_trainer(project, "sleep 1")
    project.environment |= {
        "FULLSCALE_MLFLOW_PORT": str(free_port()),
        "FULLSCALE_PREFECT_PORT": str(free_port()),
        "PYTHONPATH": str(ROOT),
    }
    return project


def write_trainer(project: Project, command: str) -> None:
    """Let the next retraining run a shell line."""
    (project.root / "trainer.sh").write_text(f"echo $$ > trainer.pid\n{command}\n")


class RunningServices:
    """The services of a project, and what is seen of them from outside."""

    def __init__(self, project: Project) -> None:
        self.project = project
        environment = project.environment
        self.mlflow_url = f"http://127.0.0.1:{environment['FULLSCALE_MLFLOW_PORT']}"
        self.prefect_url = f"http://127.0.0.1:{environment['FULLSCALE_PREFECT_PORT']}"
        login = environment.get("PREFECT_API_AUTH_STRING")
        self.api = httpx.Client(
            base_url=f"{self.prefect_url}/api/",
            auth=tuple(login.split(":", 1)) if login else None,
            timeout=30,
        )
        self.log_path = project.root / "services.log"
        self.process: subprocess.Popen | None = None

    def launch(self, log) -> subprocess.Popen:
        """Begin to start them."""
        return subprocess.Popen(
            [sys.executable, "-m", "flows.services"],
            cwd=self.project.root,
            env=self.project.environment,
            stdout=log,
            stderr=log,
        )

    def start(self, timeout_s: float = 300) -> None:
        """Start them and wait until they say that they are there."""
        with self.log_path.open("wb") as log:
            self.process = self.launch(log)
        assert wait_until(lambda: self.is_up() or self.have_ended(), timeout_s)
        assert self.is_up(), self.log()

    def start_if_ended(self) -> None:
        """Start them where no test has, or one has ended them."""
        if self.have_ended():
            self.start()

    def have_ended(self) -> bool:
        """Return whether they do not run: not started yet, or ended by a test."""
        return self.process is None or self.process.poll() is not None

    def is_up(self) -> bool:
        """Return whether everything was started."""
        return "Ctrl-C stops all" in self.log()

    def has_ports(self) -> bool:
        """Return whether a server listens on one of the ports."""
        names = ("FULLSCALE_MLFLOW_PORT", "FULLSCALE_PREFECT_PORT")
        return any(is_listening(int(self.project.environment[name])) for name in names)

    def log(self) -> str:
        """All that was printed."""
        return self.log_path.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """All processes below the one that keeps them."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def find(self, words: str) -> list[psutil.Process]:
        """Processes whose command line holds some words."""
        found = []
        for process in self.processes():
            try:
                if words in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 60) -> list[int]:
        """End them by a signal; returns which of their processes are left."""
        pids = [process.pid for process in self.processes()]
        self.process.send_signal(number)
        self.process.wait(timeout_s)
        return [pid for pid in pids if is_alive(pid)]

    def kill_left(self) -> None:
        """End what a failed test left."""
        if not self.have_ended():
            left = self.processes()
            self.process.kill()
            self.process.wait()
            for process in left:
                if process.is_running():
                    process.kill()

    def get(self, path: str) -> dict:
        """Return what Prefect's API has under a path."""
        return self._ask("GET", path).json()

    def post(self, path: str, content: dict | None = None) -> object:
        """Return the answer of Prefect's API."""
        return self._ask("POST", path, json=content or {}).json()

    def patch(self, path: str, content: dict) -> None:
        """Let Prefect change something."""
        self._ask("PATCH", path, json=content)

    def _ask(self, *request: str, **more: object) -> httpx.Response:
        """Ask Prefect's API, again where its database is locked, as its own clients do."""
        for _ in range(10):
            answer = self.api.request(*request, **more)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(2)
        return answer.raise_for_status()

    def deployment_names(self) -> list[str]:
        """Return the names of all deployments, sorted."""
        return sorted(item["name"] for item in self.post("deployments/filter"))

    def deployment(self, name: str) -> dict:
        """Return Prefect's record of a deployment."""
        return self.get(f"deployments/name/{name}/{name}")

    def pause(self, name: str) -> None:
        """Let a deployment's schedules start no more runs."""
        self.post(f"deployments/{self.deployment(name)['id']}/pause_deployment")

    def start_run(self, name: str, state: dict | None = None) -> str:
        """Ask for a run of a deployment, waiting for the worker or in a state; returns its id."""
        content = {"state": state} if state else {}
        path = f"deployments/{self.deployment(name)['id']}/create_flow_run"
        return self.post(path, content)["id"]

    def tell(self, name: str, run_id: str, event: str, age: timedelta = timedelta()) -> None:
        """Send an event of a deployment's run, as its worker does, that occurred some time ago."""
        deployment_id = self.deployment(name)["id"]
        told = {
            "id": str(uuid.uuid4()),
            "event": event,
            "occurred": (datetime.now(UTC) - age).isoformat(),
            "resource": {"prefect.resource.id": f"prefect.flow-run.{run_id}"},
            "related": [
                {
                    "prefect.resource.id": f"prefect.deployment.{deployment_id}",
                    "prefect.resource.role": "deployment",
                }
            ],
        }
        self._ask("POST", "events", json=[told])

    def state(self, run_id: str) -> str:
        """The name of a run's state; empty while the server is away."""
        try:
            return self.api.get(f"flow_runs/{run_id}").json()["state"]["name"]
        except (httpx.HTTPError, json.JSONDecodeError, KeyError):
            return ""

    def runs(self, name: str, state: str) -> list[dict]:
        """A deployment's runs in a state."""
        wanted = {
            "deployments": {"name": {"any_": [name]}},
            "flow_runs": {"state": {"name": {"any_": [state]}}},
        }
        return self.post("flow_runs/filter", wanted)

    def num_busy_devices(self) -> int:
        """Return the number of slots in use."""
        return self.get("v2/concurrency_limits/fullscale-device")["active_slots"]

    def start_training(self, command: str) -> tuple[str, int, int]:
        """Start a retraining whose trainer runs a shell line; returns its id and process ids."""
        files = [self.project.root / name for name in ("flow.pid", "trainer.pid")]
        for file in files:
            file.unlink(missing_ok=True)
        write_trainer(self.project, command)
        run_id = self.start_run("retrain")
        assert wait_until(lambda: all(f.exists() and f.read_text().strip() for f in files), 90), (
            self.log()
        )
        return run_id, *(int(file.read_text()) for file in files)


def emit(project: Project, prefect_url: str, data_version: str, num_accepted: int) -> None:
    """Tell Prefect that scans landed, as the inbox's flow does."""
    code = (
        "import sys; from flows.events import emit;"
        "from fullscale.versioning.data_version import Announcement;"
        "emit(Announcement(sys.argv[1], '', ('case',) * int(sys.argv[2]), 0))"
    )
    subprocess.run(
        [sys.executable, "-c", code, data_version, str(num_accepted)],
        cwd=project.root,
        env=stage_environment({**project.environment, "PREFECT_API_URL": f"{prefect_url}/api"}),
        check=True,
        timeout=60,
    )
