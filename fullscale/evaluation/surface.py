"""Distances between the surfaces of two masks, in millimetres.

A mask's surface is the mask without its erosion by the six face neighbours; mask voxels on the edge
of the scan are surface. A distance is measured from the centre of a voxel to the nearest centre of
the other surface, in a k-d tree of surface voxels. That is as exact as a distance transform, but
its memory grows with the surface and not with the box around both masks, which a single stray
voxel makes as large as the scan.

Z Y X voxels, P surface voxels of the prediction, T of the truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import KDTree

from fullscale.prediction.components import Mask, bounding_box

ROUNDING_MM = 1e-4
"""Added to tolerances, because file headers give spacing in single precision."""
LEAF_POINTS = 100
"""Points in a leaf of a k-d tree. With scipy's 10 a search of surfaces takes twice as long: points
far from the other surface have many leaves at nearly the same distance."""


@dataclass(frozen=True)
class SurfaceDistances:
    """Distances between two surfaces, in mm.

    Attributes:
        from_predicted_P: from each surface voxel of the prediction to the truth's surface.
        from_true_T: from each surface voxel of the truth to the prediction's surface.
    """

    from_predicted_P: NDArray[np.float64]
    from_true_T: NDArray[np.float64]

    @property
    def hd95_mm(self) -> float:
        """The larger of the two directed 95th percentiles."""
        return max(
            float(np.percentile(self.from_predicted_P, 95)),
            float(np.percentile(self.from_true_T, 95)),
        )

    @property
    def mean_mm(self) -> float:
        """Average symmetric surface distance: the mean over both surfaces' voxels together.

        Heimann et al. 2009, "Comparison and evaluation of methods for liver segmentation from CT
        datasets".
        """
        total = self.from_predicted_P.sum() + self.from_true_T.sum()
        return float(total / (len(self.from_predicted_P) + len(self.from_true_T)))

    def dice_within(self, tolerance_mm: float) -> float:
        """Return surface Dice: the share of both surfaces' voxels within a tolerance of the other.

        Nikolov et al. 2021, "Clinically applicable segmentation of head and neck anatomy for
        radiotherapy", with counts of voxels in place of areas, as in MONAI by default.

        Args:
            tolerance_mm: largest distance that counts as agreement.
        """
        limit_mm = tolerance_mm + ROUNDING_MM
        near = (self.from_predicted_P <= limit_mm).sum() + (self.from_true_T <= limit_mm).sum()
        return float(near / (len(self.from_predicted_P) + len(self.from_true_T)))


def surface_distances(
    predicted_ZYX: Mask, true_ZYX: Mask, spacing_mm: Sequence[float]
) -> SurfaceDistances:
    """Measure the distances between the surfaces of two masks.

    Args:
        predicted_ZYX: boolean.
        true_ZYX: boolean, same shape.
        spacing_mm: distance of voxels along Z, Y, X.

    Raises:
        ValueError: shapes differ, or a mask is empty.
    """
    if predicted_ZYX.shape != true_ZYX.shape:
        raise ValueError(
            f"prediction {predicted_ZYX.shape} and truth {true_ZYX.shape} must have one shape"
        )
    predicted_P3 = surface_points(predicted_ZYX, spacing_mm)
    true_T3 = surface_points(true_ZYX, spacing_mm)
    if not len(predicted_P3) or not len(true_T3):
        raise ValueError(
            f"surfaces of {len(predicted_P3)} and {len(true_T3)} voxels: an empty mask has no "
            "distance; score it as a missed organ"
        )
    return SurfaceDistances(
        from_predicted_P=distances_to_nearest(predicted_P3, true_T3),
        from_true_T=distances_to_nearest(true_T3, predicted_P3),
    )


def surface_points(mask_ZYX: Mask, spacing_mm: Sequence[float]) -> NDArray[np.float64]:
    """Return the centres of a mask's surface voxels.

    Args:
        mask_ZYX: boolean.
        spacing_mm: distance of voxels along Z, Y, X.

    Returns:
        N x 3, mm along Z, Y, X from the centre of the first voxel; 0 x 3 for an empty mask.
    """
    box = bounding_box(mask_ZYX)
    if box is None:
        return np.empty((0, 3))
    # The mask ends at the box, and erosion takes what is outside of an array as empty.
    part_ZYX = mask_ZYX[box]
    surface_ZYX = part_ZYX & ~ndimage.binary_erosion(part_ZYX)
    start = [side.start for side in box]
    return np.asarray((np.argwhere(surface_ZYX) + start) * np.asarray(spacing_mm, dtype=float))


def diagonal_mm(shape_ZYX: Sequence[int], spacing_mm: Sequence[float]) -> float:
    """Return the length of a scan from corner to opposite corner, in mm."""
    return math.hypot(*(num * step for num, step in zip(shape_ZYX, spacing_mm, strict=True)))


def distances_to_nearest(
    points_N3: NDArray[np.float64], others_M3: NDArray[np.float64], limit_mm: float = math.inf
) -> NDArray[np.float64]:
    """Return the distance of each point to the nearest of other points, in mm, on all cores.

    Args:
        points_N3: in mm.
        others_M3: in mm.
        limit_mm: larger distances are infinity; a search that ends there is many times faster.
    """
    tree = KDTree(others_M3, leafsize=LEAF_POINTS)
    distances_mm, _ = tree.query(points_N3, distance_upper_bound=limit_mm, workers=-1)
    return np.asarray(distances_mm)
