"""Inputs of a network: intensities in window units, masks per organ, adjacent slices."""

from __future__ import annotations

import torch
from torch import Tensor

NUM_ADJACENT_SLICES = 3
"""Input channels: the slice to segment between its two neighbours."""


def normalise(image: Tensor, window_hu: tuple[float, float]) -> Tensor:
    """Scale HU to float32 window units: 0 at the window's lower end, 1 at its upper end.

    Values outside the window are not clipped.
    """
    low, high = window_hu
    return (image.float() - low) / (high - low)


def one_mask_per_organ(label_BHW: Tensor, num_organs: int) -> Tensor:
    """Convert a label map (0 background, k + 1 for organ k) to boolean masks, B x K x H x W."""
    organs_K = torch.arange(1, num_organs + 1, device=label_BHW.device, dtype=label_BHW.dtype)
    return label_BHW[:, None] == organs_K[:, None, None]
