"""Slices from the store as batches of tensors.

B batch, C adjacent slices, H W pixels, K organs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from scans.store import SliceStore
from tasks.trained import NUM_ADJACENT_SLICES


@dataclass(frozen=True)
class Batch:
    """Some slices of some cases.

    Attributes:
        image_BCHW: HU as int16; the middle channel is the slice to segment.
        label_BHW: uint8, 0 for background, k + 1 for organ k.
        annotated_BK: boolean, whether the case's annotators drew the organ.
        case_B: position of each slice's case in the data set's `cases`.
    """

    image_BCHW: Tensor
    label_BHW: Tensor
    annotated_BK: Tensor
    case_B: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(
            self.image_BCHW.to(device, non_blocking=True),
            self.label_BHW.to(device, non_blocking=True),
            self.annotated_BK.to(device, non_blocking=True),
            self.case_B.to(device, non_blocking=True),
        )


class SliceDataset(Dataset[Batch]):
    """Every slice of some cases, in the order of cases and z.

    Indices are fetched a batch at a time, straight from the memory-mapped arrays.
    """

    def __init__(self, store: SliceStore, cases: Sequence[str]) -> None:
        self.cases = tuple(cases)
        self._sliced = [store.load(case) for case in self.cases]
        self._annotated = np.array(
            [[organ in sliced.annotated for organ in store.organs] for sliced in self._sliced]
        )
        num_slices = [len(sliced.image) for sliced in self._sliced]
        self._case = np.repeat(np.arange(len(self.cases)), num_slices)
        self._z = np.concatenate([np.arange(count) for count in num_slices])

    def __len__(self) -> int:
        return len(self._case)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Fetch several slices as one batch."""
        reach = NUM_ADJACENT_SLICES // 2
        case_B = self._case[list(indices)]
        images, labels = [], []
        for case, z in zip(case_B, self._z[list(indices)], strict=True):
            sliced = self._sliced[case]
            neighbours = np.clip(np.arange(z - reach, z + reach + 1), 0, len(sliced.image) - 1)
            images.append(sliced.image[neighbours])
            labels.append(sliced.label[z])
        return Batch(
            torch.from_numpy(np.stack(images)),
            torch.from_numpy(np.stack(labels)),
            torch.from_numpy(self._annotated[case_B]),
            torch.from_numpy(case_B),
        )


def load_batches(dataset: SliceDataset, batch_size: int, *, shuffle: bool) -> DataLoader[Batch]:
    """A loader of batches; shuffled, it leaves out the last incomplete one."""

    def keep(batch: Any) -> Any:
        return batch

    return DataLoader(dataset, batch_size, shuffle=shuffle, drop_last=shuffle, collate_fn=keep)


def normalise(image: Tensor, window_hu: tuple[float, float]) -> Tensor:
    """HU to float32, 0 at the window's lower end and 1 at its upper."""
    low, high = window_hu
    return (image.float() - low) / (high - low)


def one_mask_per_organ(label_BHW: Tensor, num_organs: int) -> Tensor:
    """Label map (0 background, k + 1 for organ k) to boolean masks, B x K x H x W."""
    organs_K = torch.arange(1, num_organs + 1, device=label_BHW.device, dtype=label_BHW.dtype)
    return label_BHW[:, None] == organs_K[:, None, None]
