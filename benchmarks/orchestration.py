"""Overhead of Prefect: the pipeline as a flow and with plain DVC; from an event to its run.

    python -m benchmarks.orchestration

Every form runs in a new clone with an empty DVC cache, in turns. Plain is what `make repro` does:
`dvc pull data.dvc` and `dvc repro`. The flow also writes the report, so plain DVC is timed with it
too. Slices and networks are small and trained for one epoch, so that the overhead is a large part
of the time. Run it from the project's root with everything committed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import torch
import yaml

from benchmarks.machine import describe_machine
from fullscale.runtime.processes import stage_environment

Environment = dict[str, str]
PLAIN = (("dvc", "pull", "data.dvc"), ("dvc", "repro"))
REPORT = ("fullscale", "report")
FLOW = (sys.executable, "-m", "flows.reproduce")
EMPTY_FLOW = "from prefect import flow; flow(lambda: None, name='empty')()"
QUICK = {
    "slice": {"size_px": 48, "pixel_mm": 8},
    "train": {"width": 4, "num_epochs": 1, "num_picture_slices": 0},
    "register": {"num_bootstrap": 500},
}
NEVER = "0 0 29 2 *"
EMIT = """
import time
from flows.events import emit
from fullscale.versioning.data_version import Announcement
print(time.time())
emit(Announcement("0" * 32, "", ("case",), 0))
"""
LONGEST_WAIT_S = 300


def clone(folder: Path, changes: Mapping[str, Mapping[str, int]] | None = None) -> Path:
    """Clone this project to `folder`, and change its parameters if `changes` are given."""
    run("git", "clone", "--quiet", str(Path.cwd()), str(folder), cwd=Path.cwd())
    if changes is not None:
        path = folder / "params.yaml"
        params = yaml.safe_load(path.read_text(encoding="utf-8"))
        for section, values in changes.items():
            params[section] |= values
        path.write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    return folder


def own_environment(root: Path, **added: str) -> Environment:
    """Return the environment of a program in a clone: its code and stores, no other servers."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PREFECT_", "MLFLOW_", "FULLSCALE_"))
    }
    return stage_environment({**kept, "PYTHONPATH": str(root), "DO_NOT_TRACK": "1", **added})


def run(*command: str, cwd: Path, environment: Mapping[str, str] | None = None) -> str:
    """Run a program and return its output."""
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def seconds(*commands: tuple[str, ...], cwd: Path, environment: Environment) -> float:
    """Return the time that some programs take, one after the other."""
    start = time.perf_counter()
    for command in commands:
        run(*command, cwd=cwd, environment=environment)
    return time.perf_counter() - start


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(url: str, content: object = None) -> Any:
    """Return the answer of Prefect's API to a GET, or with `content` to a POST."""
    method = "GET" if content is None else "POST"
    answer = httpx.request(method, url, json=content, timeout=30)
    answer.raise_for_status()
    return answer.json()


@contextlib.contextmanager
def running(command: list[str], cwd: Path, environment: Environment, api: str) -> Iterator[None]:
    """Run a program within the context, which begins when `api` answers."""
    with (cwd / "server.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(LONGEST_WAIT_S):
            with contextlib.suppress(httpx.HTTPError):
                ask(api)
                break
            if process.poll() is not None:
                raise RuntimeError((cwd / "server.log").read_text())
            time.sleep(1)
        yield
    finally:
        process.terminate()
        process.wait()


def measure_flow(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of the pipeline in each form, one for each round."""
    taken: dict[str, list[float]] = {
        name: [] for name in ("plain", "report", "new database", "own server", "running server")
    }
    home = clone(folder / "server")
    port = free_port()
    api = f"http://127.0.0.1:{port}/api"
    server = [sys.executable, "-m", "flows.servers.prefect_server", "--port", str(port)]
    origin = {"PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1:{port}"}
    with running(server, home, own_environment(home, **origin), f"{api}/health"):
        for turn in range(rounds):
            roots = {name: folder / f"{turn} {name}" for name in taken if name != "report"}
            for name, root in roots.items():
                clone(root, QUICK)
                environment = own_environment(root)
                if name == "plain":
                    taken["plain"].append(seconds(*PLAIN, cwd=root, environment=environment))
                    taken["report"].append(seconds(REPORT, cwd=root, environment=environment))
                    print(f"plain: {taken['plain'][-1]:.1f} s", file=sys.stderr)
                    continue
                if name == "own server":
                    run(sys.executable, "-c", EMPTY_FLOW, cwd=root, environment=environment)
                if name == "running server":
                    environment["PREFECT_API_URL"] = api
                taken[name].append(seconds(FLOW, cwd=root, environment=environment))
                print(f"{name}: {taken[name][-1]:.1f} s", file=sys.stderr)
    return taken


def measure_event(folder: Path, rounds: int) -> list[float]:
    """Return the seconds from the event `scans.landed` to the start of the retraining's run."""
    root = clone(folder / "services")
    mlflow_port, prefect_port = free_port(), free_port()
    api = f"http://127.0.0.1:{prefect_port}/api"
    environment = own_environment(
        root,
        FULLSCALE_MLFLOW_PORT=str(mlflow_port),
        FULLSCALE_PREFECT_PORT=str(prefect_port),
        FULLSCALE_WATCH_INTERVAL_S="1e9",
        FULLSCALE_PROMOTE_CRON=NEVER,
        FULLSCALE_RETRAIN_CRON=NEVER,
    )
    run("dvc", "pull", "data.dvc", cwd=root, environment=environment)
    services = [sys.executable, "-m", "flows.services"]
    wanted = {
        "deployments": {"name": {"any_": ["retrain"]}},
        "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}},
    }
    taken = []
    with running(services, root, environment, f"{api}/deployments/name/retrain/retrain"):
        time.sleep(30)  # until the worker polls for runs
        for turn in range(rounds):
            landed_s = float(
                run(sys.executable, "-c", EMIT, cwd=root,
                    environment={**environment, "PREFECT_API_URL": api}).split()[0]
            )  # fmt: skip
            done: list[dict[str, Any]] = []
            end_s = time.monotonic() + LONGEST_WAIT_S
            while len(done) <= turn:
                if time.monotonic() > end_s:
                    raise RuntimeError((root / "server.log").read_text())
                time.sleep(1)
                done = ask(f"{api}/flow_runs/filter", wanted)
            started = max(datetime.fromisoformat(each["start_time"]) for each in done)
            taken.append(started.timestamp() - landed_s)
            print(f"event to run: {taken[-1]:.1f} s", file=sys.stderr)
            time.sleep(10)
    return taken


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="rounds to take the median of")
    parser.add_argument("--events", type=int, default=5)
    args = parser.parse_args()
    print(describe_machine(torch.device("cpu")))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        taken = measure_flow(folder, args.rounds)
        waits = measure_event(folder, args.events)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    plain = medians["plain"] + medians["report"]
    print("| the pipeline | seconds | more than plain |\n|---|---|---|")
    print(f"| dvc pull, dvc repro | {medians['plain']:.1f} | |")
    print(f"| the same and `fullscale report` | {plain:.1f} | |")
    for name in ("new database", "own server", "running server"):
        print(f"| flow, {name} | {medians[name]:.1f} | {medians[name] - plain:+.1f} |")
    shown = ", ".join(f"{wait:.1f}" for wait in sorted(waits))
    print(f"\nFrom the event to the run: median {statistics.median(waits):.1f} s ({shown})")


if __name__ == "__main__":
    main()
