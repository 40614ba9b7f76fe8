"""A real MLflow server, for tests of its outages."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlflow

from fullscale.tracking import store as tracking_store
from fullscale.tracking.store import Store


class Server:
    """An MLflow server on a free port, which can be killed and started again."""

    def __init__(self, root: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.root = root
        self.uri = f"http://127.0.0.1:{self.port}"
        self.store = Store(self.uri)
        self._process: subprocess.Popen | None = None

    def start(self, database="mlflow.db"):
        """Start the server and wait until it answers."""
        settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "DO_NOT_TRACK": "1"}
        with (self.root / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "mlflow", "server", "-w", "1"),
                    *("--host", "127.0.0.1", "--port", str(self.port)),
                    *("--backend-store-uri", f"sqlite:///{self.root / database}"),
                    *("--artifacts-destination", str(self.root / "artifacts")),
                ],
                env={**os.environ, **settings, "MLFLOW_DISABLE_TELEMETRY": "true"},
                stdout=log,
                stderr=log,
                start_new_session=True,  # so that its worker is killed, too
            )
        deadline_s = time.monotonic() + 180
        while not self.answers():
            assert self._process.poll() is None, (self.root / "server.log").read_text()
            assert time.monotonic() < deadline_s, "the server did not start"
            time.sleep(0.1)

    def answers(self):
        """Return whether the server answers."""
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:  # noqa: S310
                return answer.status == 200
        except OSError:
            return False

    @contextlib.contextmanager
    def hanging(self):
        """Within, the server accepts connections but answers none."""
        os.killpg(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self._process.pid, signal.SIGCONT)

    def kill(self):
        """Kill the server."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    @property
    def client(self):
        """An MLflow client of the server."""
        return mlflow.MlflowClient(self.uri)

    def num_runs(self):
        """Return the number of runs in the experiment."""
        experiment = self.client.get_experiment_by_name(tracking_store.EXPERIMENT)
        return len(self.client.search_runs([experiment.experiment_id]))
