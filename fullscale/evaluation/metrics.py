"""Scores of a predicted mask against the truth, for one organ of one scan on the scan's own grid.

Z slices, Y X pixels; masks are boolean, and hold no voxel that nobody judged. If prediction and
truth are both empty, Dice and IoU are 1, and distances and volume NaN. If only one of them holds
the organ, it is missed or hallucinated: Dice, IoU and surface Dice are 0, and distances are the
scan's diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fullscale.evaluation.surface import ROUNDING_MM, diagonal_mm, surface_distances
from fullscale.evaluation.surface_area import area_surface_dice
from fullscale.prediction.components import Mask
from model.overlap import dice_score, share

NEAR_MM = 10.0
"""An organ-free slice is near the organ if a slice with it is at most this far away."""


@dataclass(frozen=True)
class OverlapScores:
    """Scores from counts of voxels and slices.

    Attributes:
        dice: overlap in 3D, 0 to 1; 1 if prediction and truth are both empty.
        iou: intersection over union, 0 to 1; 1 if prediction and truth are both empty.
        num_true_voxels: voxels of the organ in the truth.
        num_predicted_voxels: voxels of the organ in the prediction.
        num_organ_slices: slices in which the truth holds the organ.
        num_free_slices: slices in which the truth does not hold the organ, and that were judged
            whole.
        num_near_free_slices: those of them within `NEAR_MM` of a slice that holds it, where the
            annotation's own end is uncertain.
        num_remote_free_slices: all others of them; all slices of an organ-free scan.
        num_false_positive_slices: organ-free slices with at least `min_false_positive_mm2` of
            predicted pixels.
        num_near_false_positive_slices: those of them that are near.
        num_remote_false_positive_slices: those of them that are remote.
        num_false_positive_voxels: predicted voxels outside the organ.
        num_free_voxels: judged voxels outside the organ.
    """

    dice: float
    iou: float
    num_true_voxels: int
    num_predicted_voxels: int
    num_organ_slices: int
    num_free_slices: int
    num_near_free_slices: int
    num_remote_free_slices: int
    num_false_positive_slices: int
    num_near_false_positive_slices: int
    num_remote_false_positive_slices: int
    num_false_positive_voxels: int
    num_free_voxels: int

    @property
    def slice_fpr(self) -> float:
        """Share of organ-free slices with a false positive; NaN without organ-free slices."""
        return share(self.num_false_positive_slices, self.num_free_slices)

    @property
    def voxel_fpr(self) -> float:
        """Share of voxels outside the organ that were predicted as organ."""
        return share(self.num_false_positive_voxels, self.num_free_voxels)


@dataclass(frozen=True)
class PhysicalScores:
    """Scores in physical units, which depend on the size of voxels.

    Attributes:
        hd95_mm: Hausdorff distance, the larger of the two directed 95th percentiles.
        mean_surface_distance_mm: average symmetric surface distance.
        surface_dice_1mm: share of both surfaces' voxels within 1 mm of the other, 0 to 1.
        surface_dice_3mm: within 3 mm.
        area_surface_dice_1mm: share of both surfaces' area within 1 mm of the other, 0 to 1.
        area_surface_dice_3mm: within 3 mm.
        volume_difference_ml: predicted volume - true volume.
    """

    hd95_mm: float
    mean_surface_distance_mm: float
    surface_dice_1mm: float
    surface_dice_3mm: float
    area_surface_dice_1mm: float
    area_surface_dice_3mm: float
    volume_difference_ml: float


@dataclass(frozen=True)
class ClassifierScores:
    """Errors of the slice classifier (CGM), which opens slices with the organ and closes others.

    Attributes:
        num_false_closings: organ slices that were closed.
        num_closed_voxels: organ voxels in those slices.
        num_false_openings: organ-free slices that were open.
        classifier_sensitivity: share of organ slices that were open; NaN without organ slices.
        classifier_specificity: share of organ-free slices that were closed; NaN without any.
    """

    num_false_closings: int
    num_closed_voxels: int
    num_false_openings: int
    classifier_sensitivity: float
    classifier_specificity: float


def score_overlap(
    predicted_ZYX: Mask,
    true_ZYX: Mask,
    spacing_mm: Sequence[float],
    min_false_positive_mm2: float,
    judged_ZYX: Mask | None = None,
) -> OverlapScores:
    """Count voxels and slices.

    Args:
        predicted_ZYX: boolean mask, after the slice classifier.
        true_ZYX: boolean mask of the annotation, same shape.
        spacing_mm: distance of voxels along Z, Y, X.
        min_false_positive_mm2: area of predicted pixels that makes an organ-free slice a false
            positive, above 0.
        judged_ZYX: False in voxels that nobody judged; None if all were.

    Raises:
        ValueError: shapes differ.
    """
    if predicted_ZYX.shape != true_ZYX.shape:
        raise ValueError(
            f"prediction {predicted_ZYX.shape} and truth {true_ZYX.shape} must be (Z, Y, X) alike"
        )
    predicted_Z, true_Z = _num_pixels(predicted_ZYX), _num_pixels(true_ZYX)
    overlap = int(np.count_nonzero(predicted_ZYX & true_ZYX))
    num_predicted, num_true = int(predicted_Z.sum()), int(true_Z.sum())
    is_empty = num_predicted == num_true == 0
    pixel_mm2 = spacing_mm[1] * spacing_mm[2]
    free_Z = true_Z == 0
    num_judged = true_ZYX.size
    if judged_ZYX is not None:
        free_Z &= judged_ZYX.all(axis=(1, 2))
        num_judged = int(np.count_nonzero(judged_ZYX))
    near_Z = free_Z & (_distance_mm(true_Z > 0, spacing_mm[0]) <= NEAR_MM + ROUNDING_MM)
    false_positive_Z = free_Z & (predicted_Z * pixel_mm2 >= min_false_positive_mm2)
    return OverlapScores(
        dice=1.0 if is_empty else dice_score(overlap, num_predicted, num_true),
        iou=1.0 if is_empty else share(overlap, num_predicted + num_true - overlap),
        num_true_voxels=num_true,
        num_predicted_voxels=num_predicted,
        num_organ_slices=int(np.count_nonzero(true_Z)),
        num_free_slices=int(np.count_nonzero(free_Z)),
        num_near_free_slices=int(np.count_nonzero(near_Z)),
        num_remote_free_slices=int(np.count_nonzero(free_Z & ~near_Z)),
        num_false_positive_slices=int(np.count_nonzero(false_positive_Z)),
        num_near_false_positive_slices=int(np.count_nonzero(false_positive_Z & near_Z)),
        num_remote_false_positive_slices=int(np.count_nonzero(false_positive_Z & ~near_Z)),
        num_false_positive_voxels=num_predicted - overlap,
        num_free_voxels=num_judged - num_true,
    )


def score_physical(
    predicted_ZYX: Mask, true_ZYX: Mask, spacing_mm: Sequence[float]
) -> PhysicalScores:
    """Measure distances of surfaces and the difference of volumes.

    Args:
        predicted_ZYX: boolean mask, after the slice classifier.
        true_ZYX: boolean mask of the annotation, same shape.
        spacing_mm: distance of voxels along Z, Y, X.

    Raises:
        ValueError: shapes differ.
    """
    num_predicted, num_true = np.count_nonzero(predicted_ZYX), np.count_nonzero(true_ZYX)
    if not num_predicted and not num_true:
        return PhysicalScores(*[math.nan] * 7)
    difference_ml = float(num_predicted - num_true) * math.prod(spacing_mm) / 1000
    if not num_predicted or not num_true:
        far_mm = diagonal_mm(true_ZYX.shape, spacing_mm)
        return PhysicalScores(far_mm, far_mm, 0.0, 0.0, 0.0, 0.0, difference_ml)
    distances = surface_distances(predicted_ZYX, true_ZYX, spacing_mm)
    area_1mm, area_3mm = area_surface_dice(predicted_ZYX, true_ZYX, spacing_mm, (1, 3))
    return PhysicalScores(
        hd95_mm=distances.hd95_mm,
        mean_surface_distance_mm=distances.mean_mm,
        surface_dice_1mm=distances.dice_within(1),
        surface_dice_3mm=distances.dice_within(3),
        area_surface_dice_1mm=area_1mm,
        area_surface_dice_3mm=area_3mm,
        volume_difference_ml=difference_ml,
    )


def score_classifier(open_Z: NDArray[np.bool_], true_ZYX: Mask) -> ClassifierScores:
    """Compare the slices that the slice classifier opened with those that hold the organ.

    Args:
        open_Z: boolean, True for each open slice.
        true_ZYX: boolean mask of the annotation.

    Raises:
        ValueError: the numbers of slices differ.
    """
    if open_Z.shape != true_ZYX.shape[:1]:
        raise ValueError(
            f"decisions of the slice classifier of shape {open_Z.shape} for {len(true_ZYX)} slices "
            "of truth; they must be one for each slice"
        )
    # Imported here: it takes a second, and most importers of this module judge no classifier.
    from sklearn.metrics import confusion_matrix

    true_Z = _num_pixels(true_ZYX)
    counts = confusion_matrix(true_Z > 0, open_Z, labels=[False, True])
    (num_closed, num_false_openings), (num_false_closings, num_opened) = counts.tolist()
    return ClassifierScores(
        num_false_closings=num_false_closings,
        num_closed_voxels=int(true_Z[~open_Z].sum()),
        num_false_openings=num_false_openings,
        classifier_sensitivity=share(num_opened, num_opened + num_false_closings),
        classifier_specificity=share(num_closed, num_closed + num_false_openings),
    )


def _distance_mm(wanted_Z: NDArray[np.bool_], spacing_mm: float) -> NDArray[np.float64]:
    """Return the distance of each slice from the nearest wanted one; infinity without any."""
    places = np.flatnonzero(wanted_Z)
    if not len(places):
        return np.full(len(wanted_Z), math.inf)
    return np.asarray(np.abs(np.arange(len(wanted_Z))[:, None] - places).min(axis=1) * spacing_mm)


def _num_pixels(mask_ZYX: Mask) -> NDArray[np.int64]:
    return np.asarray(np.count_nonzero(mask_ZYX, axis=(1, 2)), dtype=np.int64)
