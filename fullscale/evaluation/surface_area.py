"""Surface Dice weighted by the area of surface elements.

A surface element lies between the centres of 2 x 2 x 2 voxels of which some, but not all, belong to
the mask. Its area is that of the triangles which the marching-cubes algorithm puts there, its place
the middle of the eight voxels. This is the definition of Nikolov et al. 2021, "Clinically
applicable segmentation of head and neck anatomy for radiotherapy", as in DeepMind's program
surface-distance and in MONAI's `compute_surface_dice(use_subvoxels=True)`.

Z Y X voxels, E surface elements.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fullscale.evaluation.surface import ROUNDING_MM, distances_to_nearest
from fullscale.prediction.components import Mask, bounding_box

Vector = tuple[int, int, int]

CORNERS = tuple(itertools.product((0, 1), repeat=3))
"""The eight voxels of an element, as Z Y X from its lowest corner; the first is the highest bit."""

TRIANGLES: dict[int, tuple[Vector, ...]] = {
    0b00000001: ((1, 1, 1),),
    0b00000011: ((4, 4, 0),),
    0b00000110: ((2, 2, 2),),
    0b00000111: ((4, 0, 0), (3, 3, 3)),
    0b00001111: ((8, 0, 0),),
    0b00010110: ((3, 3, 3),),
    0b00010111: ((6, 6, 6),),
    0b00011000: ((2, 2, 2),),
    0b00011001: ((0, 4, 4), (1, 1, 1)),
    0b00011011: ((4, 4, 4), (0, 2, 2), (2, 0, 2)),
    0b00011110: ((4, 0, 0), (4, 4, 4)),
    0b00111100: ((8, 8, 0),),
    0b01101001: ((4, 4, 4),),
}
"""Triangles of the marching-cubes algorithm (Lorensen and Cline 1987), as in surface-distance: for
a code of eight bits, one for each of `CORNERS`, the sums of normals of parallel triangles along Z,
Y, X. A normal is as long as its triangle's area, in eighths of the side of a cube of edge 1; signs
are left out. The other codes are these, turned, mirrored or with inside and outside exchanged."""


@lru_cache(maxsize=8)  # a case is scored many times, and this takes 20 ms
def element_areas(spacing_mm: tuple[float, ...]) -> NDArray[np.float64]:
    """Return the area in mm2 of a surface element for each of the 256 codes of its voxels.

    Args:
        spacing_mm: distance of voxels along Z, Y, X.

    Returns:
        256 values, read-only; 0 for the codes without a surface, 0 and 255.
    """
    volume_mm3 = math.prod(spacing_mm)
    side_mm2 = [volume_mm3 / step / 8 for step in spacing_mm]
    areas = np.zeros(256)
    for base, normals in TRIANGLES.items():
        inside = [corner for place, corner in enumerate(CORNERS) if base >> (7 - place) & 1]
        for axes in itertools.permutations(range(3)):
            area_mm2 = sum(
                math.hypot(
                    *(normal[axis] * side for axis, side in zip(axes, side_mm2, strict=True))
                )
                for normal in normals
            )
            for flips in itertools.product((0, 1), repeat=3):
                turned = [
                    tuple(corner[axis] ^ flip for axis, flip in zip(axes, flips, strict=True))
                    for corner in inside
                ]
                code = sum(1 << (7 - CORNERS.index(corner)) for corner in turned)
                areas[[code, 255 - code]] = area_mm2
    areas.flags.writeable = False
    return areas


def surface_elements(
    mask_ZYX: Mask, spacing_mm: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the places and areas of a mask's surface elements.

    Outside of the scan nothing belongs to a mask, so one that is cut off has a surface there.

    Args:
        mask_ZYX: boolean.
        spacing_mm: distance of voxels along Z, Y, X.

    Returns:
        E x 3, mm along Z, Y, X from the centre of the first voxel; E, mm2. None of an empty mask.
    """
    box = bounding_box(mask_ZYX)
    if box is None:
        return np.empty((0, 3)), np.empty(0)
    part_ZYX = np.pad(mask_ZYX[box], 1).astype(np.uint8)
    code_ZYX = np.zeros([size - 1 for size in part_ZYX.shape], dtype=np.uint8)
    for place, corner in enumerate(CORNERS):
        window = tuple(
            slice(at, at + size) for at, size in zip(corner, code_ZYX.shape, strict=True)
        )
        code_ZYX |= part_ZYX[window] << (7 - place)
    places_E3 = np.argwhere((code_ZYX != 0) & (code_ZYX != 255))
    areas_E = element_areas(tuple(spacing_mm))[code_ZYX[tuple(places_E3.T)]]
    start = np.array([side.start for side in box]) - 0.5
    return (places_E3 + start) * np.asarray(spacing_mm, dtype=float), areas_E


def area_surface_dice(
    predicted_ZYX: Mask,
    true_ZYX: Mask,
    spacing_mm: Sequence[float],
    tolerances_mm: Sequence[float],
) -> list[float]:
    """Return the share of both surfaces' area that lies within each tolerance of the other.

    Args:
        predicted_ZYX: boolean, not empty.
        true_ZYX: boolean, not empty, same shape.
        spacing_mm: distance of voxels along Z, Y, X.
        tolerances_mm: largest distances that count as agreement.

    Returns:
        A value in [0, 1] for each tolerance.
    """
    predicted_E3, predicted_E = surface_elements(predicted_ZYX, spacing_mm)
    true_E3, true_E = surface_elements(true_ZYX, spacing_mm)
    total_mm2 = predicted_E.sum() + true_E.sum()
    end_mm = max(tolerances_mm) + 2 * ROUNDING_MM
    from_predicted_E = distances_to_nearest(predicted_E3, true_E3, end_mm)
    from_true_E = distances_to_nearest(true_E3, predicted_E3, end_mm)
    return [
        float(
            (
                predicted_E[from_predicted_E <= limit_mm + ROUNDING_MM].sum()
                + true_E[from_true_E <= limit_mm + ROUNDING_MM].sum()
            )
            / total_mm2
        )
        for limit_mm in tolerances_mm
    ]
