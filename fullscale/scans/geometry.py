"""Where the voxels of a scan are, and how its file's axes turn into Z Y X.

Axis letters: Z to the head, Y to the back, X to the patient's left (LPS), so that `values[z]`
shown as a picture is the usual radiological view. I J K are the axes of the file.
World coordinates and affines are NIfTI's: millimetres, RAS+.
"""

# nibabel carries no types for what is called here.
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
ALIGNMENT_TOLERANCE_MM = 0.5
MAX_SHEAR = 1e-3

Array = NDArray[Any]


@dataclass(frozen=True)
class Geometry:
    """Where the voxels of one file are, and how its axes turn into Z Y X.

    Attributes:
        own_shape: voxels along the file's axes I, J, K.
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
        """The file's own axis codes, such as "RAS" or "LPS"."""
        return "".join(nib.aff2axcodes(self.own_affine))

    def to_canonical(self, own_values: Array) -> Array:
        """File order I J K to Z Y X, as a view."""
        turned = apply_orientation(own_values, self._to_lps)
        return np.asarray(turned).transpose(2, 1, 0)

    def to_own_grid(self, values_ZYX: Array) -> Array:
        """Z Y X back to the file's own axes I J K, as a view.

        Raises:
            ValueError: if the array does not have this geometry's shape.
        """
        if values_ZYX.shape != self.shape_ZYX:
            raise ValueError(
                f"array of shape {values_ZYX.shape}; expected {self.shape_ZYX} (Z, Y, X)"
            )
        to_own = ornt_transform(axcodes2ornt(("L", "P", "S")), io_orientation(self.own_affine))
        return np.asarray(apply_orientation(values_ZYX.transpose(2, 1, 0), to_own))


def check_aligned(image: Geometry, label: Geometry, name: str) -> None:
    """Refuse a pair whose voxels do not lie on each other.

    Args:
        image: geometry of the image file.
        label: geometry of the label file.
        name: the case, for the message.

    Raises:
        ScanError: shapes differ, or a corner voxel is off by more than
            `ALIGNMENT_TOLERANCE_MM`, with the part of the affine that causes it.
    """
    if image.own_shape != label.own_shape:
        raise failure(
            "shape_differs", f"{name}: image {image.own_shape}, label {label.own_shape} voxels"
        )
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in image.own_shape])).reshape(3, -1)
    corners = np.vstack([corners, np.ones(corners.shape[1])])

    def distance_mm(first: Array, second: Array) -> float:
        return float(np.linalg.norm(((first - second) @ corners)[:3], axis=0).max())

    if (off_mm := distance_mm(image.own_affine, label.own_affine)) <= ALIGNMENT_TOLERANCE_MM:
        return
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
    """Refuse an affine that cannot belong to a CT scan.

    Args:
        geometry: of the file.
        name: of the file, for the message.

    Raises:
        ScanError: not finite, singular, sheared, or with a spacing no CT has.
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
    """Refuse a spacing that no CT has.

    Args:
        steps_mm: distance of voxels along each axis, in any order.
        name: of the file, for the message.

    Raises:
        ScanError: a step is not a number, zero, negative, or outside `SPACING_LIMITS_MM`.
    """
    low, high = SPACING_LIMITS_MM
    if not ((steps_mm >= low) & (steps_mm <= high)).all():
        raise failure("spacing", f"{name}: {', '.join(f'{s:.4g}' for s in steps_mm)} mm")
