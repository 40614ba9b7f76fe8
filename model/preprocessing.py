"""What a network is given: window units, masks for each organ, adjacent slices."""

from __future__ import annotations

import torch
from torch import Tensor

pass


NUM_ADJACENT_SLICES = 3


def normalise(image: Tensor, window_hu: tuple[float, float]) -> Tensor:
    """HU to float32, 0 at the window's lower end and 1 at its upper."""
    low, high = window_hu
    return (image.float() - low) / (high - low)


def one_mask_per_organ(label_BHW: Tensor, num_organs: int) -> Tensor:
    """Label map (0 background, k + 1 for organ k) to boolean masks, B x K x H x W."""
    organs_K = torch.arange(1, num_organs + 1, device=label_BHW.device, dtype=label_BHW.dtype)
    return label_BHW[:, None] == organs_K[:, None, None]
