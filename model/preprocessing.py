"""Inputs of a network: intensities in window units, masks per organ, adjacent slices."""

from __future__ import annotations

import torch
from torch import Tensor

NUM_ADJACENT_SLICES = 3
"""Input channels: the slice to segment between its two neighbours."""
IGNORED_LABEL = 255
"""Value of pixels in a label map that nobody judged: they count in no loss and no score."""


def normalise(image: Tensor, window_hu: tuple[float, float]) -> Tensor:
    """Scale HU to float32 window units: 0 at the window's lower end, 1 at its upper end.

    Values outside the window are not clipped.
    """
    low, high = window_hu
    return (image.float() - low) / (high - low)


def one_mask_per_organ(label_BHW: Tensor, num_organs: int) -> Tensor:
    """Convert a label map (0 background, k + 1 for organ k) to boolean masks, B x K x H x W.

    Pixels of `IGNORED_LABEL` are in no mask.
    """
    organs_K = torch.arange(1, num_organs + 1, device=label_BHW.device, dtype=label_BHW.dtype)
    return label_BHW[:, None] == organs_K[:, None, None]


def neighbour_step(neighbour_mm: float, spacing_mm: float) -> float:
    """Return a distance of neighbours in slices of a scan.

    Args:
        neighbour_mm: distance in mm.
        spacing_mm: distance of the scan's slices in mm.

    Returns:
        Rounded to 1e-4, so that headers rounded to float32 still give whole numbers.
    """
    return round(neighbour_mm / spacing_mm, 4)


def neighbour_positions(
    slices_B: Tensor, num_slices: int, num_adjacent: int = NUM_ADJACENT_SLICES, step: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return where a slice's neighbours lie; beyond an end of the scan the end slice repeats.

    The image at a position is (1 - share) * slice `low` + share * slice `low` + 1.

    Args:
        slices_B: indices of the middle slices.
        num_slices: of the scan.
        num_adjacent: positions for each slice, odd, with the slice itself in the middle.
        step: distance of neighbours, in slices of the scan; need not be a whole number.

    Returns:
        low, int64, and share, float64 in [0, 1), both B x num_adjacent.

    Raises:
        ValueError: `num_adjacent` is even or below 1, or `step` is not above 0.
    """
    if num_adjacent < 1 or num_adjacent % 2 == 0:
        raise ValueError(f"num_adjacent is {num_adjacent}: it must be odd, such as 1, 3 or 5")
    if not step > 0:
        raise ValueError(f"step is {step}: it must be above 0")
    offsets = (torch.arange(num_adjacent) - num_adjacent // 2) * torch.tensor(step).double()
    position_BC = (slices_B.double().unsqueeze(1) + offsets).clamp(0, num_slices - 1)
    # Sums of rounded steps: a position that should be a whole number is made one.
    position_BC = torch.round(position_BC, decimals=4)
    low_BC = position_BC.floor()
    return low_BC.long(), position_BC - low_BC
