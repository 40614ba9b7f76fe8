"""Calibration of voxel probabilities: reliability curves and expected calibration error.

In a calibrated network 80 % of the voxels with probability 0.8 belong to the organ. Probabilities
are counted into bins scan by scan; no volume is kept. Z Y X voxels, N bins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fullscale.prediction.components import Box, Mask, bounding_box

NUM_BINS = 10
UNCERTAIN = (0.1, 0.9)
"""Probabilities between which a network is not sure of a voxel."""
MARGIN_MM = 10.0


class ReliabilityCurve:
    """Counts of one organ's voxels by their probability.

    A scan is mostly voxels far from the organ, of which every network is sure, and which would
    make any network look calibrated. So only those in the box around the true organ, widened by
    `MARGIN_MM`, count; false positives elsewhere show in the false-positive rates.

    Attributes:
        num_voxels_N: voxels in each bin.
        probability_sum_N: sum of their probabilities.
        num_true_N: how many of them belong to the organ.
    """

    def __init__(self, num_bins: int = NUM_BINS) -> None:
        self.num_voxels_N = np.zeros(num_bins, dtype=np.int64)
        self.probability_sum_N = np.zeros(num_bins)
        self.num_true_N = np.zeros(num_bins, dtype=np.int64)

    def add(
        self,
        probability_ZYX: NDArray[np.float32],
        true_ZYX: Mask,
        spacing_mm: Sequence[float],
        judged_ZYX: Mask | None = None,
    ) -> None:
        """Count one scan; a scan without the organ adds nothing.

        Args:
            probability_ZYX: in [0, 1]; a bin includes its lower end, the last bin both ends.
            true_ZYX: boolean mask of the annotation, same shape.
            spacing_mm: distance of voxels along Z, Y, X.
            judged_ZYX: False in voxels that nobody judged, which do not count; None if all were.

        Raises:
            ValueError: shapes differ.
        """
        if probability_ZYX.shape != true_ZYX.shape:
            raise ValueError(
                f"probabilities {probability_ZYX.shape} and truth {true_ZYX.shape} must have one "
                "shape"
            )
        box = neighbourhood(true_ZYX, spacing_mm)
        if box is None:
            return
        num_bins = len(self.num_voxels_N)
        if judged_ZYX is None:
            judged_ZYX = np.ones_like(true_ZYX)
        for probability_YX, true_YX, judged_YX in zip(
            probability_ZYX[box], true_ZYX[box], judged_ZYX[box], strict=True
        ):
            values = probability_YX[judged_YX].astype(np.float64)
            bins = np.clip((values * num_bins).astype(np.int64), 0, num_bins - 1)
            self.num_voxels_N += np.bincount(bins, minlength=num_bins)
            self.probability_sum_N += np.bincount(bins, values, num_bins)
            self.num_true_N += np.bincount(bins[true_YX[judged_YX]], minlength=num_bins)

    @property
    def num_voxels(self) -> int:
        """Number of voxels counted."""
        return int(self.num_voxels_N.sum())

    @property
    def expected_error(self) -> float:
        """Expected calibration error, 0 to 1; NaN when nothing was counted.

        The distance between mean probability and share of true voxels in a bin, averaged over
        voxels (Naeini et al. 2015; Guo et al. 2017).
        """
        return self._error_of(slice(None))

    @property
    def num_uncertain_voxels(self) -> int:
        """Number of voxels counted whose probability is between 0.1 and 0.9."""
        return int(self.num_voxels_N[self._uncertain].sum())

    @property
    def uncertain_error(self) -> float:
        """Expected calibration error of the voxels between 0.1 and 0.9; NaN without any.

        Even near an organ most voxels are certain, and they lower the error of all.
        """
        return self._error_of(self._uncertain)

    @property
    def _uncertain(self) -> slice:
        """The bins between 0.1 and 0.9, which holds 0.1 but not 0.9."""
        num_bins = len(self.num_voxels_N)
        low, high = (round(end * num_bins) for end in UNCERTAIN)
        return slice(low, high)

    def _error_of(self, bins: slice) -> float:
        num_voxels = self.num_voxels_N[bins].sum()
        if not num_voxels:
            return math.nan
        gaps_N = np.abs(self.probability_sum_N[bins] - self.num_true_N[bins])
        return float(gaps_N.sum() / num_voxels)

    def rows(self) -> list[dict[str, float]]:
        """Return bin_low, bin_high, num_voxels, mean_probability and fraction_true of each bin.

        Bins without voxels have no row.
        """
        num_bins = len(self.num_voxels_N)
        return [
            {
                "bin_low": index / num_bins,
                "bin_high": (index + 1) / num_bins,
                "num_voxels": int(num),
                "mean_probability": float(self.probability_sum_N[index] / num),
                "fraction_true": float(self.num_true_N[index] / num),
            }
            for index, num in enumerate(self.num_voxels_N)
            if num
        ]


def neighbourhood(true_ZYX: Mask, spacing_mm: Sequence[float]) -> Box | None:
    """Return the box around a mask, `MARGIN_MM` wider on each side but within the scan.

    Args:
        true_ZYX: boolean.
        spacing_mm: distance of voxels along Z, Y, X.

    Returns:
        None for an empty mask.
    """
    box = bounding_box(true_ZYX)
    if box is None:
        return None
    z, y, x = (
        slice(max(0, side.start - margin), side.stop + margin)
        for side, margin in zip(box, (math.ceil(MARGIN_MM / s) for s in spacing_mm), strict=True)
    )
    return z, y, x
