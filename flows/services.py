"""MLflow's server, Prefect's server and a worker, from one command until Ctrl-C.

`python -m flows.services` starts the servers side by side, waits until both answer, creates pool,
limits and deployments, and starts the worker. A program that ends later by itself is started
again.
"""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from pathlib import Path
from threading import Thread
from types import FrameType

import psutil

from flows.service_settings import (
    Service,
    Services,
    SettingsError,
    plan_services,
    write_server_files,
)

START_TIMEOUT_S = 180.0  # databases are made at the first start
SERVER_GRACE_S = 10.0
WORKER_GRACE_S = 35.0  # a trainer has 25 s to keep its state
RESTART_PAUSE_S = 2.0
LOOK_INTERVAL_S = 0.2
THROUGH = (
    sys.executable,
    "-m",
    "fullscale.runtime.processes",
)  # ends with the process that starts it


class ServiceError(Exception):
    """A program did not start."""


class Running:
    """A service as a process group of its own, which Ctrl-C in the terminal does not reach.

    The kernel ends it when this process is killed.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self._last_lines: deque[str] = deque(maxlen=15)
        self._process = subprocess.Popen(
            [*THROUGH, *service.command],
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
        """Whether it has not ended."""
        return self._process.poll() is None

    def answers(self) -> bool:
        """Whether it works as far as can be asked."""
        if not self.service.health_url:
            return True
        try:
            with urllib.request.urlopen(self.service.health_url, timeout=2) as answer:  # noqa: S310
                return bool(answer.status == 200)
        except OSError:
            return False

    def last_words(self) -> str:
        """Its exit code and newest lines."""
        self._printer.join(timeout=1)
        return f"it ended with code {self._process.poll()}:\n" + "\n".join(self._last_lines)

    def stop(self, grace_s: float) -> None:
        """End it and what it started: by one request each, and by force once `grace_s` is over.

        What it started comes first and alone: a run that is asked twice cannot tell how it ended.
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
        self._process.poll()  # or it would count until someone has waited for it
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


def wait_until_ready(running: Running, timeout_s: float = START_TIMEOUT_S) -> None:
    """Wait until a service answers.

    Raises:
        ServiceError: it ended, or did not answer in time.
    """
    end_s = time.monotonic() + timeout_s
    while not running.answers():
        if not running.is_running():
            raise ServiceError(f"{running.service.name} did not start; {running.last_words()}")
        if time.monotonic() > end_s:
            raise ServiceError(
                f"{running.service.name} did not answer at {running.service.health_url} within "
                f"{timeout_s:.0f} s; its lines above say why"
            )
        time.sleep(LOOK_INTERVAL_S)


def check_login(services: Services) -> None:
    """See that MLflow knows the password it was started with.

    MLflow keeps its administrator's first password, whatever the environment says later.

    Raises:
        ServiceError: it knows another one.
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
        urllib.request.urlopen(request, timeout=30).close()  # noqa: S310
    except urllib.error.HTTPError as error:
        raise ServiceError(
            f"MLflow answers code {error.code} to {user!r}: its database has another password for "
            "that user than MLFLOW_TRACKING_PASSWORD; set the old one and change it as "
            "docs/operations.md describes"
        ) from None


def set_up(services: Services) -> None:
    """Create pool, limits, deployments and automations, in a process of its own.

    Raises:
        ServiceError: it failed.
    """
    done = subprocess.run(
        [*THROUGH, sys.executable, "-m", "flows.deployments"],
        env=dict(services.environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ServiceError(f"the deployments were not made:\n{done.stdout.strip()}")
    print(done.stdout.strip(), flush=True)


def run(services: Services) -> None:
    """Start everything and keep it running until the process is interrupted.

    Raises:
        ServiceError: something did not start.
    """
    for service in services.servers:
        require_free_port(service)
    running: list[Running] = []
    try:
        for service in services.servers:
            running.append(Running(service))  # noqa: PERF401 - an interruption must find the first
        for server in running:
            wait_until_ready(server)
        check_login(services)
        set_up(services)
        running.append(Running(services.worker))
        print(f"MLflow   {services.mlflow_url}\nPrefect  {services.prefect_url}", flush=True)
        print("Ctrl-C stops all", flush=True)
        while True:
            time.sleep(LOOK_INTERVAL_S)
            for index, ended in enumerate(running):
                if not ended.is_running():
                    print(f"{ended.service.name} {ended.last_words()}", flush=True)
                    # What it started may still be there: a trainer that keeps its state.
                    ended.stop(0 if ended.service.port else WORKER_GRACE_S)
                    time.sleep(RESTART_PAUSE_S)
                    running[index] = Running(ended.service)
    finally:
        # The worker first: its runs tell the servers how they ended.
        for each in reversed(running):
            each.stop(SERVER_GRACE_S if each.service.port else WORKER_GRACE_S)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End as by Ctrl-C; further requests must not cut the ending short."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> None:
    """Run the services of the working directory's project.

    Exit codes: 0 after an interruption, 1 with one message where something did not start.
    """
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        services = plan_services(Path().resolve(), os.environ)
        write_server_files(services)
        run(services)
    except KeyboardInterrupt:
        print("stopped", flush=True)
    except (ServiceError, SettingsError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
