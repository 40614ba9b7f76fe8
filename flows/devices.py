"""Which device a training has to itself: one of the slots of the limit `fullscale-device`."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound

LIMIT = "fullscale-device"
LEASE_S = 60  # so long a slot of a killed worker stays taken
VISIBLE = "CUDA_VISIBLE_DEVICES"


def count_slots() -> int:
    """How many devices the server lets trainings have at a time; 1 where it has no such limit."""
    with get_client(sync_client=True) as client:
        try:
            return max(1, client.read_global_concurrency_limit_by_name(LIMIT).limit)
        except ObjectNotFound:
            return 1


@contextmanager
def device_slot(root: Path, num_devices: int) -> Iterator[dict[str, str]]:
    """Wait for slots of the limit and hold them; without a server's limit, go on at once.

    Args:
        root: the project, below whose .cache/devices this machine's GPUs are locked.
        num_devices: how many devices the training uses; it waits for no more slots than there are.

    Yields:
        What to add to the training's environment, so that two at a time do not share a GPU;
        nothing where there is no choice.
    """
    occupy = min(num_devices, count_slots())
    with concurrency(LIMIT, occupy=occupy, lease_duration=LEASE_S), ExitStack() as held:
        gpus = list_gpus(os.environ)
        chosen = _lock(gpus, num_devices, root / ".cache/devices", held)
        is_choice = len(gpus) > 1 and len(chosen) == num_devices
        yield {VISIBLE: ",".join(chosen)} if is_choice else {}


def list_gpus(environment: Mapping[str, str]) -> list[str]:
    """The GPUs of this machine as CUDA_VISIBLE_DEVICES names them; of those it names, if set."""
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
    """Take the first GPUs that no other training on this machine holds, as far as there are any."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen: list[str] = []
    for gpu in gpus:
        if len(chosen) == num_wanted:
            break
        try:
            held.enter_context(FileLock(folder / f"{gpu.replace('/', '_')}.lock", timeout=0))
        except Timeout:
            continue
        chosen.append(gpu)
    return chosen
