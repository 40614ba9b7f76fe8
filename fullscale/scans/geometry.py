"""The voxel grid of a scan, and the mapping between its file's axis order and Z Y X.

Axis letters: Z to the head, Y to the back, X to the patient's left (LPS), so that `values[z]`
shown as a picture is the usual radiological view. I J K are the axes of the file. World
coordinates and affines follow NIfTI: millimetres, RAS+.
"""

# nibabel has no type annotations for the functions called here.
# mypy: allow-untyped-calls
from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import (
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)
from numpy.typing import NDArray

from fullscale.scans.checks import failure

SPACING_LIMITS_MM = (0.2, 10.0)
ALIGNMENT_TOLERANCE_MM = 0.5  # below the pixel size of nearly all CT scans
MAX_SHEAR = 1e-3  # cosine of the angle between two axes; headers are rounded to float32

AXIS_DIRECTIONS = ("head to foot", "front to back", "left to right")
"""Directions in the patient along Z, Y and X, for messages."""
COARSE_MM = 4.0  # organs are far larger than this, so a coarse grid answers the same questions

Array = NDArray[Any]


@dataclass(frozen=True)
class Geometry:
    """The voxel grid of one file.

    Attributes:
        own_shape: number of voxels along the file's axes I, J, K.
        own_affine: 4 x 4, file voxel (i, j, k) to RAS+ millimetres.
    """

    own_shape: tuple[int, int, int]
    own_affine: NDArray[np.float64] = field(compare=False)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Geometry)
            and self.own_shape == other.own_shape
            and np.array_equal(self.own_affine, other.own_affine)
        )

    def __hash__(self) -> int:
        return hash((self.own_shape, self.own_affine.tobytes()))

    @cached_property
    def _to_lps(self) -> NDArray[np.float64]:
        return np.asarray(
            ornt_transform(io_orientation(self.own_affine), axcodes2ornt(("L", "P", "S")))
        )

    @cached_property
    def affine(self) -> NDArray[np.float64]:
        """4 x 4, canonical voxel (x, y, z) to RAS+ millimetres."""
        return np.asarray(self.own_affine @ inv_ornt_aff(self._to_lps, self.own_shape))

    @property
    def own_affine_lps(self) -> NDArray[np.float64]:
        """4 x 4, file voxel (i, j, k) to LPS+ millimetres, the coordinates of DICOM."""
        return np.asarray(np.diag([-1.0, -1.0, 1.0, 1.0]) @ self.own_affine)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxels along Z, Y, X in mm."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(z), float(y), float(x)

    @property
    def shape_ZYX(self) -> tuple[int, int, int]:
        """Number of voxels along Z, Y, X."""
        x, y, z = (self.own_shape[int(i)] for i in np.argsort(self._to_lps[:, 0]))
        return z, y, x

    @property
    def orientation(self) -> str:
        """Axis codes of the file, such as "RAS" or "LPS"."""
        return "".join(nib.aff2axcodes(self.own_affine))

    def to_canonical(self, own_values: Array) -> Array:
        """Return values (I, J, K) of the file as a view (Z, Y, X)."""
        turned = apply_orientation(own_values, self._to_lps)
        return np.asarray(turned).transpose(2, 1, 0)

    def to_own_grid(self, values_ZYX: Array) -> Array:
        """Return values (Z, Y, X) as a view on the file's axes (I, J, K).

        Raises:
            ValueError: the array does not have the shape of this grid.
        """
        if values_ZYX.shape != self.shape_ZYX:
            raise ValueError(
                f"array of shape {values_ZYX.shape}; expected {self.shape_ZYX} (Z, Y, X)"
            )
        to_own = ornt_transform(axcodes2ornt(("L", "P", "S")), io_orientation(self.own_affine))
        return np.asarray(apply_orientation(values_ZYX.transpose(2, 1, 0), to_own))


def max_distance_mm(first: Geometry, second: Geometry) -> float:
    """Return the largest distance between the corners of two grids of one shape, in mm.

    Corners have the same index along the axes of the files.
    """
    return _distance_mm(first.own_affine, second.own_affine, first.own_shape)


def _distance_mm(first: Array, second: Array, shape: tuple[int, int, int]) -> float:
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, -1)
    corners = np.vstack([corners, np.ones(corners.shape[1])])
    return float(np.linalg.norm(((first - second) @ corners)[:3], axis=0).max())


def check_aligned(image: Geometry, label: Geometry, name: str) -> None:
    """Check that image and label share one grid, whatever the order and direction of its axes.

    Args:
        image: geometry of the image file.
        label: geometry of the label file.
        name: name of the case, for error messages.

    Raises:
        ScanError: shapes differ, or a corner voxel is off by more than `ALIGNMENT_TOLERANCE_MM`.
            The code names the first part of the affine that differs: spacing, direction, origin.
    """
    if image.shape_ZYX != label.shape_ZYX:
        raise failure(
            "shape_differs", f"{name}: image {image.own_shape}, label {label.own_shape} voxels"
        )
    z, y, x = image.shape_ZYX
    off_mm = _distance_mm(image.affine, label.affine, (x, y, z))
    if off_mm <= ALIGNMENT_TOLERANCE_MM:
        return
    if image.own_shape == label.own_shape:
        off_mm = max_distance_mm(image, label)
    else:  # the axes have another order, which is no fault
        label = Geometry((x, y, z), label.affine)
        image = Geometry((x, y, z), image.affine)

    def distance_mm(first: Array, second: Array) -> float:
        return _distance_mm(first, second, image.own_shape)

    # Correct one part of the label's affine at a time: the part whose correction moves a corner is
    # the cause.
    steps = [np.linalg.norm(g.own_affine[:3, :3], axis=0) for g in (image, label)]
    stretched = label.own_affine.copy()
    stretched[:3, :3] *= steps[0] / steps[1]
    turned = label.own_affine.copy()
    turned[:3, :3] = image.own_affine[:3, :3]
    if distance_mm(stretched, label.own_affine) > ALIGNMENT_TOLERANCE_MM:
        code, pair = "spacing_differs", [np.round(step, 4).tolist() for step in steps]
    elif distance_mm(turned, label.own_affine) > ALIGNMENT_TOLERANCE_MM:
        code, pair = "direction_differs", [image.orientation, label.orientation]
    else:
        code = "origin_differs"
        pair = [np.round(g.own_affine[:3, 3], 3).tolist() for g in (image, label)]
    raise failure(code, f"{name}: image {pair[0]}, label {pair[1]}, off by {off_mm:.2f} mm")


def check_affine(geometry: Geometry, name: str) -> None:
    """Check that an affine can belong to a CT scan.

    Args:
        geometry: grid of the file.
        name: name of the file, for error messages.

    Raises:
        ScanError: not finite, singular, sheared, or with a spacing outside `SPACING_LIMITS_MM`.
    """
    axes = geometry.own_affine[:3, :3]
    if not np.isfinite(geometry.own_affine).all():
        raise failure("affine", f"{name}: an affine with NaN or Inf")
    steps = np.linalg.norm(axes, axis=0)
    check_spacing(steps, name)
    unit = axes / steps
    shear = float(np.abs(unit.T @ unit - np.eye(3)).max())
    if shear > MAX_SHEAR:
        raise failure("affine", f"{name}: axes that are {shear:.3g} from orthogonal")


def check_spacing(steps_mm: NDArray[np.float64], name: str) -> None:
    """Check that a voxel spacing can belong to a CT scan.

    Args:
        steps_mm: distance of voxels along each axis in mm, in any order.
        name: name of the file, for error messages.

    Raises:
        ScanError: a step is NaN or outside `SPACING_LIMITS_MM`.
    """
    low, high = SPACING_LIMITS_MM
    # Written so that NaN fails, too.
    if not ((steps_mm >= low) & (steps_mm <= high)).all():
        raise failure("spacing", f"{name}: {', '.join(f'{s:.4g}' for s in steps_mm)} mm")


def coarse_steps(spacing_mm: tuple[float, float, float]) -> tuple[slice, slice, slice]:
    """Return slices that take about every `COARSE_MM` a voxel along Z, Y and X."""
    z, y, x = (slice(None, None, max(1, round(COARSE_MM / mm))) for mm in spacing_mm)
    return z, y, x
