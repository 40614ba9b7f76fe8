"""Scores of a predicted mask against the truth, per organ, in 3D and per slice.

Z slices, Y X pixels; masks are boolean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OrganScores:
    """How one organ of one scan was segmented.

    Attributes:
        dice: overlap in 3D, 0 to 1; NaN when prediction and truth are both empty.
        num_true_voxels: voxels of the organ in the truth.
        num_predicted_voxels: voxels of the organ in the prediction.
        num_organ_slices: slices in which the truth holds the organ.
        num_free_slices: slices in which it does not.
        num_false_positive_slices: organ-free slices with at least k predicted pixels.
        num_false_positive_voxels: predicted voxels outside the organ.
        num_free_voxels: voxels outside the organ.
        num_false_closings: organ slices whose gate was closed.
        num_closed_voxels: organ voxels in those slices.
        num_false_openings: organ-free slices whose gate was open.
    """

    dice: float
    num_true_voxels: int
    num_predicted_voxels: int
    num_organ_slices: int
    num_free_slices: int
    num_false_positive_slices: int
    num_false_positive_voxels: int
    num_free_voxels: int
    num_false_closings: int
    num_closed_voxels: int
    num_false_openings: int

    @property
    def slice_fpr(self) -> float:
        """Share of organ-free slices with a false positive; NaN when no slice is free."""
        return _share(self.num_false_positive_slices, self.num_free_slices)

    @property
    def voxel_fpr(self) -> float:
        """Share of voxels outside the organ that were predicted to be inside."""
        return _share(self.num_false_positive_voxels, self.num_free_voxels)


def dice_score(overlap: int, predicted: int, true: int) -> float:
    """Dice from voxel counts, 0 to 1; NaN when both masks are empty."""
    return _share(2 * overlap, predicted + true)


def score_organ(
    predicted_ZYX: Tensor, true_ZYX: Tensor, gate_open_Z: Tensor, min_false_positive_px: int
) -> OrganScores:
    """Score one organ of one scan on the scan's own grid.

    Args:
        predicted_ZYX: boolean mask, after the gate.
        true_ZYX: boolean mask of the annotation, same shape.
        gate_open_Z: boolean, whether the classifier found the organ in each slice; all True
            for a network without one.
        min_false_positive_px: predicted pixels that make an organ-free slice a false positive.

    Raises:
        ValueError: shapes differ.
    """
    if predicted_ZYX.shape != true_ZYX.shape or gate_open_Z.shape != true_ZYX.shape[:1]:
        raise ValueError(
            f"prediction {tuple(predicted_ZYX.shape)}, truth {tuple(true_ZYX.shape)} and gate "
            f"{tuple(gate_open_Z.shape)} must be (Z, Y, X), (Z, Y, X) and (Z,)"
        )
    predicted_Z = predicted_ZYX.sum(dim=(1, 2))
    true_Z = true_ZYX.sum(dim=(1, 2))
    overlap = int(torch.logical_and(predicted_ZYX, true_ZYX).sum())
    has_organ_Z = true_Z > 0
    closed_Z = has_organ_Z & ~gate_open_Z
    num_predicted, num_true = int(predicted_Z.sum()), int(true_Z.sum())
    return OrganScores(
        dice=dice_score(overlap, num_predicted, num_true),
        num_true_voxels=num_true,
        num_predicted_voxels=num_predicted,
        num_organ_slices=int(has_organ_Z.sum()),
        num_free_slices=int((~has_organ_Z).sum()),
        num_false_positive_slices=int(
            (~has_organ_Z & (predicted_Z >= min_false_positive_px)).sum()
        ),
        num_false_positive_voxels=num_predicted - overlap,
        num_free_voxels=true_ZYX.numel() - num_true,
        num_false_closings=int(closed_Z.sum()),
        num_closed_voxels=int(true_Z[closed_Z].sum()),
        num_false_openings=int((~has_organ_Z & gate_open_Z).sum()),
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
