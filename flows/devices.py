"""Devices for trainings: slots of the concurrency limit `fullscale-device`, and locked GPUs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound

from fullscale.runtime.locks import LockedError, acquire_lock

LIMIT = "fullscale-device"
LEASE_S = 60  # a killed worker's slot is free after this time; Prefect's default is 300 s
VISIBLE = "CUDA_VISIBLE_DEVICES"


def count_slots() -> int:
    """Return the number of devices that trainings may use at a time; 1 without a limit."""
    with get_client(sync_client=True) as client:
        try:
            return max(1, client.read_global_concurrency_limit_by_name(LIMIT).limit)
        except ObjectNotFound:
            return 1


@contextmanager
def device_slot(root: Path, num_devices: int) -> Iterator[dict[str, str]]:
    """Wait for slots of the limit and hold them; without a limit on the server, do not wait.

    Args:
        root: the project, whose .cache/devices holds the locks of this machine's GPUs.
        num_devices: devices that the training uses; it waits for no more slots than there are.

    Yields:
        Variables to add to the training's environment, so that two trainings do not share a GPU;
        empty if this machine has no choice of GPUs.
    """
    occupy = min(num_devices, count_slots())
    with concurrency(LIMIT, occupy=occupy, lease_duration=LEASE_S), ExitStack() as held:
        gpus = list_gpus(os.environ)
        chosen = _lock(gpus, num_devices, root / ".cache/devices", held)
        is_choice = len(gpus) > 1 and len(chosen) == num_devices
        yield {VISIBLE: ",".join(chosen)} if is_choice else {}


def list_gpus(environment: Mapping[str, str]) -> list[str]:
    """Return this machine's GPUs as CUDA_VISIBLE_DEVICES names them, only those it names if set."""
    if VISIBLE in environment:
        return [name for name in environment[VISIBLE].split(",") if name]
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.split() if done.returncode == 0 else []


def _lock(gpus: list[str], num_wanted: int, folder: Path, held: ExitStack) -> list[str]:
    """Lock and return the first `num_wanted` GPUs that no other training on this machine uses."""
    chosen: list[str] = []
    for gpu in gpus:
        if len(chosen) == num_wanted:
            break
        try:
            lock = acquire_lock(folder / f"{gpu.replace('/', '_')}.lock", wait=False)
            held.enter_context(lock)
        except LockedError:
            continue
        chosen.append(gpu)
    return chosen
