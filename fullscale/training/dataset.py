"""Batches of slices from the slice store, as tensors.

B batch, C adjacent slices, H W pixels, K organs.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fullscale.params import TrainParams
from fullscale.runtime.errors import StageError
from fullscale.runtime.processes import die_with_parent
from fullscale.scans.slice_store import SlicedCase, SliceStore
from fullscale.training.epoch_order import EpochOrder, auto_slices_per_epoch
from model.preprocessing import IGNORED_LABEL, neighbour_positions, neighbour_step


@dataclass(frozen=True)
class Batch:
    """Some slices of some cases.

    Attributes:
        image_BCHW: HU as float32; the middle channel is the slice to segment.
        label_BHW: uint8, 0 for background, k + 1 for organ k, `IGNORED_LABEL`.
        annotated_BK: boolean, True if the organ is annotated in the slice's case.
        case_B: index of each slice's case in the data set's `cases`.
        position_B: index of the slice in the order of its epoch; empty outside training.
        epoch: counted from 0.
        share: this batch's share of the annotated (slice, organ) pairs of its optimiser step,
            0 to 1.
        has_ignored: True if a pixel of `label_BHW` is `IGNORED_LABEL`; known without asking a GPU.
    """

    image_BCHW: Tensor
    label_BHW: Tensor
    annotated_BK: Tensor
    case_B: Tensor
    position_B: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    epoch: int = 0
    share: float = 1.0
    has_ignored: bool = False

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device; `position_B` stays on the CPU, where it is read."""
        return replace(
            self,
            image_BCHW=self.image_BCHW.to(device, non_blocking=True),
            label_BHW=self.label_BHW.to(device, non_blocking=True),
            annotated_BK=self.annotated_BK.to(device, non_blocking=True),
            case_B=self.case_B.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Batch:
        """Copy image and label to page-locked memory, from which a GPU copies asynchronously."""
        return replace(
            self, image_BCHW=self.image_BCHW.pin_memory(), label_BHW=self.label_BHW.pin_memory()
        )


class SliceDataset(Dataset[Batch]):
    """All slices of some cases, in the order of cases and z.

    Batches are read directly from the memory-mapped arrays.

    Attributes:
        cases: names of the cases.
        neighbour_mm: distance of a slice's neighbours in mm.
        annotated: boolean, slices x organs: True if the organ is annotated in the slice's case.
        present: boolean, slices x organs: True if the slice contains the organ.
        organ_free: boolean, one per slice: True if the slice contains no organ.
    """

    def __init__(self, store: SliceStore, cases: Sequence[str], neighbour_mm: float) -> None:
        self.cases = tuple(cases)
        self.neighbour_mm = neighbour_mm
        self._sliced = [store.load(case) for case in self.cases]
        num_slices = [len(sliced.image) for sliced in self._sliced]
        self._case = np.repeat(np.arange(len(self.cases)), num_slices)
        self._z = np.concatenate([np.arange(count) for count in num_slices])
        self.annotated = np.array(
            [[organ in sliced.annotated for organ in store.organs] for sliced in self._sliced]
        )[self._case]
        pixels = store.index.set_index(["case", "z"])[list(store.organs)]
        names = np.array(self.cases)[self._case]
        self.present = pixels.loc[list(zip(names, self._z, strict=True))].to_numpy() > 0
        self.organ_free: NDArray[np.bool_] = np.asarray(~self.present.any(axis=1))

    def __len__(self) -> int:
        return len(self._case)

    def make_order(self, train: TrainParams, seed: int) -> EpochOrder:
        """Return the slices of each epoch of a training on these slices with a seed."""
        num_slices = train.slices_per_epoch
        if num_slices == "auto" and train.sampling == "slice":
            num_slices = len(self)
        elif num_slices == "auto":
            grids = [sliced.grid for sliced in self._sliced]
            heights_mm = np.array([grid.spacing_mm[0] * grid.shape_ZYX[0] for grid in grids])
            num_slices = auto_slices_per_epoch(heights_mm, self.neighbour_mm)
        return EpochOrder(
            self._case,
            self.organ_free,
            num_slices,
            train.organ_free_share,
            train.sampling,
            seed,
        )

    def _stack(self, sliced: SlicedCase, z: int) -> Tensor:
        """Read a slice between its neighbours, float32 C x H x W, and nothing else."""
        step = neighbour_step(self.neighbour_mm, sliced.grid.spacing_mm[0])
        num_slices = len(sliced.image)
        low_BC, share_BC = neighbour_positions(torch.tensor([z]), num_slices, step=step)
        low_C, share_C = low_BC[0].numpy(), share_BC[0].float()
        low_CHW = torch.from_numpy(sliced.image[low_C]).float()
        if not share_C.any():
            return low_CHW
        high_CHW = torch.from_numpy(sliced.image[np.minimum(low_C + 1, num_slices - 1)]).float()
        return torch.lerp(low_CHW, high_CHW, share_C[:, None, None])

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Read several slices as one batch."""
        wanted = np.asarray(indices)
        case_B = self._case[wanted]
        images, labels = [], []
        for case, z in zip(case_B, self._z[wanted], strict=True):
            sliced = self._sliced[case]
            images.append(self._stack(sliced, z))
            labels.append(sliced.label[z])
        label_BHW = np.stack(labels)
        return Batch(
            torch.stack(images),
            torch.from_numpy(label_BHW),
            torch.from_numpy(self.annotated[wanted]),
            torch.from_numpy(case_B),
            has_ignored=bool((label_BHW == IGNORED_LABEL).any()),
        )


@dataclass(frozen=True)
class BatchSharding:
    """Assignment of an epoch's slices to steps, micro-batches and processes.

    Every step takes the next `batch_size` slices. Its micro-batches ("parts") go to the processes
    in turn, so a step has the same slices for any number of processes and parts.

    Attributes:
        batch_size: slices in an optimiser step.
        num_accumulated: parts that a process computes one after the other.
        num_processes: processes that share a step.
        rank: index of this process.

    Raises:
        StageError: a step cannot be divided evenly.
    """

    batch_size: int
    num_accumulated: int = 1
    num_processes: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        num_parts = self.num_processes * self.num_accumulated
        if self.batch_size % num_parts:
            raise StageError(
                f"train.batch_size {self.batch_size} cannot be divided evenly among "
                f"{self.num_processes} processes in {self.num_accumulated} parts each; make it a "
                f"multiple of {num_parts}"
            )

    @property
    def part_size(self) -> int:
        """Return the number of slices in a part."""
        return self.batch_size // (self.num_accumulated * self.num_processes)

    def first_index(self, step: int, part: int) -> int:
        """Return the index, in the epoch's order, of the first slice of this process's part."""
        turn = part * self.num_processes + self.rank
        return step * self.batch_size + turn * self.part_size


class TrainingSlices(Dataset[Batch]):
    """This process's parts of every step of every epoch; the key is (epoch, step, part).

    Args:
        slices: of the training cases.
        order: of each epoch; slices that do not fill a last step are left out.
        sharding: assigns slices to steps, parts and processes.
    """

    def __init__(self, slices: SliceDataset, order: EpochOrder, sharding: BatchSharding) -> None:
        self._slices = slices
        self._sharding = sharding
        self._num_steps = len(order) // sharding.batch_size
        # Two: loader workers read ahead into the next epoch.
        self._of_epoch = lru_cache(maxsize=2)(order.of_epoch)

    def keys(self, num_epochs: int, start: tuple[int, int] = (0, 0)) -> list[tuple[int, int, int]]:
        """Return the keys of a training of `num_epochs`, in order, from (epoch, step) on."""
        return [
            (epoch, step, part)
            for epoch in range(start[0], num_epochs)
            for step in range(start[1] if epoch == start[0] else 0, self._num_steps)
            for part in range(self._sharding.num_accumulated)
        ]

    def __getitem__(self, key: tuple[int, int, int]) -> Batch:
        epoch, step, part = key
        order, sharding = self._of_epoch(epoch), self._sharding
        first = sharding.first_index(step, part)
        positions = np.arange(first, first + sharding.part_size)
        of_step = order[step * sharding.batch_size : (step + 1) * sharding.batch_size]
        num_pairs = self._slices.annotated[of_step].sum()
        own_pairs = self._slices.annotated[order[positions]].sum()
        return replace(
            self._slices.__getitems__(order[positions].tolist()),
            position_B=torch.from_numpy(positions),
            epoch=epoch,
            share=float(own_pairs / max(num_pairs, 1)),
        )


def training_batches(
    slices: TrainingSlices,
    num_epochs: int,
    start: tuple[int, int] = (0, 0),
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Return this process's batches of a whole training, from any step on.

    One loader serves all epochs, so that its workers read ahead into the next epoch.

    Args:
        slices: parts of every step.
        num_epochs: of the training.
        start: epoch and step of the first batch.
        num_workers: processes that read; 0 reads in this process.
        pin_memory: put batches into page-locked memory, for a GPU.
    """
    loader = DataLoader(
        slices,
        batch_size=None,
        sampler=slices.keys(num_epochs, start),
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_become_worker,
    )
    return iter(loader)


def _become_worker(number: int) -> None:
    """Leave signals to the trainer, which first finishes its step; do not outlive it."""
    for ignored in (signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent()


def whole_batches(
    slices: SliceDataset, batch_size: int, *, rank: int = 0, num_processes: int = 1
) -> DataLoader[Batch]:
    """Return every slice once, in order; each batch goes to one of the processes."""
    starts = range(rank * batch_size, len(slices), num_processes * batch_size)
    batches = [list(range(start, min(start + batch_size, len(slices)))) for start in starts]

    def keep(batch: Any) -> Any:
        return batch

    return DataLoader(slices, batch_sampler=batches, collate_fn=keep)
