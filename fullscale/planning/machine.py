"""The machine that a training is planned for: cores and memory, of CPU and GPU."""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil

from fullscale.runtime.errors import StageError

GIB = 2**30
GPU_MEMORY_GIB = {
    "rtx3090": 24,
    "rtx4090": 24,
    "t4": 16,
    "v100": 32,
    "l4": 24,
    "a10": 24,
    "l40s": 48,
    "a6000": 48,
    "a100-40": 40,
    "a100": 80,
    "h100": 80,
    "h200": 141,
}
"""Memory of GPUs that may be planned for from another machine, by their makers' data sheets."""


@dataclass(frozen=True)
class Machine:
    """A machine to plan for.

    Attributes:
        num_cores: that this process may use.
        memory_bytes: of the device that trains: free for a CPU, all of a GPU.
        gpu: name of the GPU; empty for a CPU.
        is_here: steps can be measured, because the device is in this machine.
        load: programs that run in this machine, the mean of the last minute.
    """

    num_cores: int
    memory_bytes: int
    gpu: str = ""
    is_here: bool = True
    load: float = 0.0


def find_machine(gpu: str) -> Machine:
    """Return the machine to plan for.

    Args:
        gpu: "auto" takes a CUDA GPU of this machine if there is one; "none" the CPU; a key of
            `GPU_MEMORY_GIB` plans for such a GPU elsewhere.

    Raises:
        StageError: another word.
    """
    num_cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    here = Machine(num_cores, int(psutil.virtual_memory().available), load=load)
    if gpu == "none":
        return here
    if gpu == "auto":
        import torch  # takes seconds

        if not torch.cuda.is_available():
            return here
        found = torch.cuda.get_device_properties(0)
        return Machine(num_cores, int(found.total_memory), found.name, load=load)
    if gpu.lower() not in GPU_MEMORY_GIB:
        raise StageError(
            f"--gpu {gpu!r} is none of auto, none, {', '.join(GPU_MEMORY_GIB)}; for another GPU "
            "run `fullscale plan` on the machine that has it"
        )
    return Machine(num_cores, GPU_MEMORY_GIB[gpu.lower()] * GIB, gpu.lower(), is_here=False)
