"""Sizes of the measurements, and where a part of them puts its results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fullscale.runtime.errors import shorten
from fullscale.runtime.files import write_atomically


@dataclass(frozen=True)
class Settings:
    """Sizes of the measurements.

    Attributes:
        device: "cuda" or "cpu".
        width: channels of the first level of the networks.
        side_px: of a slice.
        batch_size: slices at a time; the largest that fits is measured too.
        largest_batch: where the search for it ends.
        num_slices: of a volume, half of them without an organ.
        scan_shape: voxels of a scan along Z, Y, X.
        rounds: that medians are over.
        precisions: number formats of the networks.
        compile_modes: of torch.compile; None is eager.
        matrix_side: of the product that rates are compared with; None as for the device.
        num_steps: in an epoch of the trainings that are compared; each has two epochs.
        stages: of the pipeline, in order.
        num_threads: of the CPU; None: torch's default.
        is_limited: each part has a limit of time.
    """

    device: str = "cuda"
    width: int = 64
    side_px: int = 320
    batch_size: int = 16
    largest_batch: int = 256
    num_slices: int = 64
    scan_shape: tuple[int, int, int] = (300, 512, 512)
    rounds: int = 5
    precisions: tuple[str, ...] = ("bfloat16", "float32")
    compile_modes: tuple[str | None, ...] = (None, "default", "reduce-overhead")
    matrix_side: int | None = None
    num_steps: int = 16
    stages: tuple[str, ...] = (
        "slice",
        "split",
        "train@unet-0",
        "train@unet3plus-0",
        "evaluate@unet",
        "evaluate@unet3plus",
        "register",
    )
    num_threads: int | None = None
    is_limited: bool = True

    def clock(self) -> float:
        """Return seconds, after the device has finished its work."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def quick(self) -> Settings:
        """Return sizes for a trial on a CPU: what is measured is not worth reading."""
        return Settings(
            self.device,
            width=4,
            side_px=32,
            batch_size=2,
            largest_batch=4,
            num_slices=4,
            scan_shape=(8, 64, 64),
            rounds=1,
            compile_modes=(None,),
            matrix_side=128,
            num_steps=2,
            stages=("slice",),
            num_threads=1,
            is_limited=False,
        )


@dataclass
class Report:
    """The results of a part: on disk as soon as they are there, and a line on the screen.

    Attributes:
        path: JSON file.
        started: by `time.perf_counter`; lines tell the seconds since.
        results: measure to value, or to its error.
    """

    path: Path
    started: float
    results: dict[str, Any] = field(default_factory=dict)

    def add(self, measure: str, value: Any) -> None:
        """Write a result."""
        self.results[measure] = value
        write_atomically(self.path, json.dumps(self.results, indent=1) + "\n")
        seconds = time.perf_counter() - self.started
        print(f"{seconds:5.0f} s  {self.path.stem}: {measure}: {describe(value)}", flush=True)

    def measure(self, name: str, function: Callable[[], Any]) -> Any:
        """Write what a function returns, or its error, and go on.

        Returns:
            The value; None after an error.
        """
        try:
            value = function()
        except Exception as error:
            self.add(name, {"error": f"{type(error).__name__}: {shorten(error)}"})
            return None
        self.add(name, value)
        return value


def describe(value: Any) -> str:
    """Return a result in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {describe(each)}" for key, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
