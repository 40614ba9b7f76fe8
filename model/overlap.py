"""Dice and ratios from voxel counts."""

from __future__ import annotations

import math


def dice_score(overlap: int, predicted: int, true: int) -> float:
    """Return Dice from voxel counts, 0 to 1; NaN if both masks are empty."""
    return share(2 * overlap, predicted + true)


def share(part: float, whole: float) -> float:
    """Return part / whole; NaN if the whole is 0."""
    return float(part / whole) if whole else math.nan
