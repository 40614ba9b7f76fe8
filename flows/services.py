"""Run MLflow's server, Prefect's server and a worker with one command, until Ctrl-C.

`python -m flows.services` starts both servers at once, waits until they answer, creates work pool,
limits and deployments, and starts the worker. A program that ends by itself later is restarted.
"""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import deque
from pathlib import Path
from threading import Event, Thread
from types import FrameType

import psutil

from flows.servers.project_folder import VARIABLE
from flows.servers.service_settings import (
    Service,
    Services,
    SettingsError,
    convert_stores,
    plan_services,
    write_server_files,
)
from fullscale.inbox.inbox import make_inbox
from fullscale.runtime.errors import StageError
from fullscale.runtime.processes import bind_to_parent
from fullscale.tracking.pages import models_url
from fullscale.versioning.git import CODE_VARIABLE, find_code

START_TIMEOUT_S = 180.0  # databases are made at the first start
SERVER_GRACE_S = 10.0
WORKER_GRACE_S = 35.0  # a trainer has 25 s to save its state
RESTART_PAUSE_S = 2.0
POLL_INTERVAL_S = 0.2
# The servers are on this machine: a proxy that the environment names cannot reach them.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))

# Set by signals. An exception raised by the handler could come between the start of a program and
# the line that takes note of it, and the program would be left behind.
_interrupted = Event()


class ServiceError(Exception):
    """A program did not start."""


class InterruptionError(Exception):
    """A signal asked for the end."""


def pause(seconds: float) -> None:
    """Wait.

    Raises:
        InterruptionError: a signal asked for the end, before or during the wait.
    """
    if _interrupted.wait(seconds):
        raise InterruptionError


class RunningService:
    """A service in a separate process group, which Ctrl-C in the terminal does not reach.

    The kernel ends it when this process is killed.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self._last_lines: deque[str] = deque(maxlen=15)
        self._process = subprocess.Popen(
            bind_to_parent(service.command),
            env=dict(service.environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._printer = Thread(target=self._print_lines, daemon=True)
        self._printer.start()

    def is_running(self) -> bool:
        """Return whether the process has not ended."""
        return self._process.poll() is None

    def answers(self) -> bool:
        """Return whether its health check succeeds; True for a service without one."""
        if not self.service.health_url:
            return True
        try:
            with DIRECT.open(self.service.health_url, timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def describe_end(self) -> str:
        """Return its exit code and last lines of output."""
        self._printer.join(timeout=1)
        return f"it ended with code {self._process.poll()}:\n{self.last_lines()}"

    def last_lines(self) -> str:
        """Return its last lines of output so far."""
        return "\n".join(list(self._last_lines))

    def stop(self, grace_s: float) -> None:
        """End it and its children: with one SIGTERM each, and SIGKILL after `grace_s`.

        Children are ended first and separately: a Prefect run that gets SIGTERM twice cannot report
        its end.
        """
        end_s = time.monotonic() + grace_s
        with contextlib.suppress(psutil.NoSuchProcess):
            started = psutil.Process(self._process.pid).children()
            for process in started:
                process.terminate()
            psutil.wait_procs(started, timeout=grace_s)
        self._process.terminate()
        while self._is_group_alive() and time.monotonic() < end_s:
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _is_group_alive(self) -> bool:
        self._process.poll()  # else the zombie process would still count as alive
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def _print_lines(self) -> None:
        assert self._process.stdout is not None  # noqa: S101 - a pipe was asked for
        for line in self._process.stdout:
            self._last_lines.append(line.rstrip())
            print(f"{self.service.name:8}| {line.rstrip()}", flush=True)


def require_free_port(service: Service) -> None:
    """Raise ServiceError where another program has the service's port."""
    if service.port is None:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", service.port))
        except OSError:
            raise ServiceError(
                f"port {service.port} for {service.name} is in use; end the program that has it "
                f"(perhaps another `make services`) or set {service.port_variable} to another port"
            ) from None


def wait_until_ready(running: RunningService, timeout_s: float = START_TIMEOUT_S) -> None:
    """Wait until a service answers.

    Raises:
        ServiceError: it ended, or did not answer in time.
        InterruptionError: a signal asked for the end.
    """
    end_s = time.monotonic() + timeout_s
    while not running.answers():
        if not running.is_running():
            raise ServiceError(f"{running.service.name} did not start; {running.describe_end()}")
        if time.monotonic() > end_s:
            raise ServiceError(
                f"{running.service.name} did not answer at {running.service.health_url} within "
                f"{timeout_s:.0f} s; its last lines:\n{running.last_lines()}"
            )
        pause(POLL_INTERVAL_S)


def check_login(services: Services) -> None:
    """Check that MLflow accepts the password it was started with.

    MLflow stores its administrator's first password and ignores later values of the environment.

    Raises:
        ServiceError: it has another one.
    """
    password = services.environment.get("MLFLOW_TRACKING_PASSWORD")
    ports = [service.port for service in services.servers if service.name == "mlflow"]
    if not password or not ports:
        return
    user = services.environment["MLFLOW_TRACKING_USERNAME"]
    token = base64.b64encode(f"{user}:{password}".encode()).decode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{ports[0]}/api/2.0/mlflow/registered-models/search",
        headers={"Authorization": f"Basic {token}"},
    )
    try:
        DIRECT.open(request, timeout=30).close()
    except urllib.error.HTTPError as error:
        raise ServiceError(
            f"MLflow answers code {error.code} to {user!r}: its database has another password for "
            "that user than MLFLOW_TRACKING_PASSWORD; set the old one and change it as "
            "docs/operations.md describes"
        ) from None


def set_up(services: Services) -> None:
    """Create work pool, limits and deployments, in a separate process.

    Raises:
        ServiceError: it failed.
        InterruptionError: a signal asked for the end.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            bind_to_parent([sys.executable, "-m", "flows.servers.deployments"]),
            env=dict(services.environment),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None:
                pause(POLL_INTERVAL_S)
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        printed = output.read().strip()
    if process.returncode:
        raise ServiceError(f"the deployments were not made:\n{printed}")
    print(printed, flush=True)


def run(services: Services) -> None:
    """Start everything and keep it running until a signal asks for the end.

    Raises:
        ServiceError: something did not start.
        InterruptionError: a signal asked for the end; everything has been stopped.
    """
    for service in services.servers:
        require_free_port(service)
    running: list[RunningService] = []
    try:
        for service in services.servers:
            running.append(RunningService(service))  # noqa: PERF401 - `finally` must see those that were started
        for server in running:
            wait_until_ready(server)
        check_login(services)
        set_up(services)
        make_inbox(Path(services.environment[VARIABLE]), services.environment)
        for worker in services.workers:
            running.append(RunningService(worker))  # noqa: PERF401 - as above
        print(
            f"MLflow   {models_url(services.mlflow_url)}\nPrefect  {services.prefect_url}",
            flush=True,
        )
        print(f"Code     branch {services.environment[CODE_VARIABLE]}", flush=True)
        print("Ctrl-C stops all", flush=True)
        while True:
            pause(POLL_INTERVAL_S)
            for index, ended in enumerate(running):
                if not ended.is_running():
                    print(f"{ended.service.name} {ended.describe_end()}", flush=True)
                    # Its children may still run: a trainer that saves its state.
                    ended.stop(0 if ended.service.port else WORKER_GRACE_S)
                    pause(RESTART_PAUSE_S)
                    running[index] = RunningService(ended.service)
    finally:
        # The worker first: its runs report their end to the servers.
        for each in reversed(running):
            each.stop(SERVER_GRACE_S if each.service.port else WORKER_GRACE_S)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _interrupted.set()


def main() -> None:
    """Run the services of the working directory's project.

    Exit codes: 0 after an interruption, 1 with one message where something did not start.
    """
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        root = Path().resolve()
        branch, _ = find_code(root, os.environ.get(CODE_VARIABLE))
        # A person may check out another branch later: that must not change what is trained.
        services = plan_services(root, {**os.environ, CODE_VARIABLE: branch})
        write_server_files(services)
        convert_stores(services)
        run(services)
    except InterruptionError:
        print("stopped", flush=True)
    except (ServiceError, SettingsError, StageError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
