"""Check before segmentation that a scan resembles the scans that the network was trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fullscale.prediction.network_files import NetworkDescription, TrainedOn
from fullscale.scans.checks import BODY_HU, HU_AIR, HU_DENSE, MIN_SLICES
from fullscale.scans.geometry import AXIS_DIRECTIONS, coarse_steps
from fullscale.scans.volume import Volume

TOLERANCE = 0.1
"""Share by which a scan may lie outside the range of the training cases without a warning."""

BONE_HU = 300
_MIN_BONE_VOXELS = 30
# Arms or a large body may touch the sides of the field of view, so a small share is normal.
_MIN_CUT_SHARE = 0.1
_MAX_CUT_RATIO = 2.0
_MAX_BONE_AHEAD_MM = 20.0


@dataclass(frozen=True)
class InputWarning:
    """One reason not to trust the segmentation of a scan.

    Attributes:
        code: stable name of the check.
        found: the scan's property.
        wanted: the expected property.
    """

    code: str
    found: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.code}: found {self.found}; wanted {self.wanted}"


def check_scan(scan: Volume, description: NetworkDescription) -> list[InputWarning]:
    """Return the reasons not to trust a network's segmentation of a scan; empty if there are none.

    Args:
        scan: in canonical orientation.
        description: of the network. Spacing and extent are checked only if it has `trained_on`.
    """
    found = list(_check_values(scan))
    if not found:  # the body is found by its HU, so other values would give false warnings
        found += _check_axes(scan)
    num_slices = len(scan.values_ZYX)
    if num_slices < MIN_SLICES:
        found.append(InputWarning("few_slices", f"{num_slices} slices", f"at least {MIN_SLICES}"))
    if description.trained_on is not None:
        found += _check_size(scan, description.trained_on)
    return found


def _check_values(scan: Volume) -> Iterator[InputWarning]:
    low, high = float(scan.values_ZYX.min()), float(scan.values_ZYX.max())
    if low > HU_AIR or high < HU_DENSE:
        yield InputWarning(
            "not_hu",
            f"values from {low:g} to {high:g}",
            f"HU, with air below {HU_AIR} and bone or contrast above {HU_DENSE}",
        )


def _check_axes(scan: Volume) -> Iterator[InputWarning]:
    """Yield a warning if the header seems to name the axes wrongly.

    Two facts of anatomy are used. A scan of the trunk cuts through the body at its first and last
    slice only. Bone, mostly the spine, lies behind the centre of the body.
    """
    steps = coarse_steps(scan.spacing_mm)
    coarse_ZYX = scan.values_ZYX[steps]
    body_ZYX: NDArray[np.bool_] = coarse_ZYX > BODY_HU
    if not body_ZYX.any():
        return
    cut = [_share_at_ends(body_ZYX, axis) for axis in range(3)]
    other = max((1, 2), key=lambda axis: cut[axis])
    if cut[other] > max(_MIN_CUT_SHARE, _MAX_CUT_RATIO * cut[0]):
        yield InputWarning(
            "axis",
            f"a body that the scan cuts through from {AXIS_DIRECTIONS[other]} "
            f"({cut[other]:.0%} of its ends), not from {AXIS_DIRECTIONS[0]} ({cut[0]:.0%})",
            "an affine whose axes are the patient's",
        )
        return
    bone_ZYX = coarse_ZYX > BONE_HU
    if np.count_nonzero(bone_ZYX) < _MIN_BONE_VOXELS:
        return
    step_mm = scan.spacing_mm[1] * (steps[1].step or 1)
    bone_y, body_y = (float(np.nonzero(mask)[1].mean()) for mask in (bone_ZYX, body_ZYX))
    if (ahead_mm := (body_y - bone_y) * step_mm) > _MAX_BONE_AHEAD_MM:
        yield InputWarning(
            "axis",
            f"bone whose centre lies {ahead_mm:.0f} mm in front of the body's",
            "an affine that tells front and back apart; bone, spine above all, lies to the back",
        )


def _share_at_ends(body_ZYX: NDArray[np.bool_], axis: int) -> float:
    """Return the body's share of the first or last plane along an axis, the smaller of the two."""
    return min(float(np.take(body_ZYX, end, axis).mean()) for end in (0, -1))


def _check_size(scan: Volume, trained_on: TrainedOn) -> Iterator[InputWarning]:
    spacing_mm = np.array(scan.spacing_mm)
    extent_mm = spacing_mm * scan.values_ZYX.shape
    for code, what, values_mm, known_mm in (
        ("slice_spacing", "slices", spacing_mm[:1], trained_on.slice_spacing_mm),
        ("pixel_spacing", "voxels in a slice", spacing_mm[1:], trained_on.pixel_spacing_mm),
        ("height", "a height", extent_mm[:1], trained_on.height_mm),
        ("field_of_view", "a field of view", extent_mm[1:], trained_on.field_of_view_mm),
    ):
        low, high = known_mm
        if values_mm.min() < low * (1 - TOLERANCE) or values_mm.max() > high * (1 + TOLERANCE):
            found = " x ".join(f"{value:.4g}" for value in values_mm)
            each = "of" if what.startswith("a ") else "every"
            yield InputWarning(
                code,
                f"{what} {each} {found} mm",
                f"{low:.4g} to {high:.4g} mm, as in the scans that the network was trained on",
            )
