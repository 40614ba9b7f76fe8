"""Measure real training steps on this machine, and count the memory that they keep.

The steps are those of the training loop itself, on slices that stage slice makes of some slices of
a real scan: reading, augmentation, forward and backward pass, optimiser and validation.

B batch, C adjacent slices, H W pixels, K organs.
"""

from __future__ import annotations

import io
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fullscale.ingestion.source import without_ignored
from fullscale.params import Params
from fullscale.planning.machine import Machine
from fullscale.prediction.network_files import build, describe_network
from fullscale.runtime.files import file_sha256
from fullscale.runtime.signals import Interrupted, StopRequest
from fullscale.scans.cohort import Case
from fullscale.scans.slice_store import SliceStore
from fullscale.scans.slice_writer import SliceRecipe, write_case, write_tables
from fullscale.scans.volume import Volume, read_image, read_labels, write_volume
from fullscale.training.batch_size import USABLE_SHARE
from fullscale.training.dataset import SliceDataset
from fullscale.training.fabric import make_fabric
from fullscale.training.loop import Training, TrainingHooks, TrainingTask
from model.losses import total_loss
from model.preprocessing import NUM_ADJACENT_SLICES

MEASURED_S = 2.0
"""Time for which steps are measured, after the first one."""
NUM_SLICES = 4
"""Slices of a scan that steps are measured on, and validated."""
PEAK_FACTOR = 2.0
"""Peak memory of a step by the memory kept for its backward pass; docs/plan.md has the measurement.
"""
BYTES_PER_WEIGHT = 16  # weight, gradient and two moments of AdamW, float32


@dataclass(frozen=True)
class Speed:
    """Seconds that a network needs for a slice.

    Attributes:
        training_s: in training steps, everything included.
        validation_s: in validation.
    """

    training_s: float
    validation_s: float

    def scaled(self, factor: float) -> Speed:
        """Return the speed where a slice takes `factor` times the operations."""
        return Speed(self.training_s * factor, self.validation_s * factor)


@dataclass(frozen=True)
class Memory:
    """Memory of a training step, counted in float32.

    Attributes:
        fixed_bytes: of weights, gradients and optimiser.
        slice_bytes: at the peak, for each slice computed at once.
    """

    fixed_bytes: int
    slice_bytes: int

    def largest_part(self, machine: Machine, largest: int) -> int:
        """Return the largest power of two of slices that the machine computes at once, or 0.

        Args:
            machine: gives the memory; a share of `USABLE_SHARE` is used.
            largest: upper limit of the result.
        """
        usable = USABLE_SHARE * machine.memory_bytes - self.fixed_bytes
        size = 1
        while 2 * size <= largest and 2 * size * self.slice_bytes <= usable:
            size *= 2
        return size if size * self.slice_bytes <= usable else 0


def count_memory(name: str, params: Params) -> Memory:
    """Count what a forward pass of one slice keeps for the backward pass, on the CPU.

    Half of it would do in bf16, so a GPU holds more than is counted.
    """
    size_px = params.slice.size_px
    network = build(describe_network(name, params)).train()
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    image_BCHW = torch.rand(1, NUM_ADJACENT_SLICES, size_px, size_px)
    mask_BKHW = torch.rand(1, len(params.organs), size_px, size_px) > 0.5
    own = {each.untyped_storage().data_ptr() for each in network.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # else a later tensor could have the address of one that was freed

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total_loss(network(image_BCHW), mask_BKHW, terms=params.recipes[name].loss_terms)
    num_weights = sum(each.numel() for each in network.parameters())
    return Memory(BYTES_PER_WEIGHT * num_weights, int(PEAK_FACTOR * sum(kept.values())))


@contextmanager
def measuring_scan(case: Case) -> Iterator[Case]:
    """Yield `NUM_SLICES` slices from the middle of a scan's labels as a case of their own.

    Its files are temporary.

    Raises:
        ScanError: a file cannot be read.
    """
    scan, labels = read_image(case.image), read_labels(case.label)
    labelled = np.flatnonzero(without_ignored(labels.values_ZYX).any(axis=(1, 2)))
    num_slices = len(labels.values_ZYX)
    middle = int(labelled[len(labelled) // 2]) if labelled.size else num_slices // 2
    first = max(0, min(middle - NUM_SLICES // 2, num_slices - NUM_SLICES))
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder) / "image.nii.gz", Path(folder) / "label.nii.gz"
        for volume, path in zip((scan, labels), paths, strict=True):
            _write_slices(path, volume, first)
        yield replace(
            case,
            image=paths[0],
            label=paths[1],
            image_sha256=file_sha256(paths[0]),
            label_sha256=file_sha256(paths[1]),
        )


def measure_speed(name: str, params: Params, batch_size: int, case: Case) -> Speed:
    """Train a network for `MEASURED_S` seconds and return the seconds of a slice, by wall clock.

    The first step is left out: it prepares kernels and memory.

    Args:
        name: one of params.networks.
        params: with label ids; sizes, recipe and augmentation are those to measure.
        batch_size: slices in a step that is measured.
        case: a few slices, as `measuring_scan` yields them.
    """
    train = params.train.model_copy(
        update={
            "num_epochs": 10**6,
            "slices_per_epoch": batch_size,
            "batch_size": batch_size,
            "num_accumulated": 1,
            "devices": 1,
            "num_nodes": 1,
        }
    )
    params = params.model_copy(update={"train": train})
    times: list[tuple[float, float]] = []
    stop = StopRequest()

    def on_epoch(metrics: dict[str, float], measured: dict[str, float]) -> None:
        times.append((measured["time/training_s"], measured["time/validation_s"]))
        if len(times) > 1 and sum(each for each, _ in times[1:]) >= MEASURED_S:
            stop.signal_number = signal.SIGINT

    with tempfile.TemporaryDirectory() as folder:
        store = _slice(Path(folder), case, params)
        grid = store.load(case.name).grid
        slices = SliceDataset(store, [case.name], grid.spacing_mm[0])
        network = build(describe_network(name, params))
        task = TrainingTask(name, 0, params, slices, slices, batch_size)
        fabric = make_fabric(params)
        fabric.launch()
        training = Training(fabric, network, task, TrainingHooks(on_epoch, stop=stop))
        # The loop shows its epochs on stderr, and these are none of a user's.
        with redirect_stderr(io.StringIO()), suppress(Interrupted):
            training.run()
    # The median: another program may have slowed a step down.
    trained, validated = (float(each) for each in np.median(times[1:], axis=0))
    return Speed(trained / batch_size, validated / NUM_SLICES)


def _slice(folder: Path, case: Case, params: Params) -> SliceStore:
    settings = params.slice
    recipe = SliceRecipe(
        organs=params.label_ids,
        size_px=settings.size_px,
        pixel_mm=settings.pixel_mm,
        window_hu=settings.window_hu,
        body_threshold_hu=settings.body_threshold_hu,
    )
    write_case(folder, case, tuple(params.organs), recipe)
    write_tables(folder, [case.name], recipe, set())
    return SliceStore(folder)


def _write_slices(path: Path, volume: Volume, first: int) -> None:
    """Write `NUM_SLICES` slices of a volume, from `first` on, as NIfTI."""
    affine = volume.affine.copy()
    affine[:3, 3] += first * affine[:3, 2]
    values_ZYX = volume.values_ZYX[first : first + NUM_SLICES]
    write_volume(path, values_ZYX.transpose(2, 1, 0), affine)
