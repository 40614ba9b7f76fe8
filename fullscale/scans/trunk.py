"""Find the patient's trunk in a scan, without arms, table and cushions.

Axis letters: Z slices, Y X voxels of the scan in canonical orientation.

The depth of a voxel is its distance from the outside of the body in its slice. The deepest voxels
of the trunk lie deeper than those of arms, legs, head and table, so thin parts are removed by an
opening whose radius is a share of the trunk's own depth: it fits children and adults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fullscale.scans.checks import BODY_HU, failure

# nibabel is slow to import, and a training only reads grids that were made before.
if TYPE_CHECKING:
    from fullscale.scans.volume import Volume

_SLICE_STEP_MM = 8.0  # slices closer than this are skipped
_THIN_MM = 8.0  # sheets of a table are thinner, the chest's wall is not
_DEPTH_PERCENTILE = 75  # of the slices' greatest depth; a whole-body scan has more legs than trunk
_TRUNK_SHARE = 0.75  # of that depth; slices that reach less show legs, neck or head
_OPENING_SHARE = 0.6  # arms of an adult are up to 55 mm deep, the trunk from 90 mm
_EXTENT_PERCENTILE = 95  # of the slices' extents; shoulders may be wider

Array = NDArray[Any]


@dataclass(frozen=True)
class Trunk:
    """Position and size of the trunk in the plane of the slices.

    Attributes:
        centre_mm: along Y and X, from the outer edge of the first row and column.
        extent_mm: along Y and X.
    """

    centre_mm: tuple[float, float]
    extent_mm: tuple[float, float]


def find_trunk(scan: Volume, body_threshold_hu: float = BODY_HU) -> Trunk:
    """Find the trunk of a patient.

    Args:
        scan: HU, canonical orientation.
        body_threshold_hu: voxels above this value may belong to the body.

    Raises:
        ScanError: no part of the scan is above the threshold, thin sheets aside.
    """
    from fullscale.scans.geometry import coarse_steps

    _, rows, columns = coarse_steps(scan.spacing_mm)
    row_mm, column_mm = scan.spacing_mm[1] * rows.step, scan.spacing_mm[2] * columns.step
    every = max(1, round(_SLICE_STEP_MM / scan.spacing_mm[0]))
    bodies_ZYX = scan.values_ZYX[::every, rows, columns] > body_threshold_hu
    planes = [_fill_body(body_YX, row_mm, column_mm) for body_YX in bodies_ZYX]
    depths_mm = [_depth_mm(plane_YX, row_mm, column_mm) for plane_YX in planes]
    greatest_mm = np.array([float(depth_YX.max()) for depth_YX in depths_mm])
    if not greatest_mm.any():
        raise failure("no_body", f"no part of the scan above {body_threshold_hu:g} HU")
    trunk_depth_mm = float(np.percentile(greatest_mm[greatest_mm > 0], _DEPTH_PERCENTILE))
    edges_mm = np.array(
        [
            _edges_mm(depth_YX, _OPENING_SHARE * trunk_depth_mm, row_mm, column_mm)
            for depth_YX, deepest_mm in zip(depths_mm, greatest_mm, strict=True)
            if deepest_mm >= _TRUNK_SHARE * trunk_depth_mm
        ]
    )  # slices x (Y, X) x (low, high)
    middle_mm = np.median(edges_mm, axis=0).mean(axis=1)
    extent_mm = np.percentile(edges_mm[..., 1] - edges_mm[..., 0], _EXTENT_PERCENTILE, axis=0)
    return Trunk(
        (float(middle_mm[0]), float(middle_mm[1])), (float(extent_mm[0]), float(extent_mm[1]))
    )


def _fill_body(body_YX: Array, row_mm: float, column_mm: float) -> Array:
    """Remove thin sheets from a slice's body, then fill the holes: lungs and bowel gas."""
    from scipy import ndimage

    height, width = (max(1, round(_THIN_MM / step)) for step in (row_mm, column_mm))
    opened = ndimage.binary_opening(body_YX, np.ones((height, width), dtype=bool))
    return np.asarray(ndimage.binary_fill_holes(opened))


def _depth_mm(body_YX: Array, row_mm: float, column_mm: float) -> Array:
    """Return each voxel's distance from the outside of the body; beyond the scan is outside."""
    from scipy import ndimage

    padded = np.pad(body_YX, 1)
    depth = ndimage.distance_transform_edt(padded, sampling=(row_mm, column_mm))
    return np.asarray(depth)[1:-1, 1:-1]


def _edges_mm(
    depth_YX: Array, radius_mm: float, row_mm: float, column_mm: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the low and high edge along Y and X of a slice opened with a disc.

    Args:
        depth_YX: distance from the outside of the body in mm.
        radius_mm: of the disc; below the greatest depth.
        row_mm: distance of rows.
        column_mm: distance of columns.
    """
    from scipy import ndimage

    parts, num_parts = ndimage.label(depth_YX >= radius_mm)
    core_YX = parts == 1 + np.bincount(parts.ravel(), minlength=num_parts + 1)[1:].argmax()
    away_mm = ndimage.distance_transform_edt(~core_YX, sampling=(row_mm, column_mm))
    trunk_YX = (away_mm < radius_mm) & (depth_YX > 0)
    rows, columns = np.flatnonzero(trunk_YX.any(axis=1)), np.flatnonzero(trunk_YX.any(axis=0))
    return (
        (float(rows[0]) * row_mm, float(rows[-1] + 1) * row_mm),
        (float(columns[0]) * column_mm, float(columns[-1] + 1) * column_mm),
    )
