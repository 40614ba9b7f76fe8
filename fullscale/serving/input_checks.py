"""Whether a scan is like those that a network was trained on, before it is segmented."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fullscale.prediction.network_files import Description, TrainedOn
from fullscale.scans.checks import BODY_HU, HU_AIR, HU_DENSE, MIN_SLICES
from fullscale.scans.volume import Volume

TOLERANCE = 0.1
"""How far beyond the training cases is no matter, of their lowest or highest."""

BONE_HU = 300
_COARSE_MM = 4.0
_MIN_BONE_VOXELS = 30
_MAX_CUT = 2.0
_MAX_BONE_AHEAD_MM = 20.0
_AXES = ("head to foot", "front to back", "left to right")


@dataclass(frozen=True)
class Doubt:
    """One reason to look twice at what is found in a scan.

    Attributes:
        code: stable name of the check.
        found: what the scan is like.
        wanted: what it should be like.
    """

    code: str
    found: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.code}: found {self.found}; wanted {self.wanted}"


def judge_scan(scan: Volume, description: Description) -> list[Doubt]:
    """What speaks against trusting a network with a scan.

    Args:
        scan: in canonical orientation.
        description: of the network; one that does not tell what it was trained on is not asked.
    """
    doubts = list(_doubt_values(scan))
    if not doubts:  # a body is to be seen in HU only
        doubts += _doubt_axes(scan)
    if len(scan.values_ZYX) < MIN_SLICES:
        doubts.append(
            Doubt("few_slices", f"{len(scan.values_ZYX)} slices", f"at least {MIN_SLICES}")
        )
    if description.trained_on is not None:
        doubts += _doubt_size(scan, description.trained_on)
    return doubts


def _doubt_values(scan: Volume) -> Iterator[Doubt]:
    low, high = float(scan.values_ZYX.min()), float(scan.values_ZYX.max())
    if low > HU_AIR or high < HU_DENSE:
        yield Doubt(
            "not_hu",
            f"values from {low:g} to {high:g}",
            f"HU, with air below {HU_AIR} and bone or contrast above {HU_DENSE}",
        )


def _doubt_axes(scan: Volume) -> Iterator[Doubt]:
    """Axes that the header names wrongly.

    A scan of a trunk or a head cuts through the body below and above only; and bone, spine above
    all, lies to the back.
    """
    steps = tuple(slice(None, None, max(1, round(_COARSE_MM / s))) for s in scan.spacing_mm)
    coarse_ZYX = scan.values_ZYX[steps]
    body_ZYX: NDArray[np.bool_] = coarse_ZYX > BODY_HU
    if not body_ZYX.any():
        return
    cut = [_share_at_ends(body_ZYX, axis) for axis in range(3)]
    other = max((1, 2), key=lambda axis: cut[axis])
    if cut[other] > 0.1 and cut[other] > _MAX_CUT * cut[0]:
        yield Doubt(
            "axis",
            f"a body that the scan cuts through from {_AXES[other]} ({cut[other]:.0%} of its "
            f"ends), not from {_AXES[0]} ({cut[0]:.0%})",
            "an affine whose axes are the patient's",
        )
        return
    bone_ZYX = coarse_ZYX > BONE_HU
    if np.count_nonzero(bone_ZYX) < _MIN_BONE_VOXELS:
        return
    step_mm = scan.spacing_mm[1] * (steps[1].step or 1)
    bone_y, body_y = (float(np.nonzero(mask)[1].mean()) for mask in (bone_ZYX, body_ZYX))
    if (ahead_mm := (body_y - bone_y) * step_mm) > _MAX_BONE_AHEAD_MM:
        yield Doubt(
            "axis",
            f"bone whose centre lies {ahead_mm:.0f} mm in front of the body's",
            "an affine that tells front and back apart; bone, spine above all, lies to the back",
        )


def _share_at_ends(body_ZYX: NDArray[np.bool_], axis: int) -> float:
    """Share of the first and last plane along an axis that is body, the smaller of the two."""
    return min(float(np.take(body_ZYX, end, axis).mean()) for end in (0, -1))


def _doubt_size(scan: Volume, trained_on: TrainedOn) -> Iterator[Doubt]:
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
            yield Doubt(
                code,
                f"{what} {each} {found} mm",
                f"{low:.4g} to {high:.4g} mm, as in the scans that the network was trained on",
            )
