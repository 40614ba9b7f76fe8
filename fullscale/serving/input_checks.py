"""Check before segmentation that a scan resembles the scans that the network was trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fullscale.prediction.network_files import NetworkDescription
from fullscale.runtime.errors import ScanError
from fullscale.scans.anatomy import check_axes, check_slices, check_values
from fullscale.scans.checks import CHECKS, MIN_SLICES
from fullscale.scans.trunk import find_trunk
from fullscale.scans.volume import Volume

TOLERANCE = 0.1
"""Share by which a trunk may lie outside the range of the training cases without a warning."""

MAX_COARSENESS = 1.5
"""Ratio to the coarsest known spacing up to which a scan's spacing has no warning."""


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
        description: of the network. The trunk's size is compared only if it has `trained_on`.
    """
    told = [*scan.doubts, *check_values(scan), *check_slices(scan)]
    found = [InputWarning(code, seen, CHECKS[code].wanted) for code, seen in told]
    # The body is found by its HU, so other values would give false warnings.
    if not any(each.code == "not_hu" for each in found):
        found += [InputWarning(code, seen, CHECKS[code].wanted) for code, seen in check_axes(scan)]
        found += _check_trunk(scan, description)
    num_slices = len(scan.values_ZYX)
    if num_slices < MIN_SLICES:
        found.append(InputWarning("few_slices", f"{num_slices} slices", f"at least {MIN_SLICES}"))
    found += _check_spacing(scan, description)
    return found


def _check_trunk(scan: Volume, description: NetworkDescription) -> Iterator[InputWarning]:
    """Compare the trunk with a slice's canvas and with the trunks that were trained on."""
    try:
        depth_mm, width_mm = find_trunk(scan, description.slice.body_threshold_hu).extent_mm
    except ScanError:  # segmentation refuses a scan without a body
        return
    found = f"a trunk of {depth_mm:.0f} mm from front to back, {width_mm:.0f} mm from left to right"
    canvas_mm = description.slice.size_px * description.slice.pixel_mm
    if max(depth_mm, width_mm) > canvas_mm:
        yield InputWarning("trunk_too_large", found, f"at most {canvas_mm:.0f} mm, a slice's sides")
    if (trained_on := description.trained_on) is None:
        return
    ranges_mm = trained_on.trunk_depth_mm, trained_on.trunk_width_mm
    if any(
        not low * (1 - TOLERANCE) <= mm <= high * (1 + TOLERANCE)
        for mm, (low, high) in zip((depth_mm, width_mm), ranges_mm, strict=True)
    ):
        wanted = " and ".join(f"{low:.0f} to {high:.0f} mm" for low, high in ranges_mm)
        yield InputWarning(
            "trunk_size", found, f"{wanted}, as in the scans that the network was trained on"
        )


def _check_spacing(scan: Volume, description: NetworkDescription) -> Iterator[InputWarning]:
    """Warn of voxels much coarser than those known; finer ones are resampled without loss."""
    slice_mm, row_mm, column_mm = scan.spacing_mm
    asked_mm, trained_on = description.slice.neighbour_mm, description.trained_on
    known_mm = [] if asked_mm == "auto" else [asked_mm]
    if trained_on is not None:
        known_mm.append(trained_on.slice_spacing_mm[1])
    if known_mm and slice_mm > (limit_mm := MAX_COARSENESS * max(known_mm)):
        yield InputWarning(
            "slice_spacing", f"slices every {slice_mm:.4g} mm", f"at most {limit_mm:.4g} mm"
        )
    pixel_mm = max(row_mm, column_mm)
    if pixel_mm > (limit_mm := MAX_COARSENESS * description.slice.pixel_mm):
        yield InputWarning(
            "pixel_spacing", f"voxels of {pixel_mm:.4g} mm in a slice", f"at most {limit_mm:.4g} mm"
        )
