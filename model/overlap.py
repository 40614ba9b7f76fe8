"""Dice and shares from counts of voxels."""

from __future__ import annotations

import math


def dice_score(overlap: int, predicted: int, true: int) -> float:
    """Dice from voxel counts, 0 to 1; NaN when both masks are empty."""
    return share(2 * overlap, predicted + true)


def share(part: float, whole: float) -> float:
    """A part of a whole, 0 to 1; NaN when the whole is 0."""
    return float(part / whole) if whole else math.nan
