"""Describe the machine of a measurement."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MATRIX_SIDE = 8192


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return processor, threads, load and versions, and the accelerator if `device` is one."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": str(device),
    }
    if device.type == "cuda":
        found["accelerator"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
    return found


def measure_peak_tflops(
    device: torch.device,
    dtype: torch.dtype,
    clock: Callable[[], float] = time.perf_counter,
    side: int | None = None,
) -> float:
    """10^12 operations a second of a large matrix product; `clock` gives seconds.

    Args:
        device: where to compute.
        dtype: of both matrices.
        clock: gives seconds.
        side: of the matrices; None: 8192 on a GPU, 2048 on a CPU.
    """
    side = side or (MATRIX_SIDE if device.type == "cuda" else MATRIX_SIDE // 4)
    a = torch.randn(side, side, device=device, dtype=dtype)
    taken = []
    for _ in range(10):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = clock()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(clock() - start)
    return 2 * side**3 / statistics.median(taken) / 1e12


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    fields = dict(
        (part.strip() for part in line.split(":", 1))
        for line in cpuinfo.read_text().split("\n\n")[0].splitlines()
        if ":" in line
    )
    named = fields.get("model name", platform.machine())
    bf16 = " with AMX bf16" if "amx_bf16" in fields.get("flags", "") else ""
    return f"{named}{bf16}"
