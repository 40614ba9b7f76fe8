"""Compare a scan's values, slices and named axes with the anatomy in its voxels.

Axis letters: Z to the head, Y to the back, X to the patient's left. Each axis has its own sign, so
any mixture of swapped axes is found. A sign that cannot be seen is left out: a scan without lungs
says nothing about head and feet. Signs are read on a coarse grid, cropped to the body.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fullscale.scans.checks import BODY_HU, HU_AIR, HU_DENSE
from fullscale.scans.geometry import AXIS_DIRECTIONS, coarse_steps
from fullscale.scans.volume import Volume

# SciPy is imported where it is used: it is slow to import.

Array = NDArray[Any]
Mask = NDArray[np.bool_]

# "Seen" are extremes over 20 real and 26 synthetic scans of the abdomen.
_SHEET_MM = 12.0  # sheets of a table are thinner
_MIN_CUT_SHARE = 0.1  # of a plane; arms or a large body may touch the sides of the field of view
_MAX_CUT_RATIO = 2.0
_SMOOTHING_MM = 8.0

_BONE_HU = 200  # below the upper end of the usual windows
_SPINE_MM = 12.0
_SPINE_DENSITY = 0.25  # of a disc with the radius of a vertebra that is bone
_MIN_SPINE_SHARE = 0.1  # of the column of voxels through a vertebra that is bone
_MIN_SPINE_OFFSET = 0.08  # from the body's centre, share of its depth; seen: 0.11 to 0.36

_GAS_HU = -970  # bowel gas is below, lung above
_CLIPPED_HU = 5  # noise that smoothing leaves in lungs whose HU are clipped
_LUNG_PERCENTILE = 2  # of the body's HU; clipped lungs are at this value
_LUNG_MM = 12.0  # thinner air is not lung
_MIN_LUNG_SHARE = 0.15  # of the body in a slice; seen: bowel up to 0.08, lungs from 0.2
_MIN_LUNG_OFFSET = 0.4  # from the body's centre, share of half its height; seen: 0.5 to 0.9
_MIN_LUNG_OFFSET_MM = 20.0  # from liver and spleen
_NEAR_LUNGS_MM = 100.0  # there contrast in the bowel is rare, and the liver is large

_DENSE_HU = 800  # dense bone and metal
_MAX_DENSE_SHARE = 0.3  # of what is no air
_LOWEST_HU = -1100  # air with noise; below is only what marks the outside of the field of view
_MAX_LOW_SHARE = 0.02  # of the voxels; apart from the value that marks the outside
_MAX_CUT_OUT_SHARE = 0.01  # of the voxels at the lowest value, in a scan that no window clipped

_ORGAN_HU = (25, 200)  # liver and heart; fluid is below
_MIN_OWN_SIDE_MM = 30.0  # between an organ and the body, beside the other organ
_MIN_SIDE_MM = 10.0  # between the centres of organs, or of an organ and the body
_MIN_LIVER_MM = 30.0  # from the body's centre to the liver's deepest point; seen: 46 to 110


@dataclass(frozen=True)
class Sign:
    """Evidence of the anatomy on one axis.

    Attributes:
        axis: index into Z Y X.
        agrees: False if the anatomy contradicts the header.
        seen: what contradicts it; meaningless if `agrees`.
    """

    axis: int
    agrees: bool
    seen: str


@dataclass(frozen=True, eq=False)
class _Body:
    """The body on the coarse grid, cropped to its extent.

    Attributes:
        hu_ZYX: HU.
        mask_ZYX: the body; lungs and bowel gas are inside, the table is outside.
        spacing_mm: distance of voxels along Z, Y, X.
    """

    hu_ZYX: Array
    mask_ZYX: Mask
    spacing_mm: tuple[float, float, float]

    @cached_property
    def smooth_ZYX(self) -> NDArray[np.float32]:
        """HU averaged over `_SMOOTHING_MM` in each slice."""
        from scipy import ndimage

        size = (1, *self.num_voxels(_SMOOTHING_MM)[1:])
        return np.asarray(ndimage.uniform_filter(self.hu_ZYX.astype(np.float32), size))

    @cached_property
    def air_ZYX(self) -> Mask:
        """Air in the body. If a window clips it, it has the window's lowest value."""
        lowest_hu = np.percentile(self.hu_ZYX[self.mask_ZYX], _LUNG_PERCENTILE) + _CLIPPED_HU
        return np.asarray(self.mask_ZYX & (self.smooth_ZYX <= max(HU_AIR, lowest_hu)))

    @cached_property
    def lung_share_Z(self) -> NDArray[np.float64]:
        """The lungs' share of the body in each slice; all 0 if there are no lungs."""
        lungs_ZYX = self.without_thin(self.air_ZYX & (self.hu_ZYX > _GAS_HU), _LUNG_MM)
        area_Z = np.maximum(1, self.mask_ZYX.sum(axis=(1, 2)))
        share_Z = np.asarray(lungs_ZYX.sum(axis=(1, 2)) / area_Z)
        return share_Z if share_Z.max() >= _MIN_LUNG_SHARE else np.zeros_like(share_Z)

    def num_voxels(self, length_mm: float) -> tuple[int, int, int]:
        """Return a length as a number of voxels along each axis, at least 1."""
        z, y, x = (max(1, round(length_mm / step)) for step in self.spacing_mm)
        return z, y, x

    def without_thin(self, mask_ZYX: Mask, length_mm: float) -> Mask:
        """Return a mask without parts that are thinner than a length."""
        from scipy import ndimage

        box = np.ones(self.num_voxels(length_mm), dtype=bool)
        return np.asarray(ndimage.binary_opening(mask_ZYX, box))

    def centre_mm(self, axis: int, mask_ZYX: Mask | None = None) -> float:
        """Return the mean position of a mask, or of the body, along an axis."""
        inside = np.nonzero(self.mask_ZYX if mask_ZYX is None else mask_ZYX)[axis]
        return float(inside.mean()) * self.spacing_mm[axis]


def check_values(scan: Volume) -> Iterator[tuple[str, str]]:
    """Yield code and finding if the values are not HU, or may not be.

    Extremes alone do not tell: a value that marks what is outside the field of view hides a lost
    intercept. So the values of a body are compared, too.
    """
    sample = np.asarray(scan.values_ZYX[coarse_steps(scan.spacing_mm)]).ravel()
    low, high = float(scan.values_ZYX.min()), float(scan.values_ZYX.max())
    at_low = float((sample == sample.min()).mean())
    # A window leaves many voxels at its lower end; a box cut out of a scan does not.
    is_cut_out = low < 0 and at_low < _MAX_CUT_OUT_SHARE
    if high < HU_DENSE or (low > HU_AIR and not is_cut_out):
        yield "not_hu", f"values from {low:g} to {high:g}"
        return
    inside = sample[sample > HU_AIR]
    dense = float((inside > _DENSE_HU).mean()) if inside.size else 1.0
    below = sample[sample < _LOWEST_HU]
    low_tail = float((below != np.median(below)).sum()) / sample.size if below.size else 0.0
    if dense > _MAX_DENSE_SHARE or low_tail > _MAX_LOW_SHARE:
        yield (
            "not_hu",
            f"values from {low:g} to {high:g}, of which {dense:.0%} are as dense as bone and "
            f"{low_tail:.0%} below air",
        )
    elif low > HU_AIR:
        yield "no_air", f"values from {low:g} to {high:g}"


def check_slices(scan: Volume) -> Iterator[tuple[str, str]]:
    """Yield code and finding if slices are exact copies of the slice below them."""
    values_ZYX = scan.values_ZYX
    copies = [
        z
        for z in range(1, len(values_ZYX))
        if np.array_equal(values_ZYX[z], values_ZYX[z - 1])
        and values_ZYX[z].min() != values_ZYX[z].max()
    ]
    if copies:
        first = ", ".join(str(z) for z in copies[:5])
        yield (
            "slices_repeated",
            f"{len(copies)} of {len(values_ZYX)} slices like the one below, from the foot: {first}",
        )


def check_axes(
    scan: Volume, labels: Volume | None = None, named: Mapping[str, int] | None = None
) -> Iterator[tuple[str, str]]:
    """Yield code and finding for each axis on which anatomy and header contradict each other.

    Arguments as for `read_signs`.
    """
    for sign in read_signs(scan, labels, named):
        if not sign.agrees:
            yield ("axis", "axis", "liver_on_left")[sign.axis], sign.seen


def read_signs(
    scan: Volume, labels: Volume | None = None, named: Mapping[str, int] | None = None
) -> list[Sign]:
    """Return the signs of head and feet, front and back, left and right, as far as they are seen.

    Args:
        scan: HU, canonical orientation.
        labels: label ids on the same grid.
        named: label id by name. Only "liver" and "spleen" are used.

    Returns:
        At most one sign for each axis. If the scan cuts through the body along Y or X, there are
        no others: they could not be read.
    """
    steps = coarse_steps(scan.spacing_mm)
    z, y, x = (mm * step.step for mm, step in zip(scan.spacing_mm, steps, strict=True))
    hu_ZYX = scan.values_ZYX[steps]
    mask_ZYX = _find_body(hu_ZYX, y, x)
    if not mask_ZYX.any():
        return []
    box = tuple(_extent(mask_ZYX, axis) for axis in range(3))
    body = _Body(hu_ZYX[box], mask_ZYX[box], (z, y, x))
    if cut := _cut_sideways(body):
        return [cut]
    organs: dict[str, Mask] = {}
    if labels is not None:
        ids_ZYX = labels.values_ZYX[steps][box]
        masks = {name.lower(): ids_ZYX == label_id for name, label_id in (named or {}).items()}
        organs = {n: masks[n] for n in ("liver", "spleen") if n in masks and masks[n].any()}
    ends = _head_and_feet(body, organs)
    sides = _labelled_sides(body, organs) if organs else _sides(body, ends)
    return [sign for sign in (ends, _front_and_back(body), sides) if sign is not None]


def _find_body(hu_ZYX: Array, row_mm: float, column_mm: float) -> Mask:
    """Return the largest part that is not a thin sheet, with the holes of each slice filled."""
    from scipy import ndimage

    height, width = (max(1, round(_SHEET_MM / step)) for step in (row_mm, column_mm))
    thick_ZYX = ndimage.binary_opening(hu_ZYX > BODY_HU, np.ones((1, height, width), dtype=bool))
    parts_ZYX, num_parts = ndimage.label(thick_ZYX)
    sizes = np.bincount(parts_ZYX.ravel(), minlength=num_parts + 2)[1:]
    largest_ZYX = parts_ZYX == 1 + sizes.argmax()
    return np.stack([ndimage.binary_fill_holes(plane_YX) for plane_YX in largest_ZYX])


def _extent(mask_ZYX: Mask, axis: int) -> slice:
    """Return the slice from the first to the last index of a mask along an axis."""
    inside = np.nonzero(mask_ZYX)[axis]
    return slice(int(inside.min()), int(inside.max()) + 1)


def _cut_sideways(body: _Body) -> Sign | None:
    """Return a sign if the scan cuts through the body along Y or X, as it should along Z only."""
    ends = [np.take(body.mask_ZYX, (0, -1), axis) for axis in range(3)]
    cut = [float(end.mean(axis=tuple({0, 1, 2} - {axis})).min()) for axis, end in enumerate(ends)]
    other = max((1, 2), key=lambda axis: cut[axis])
    if cut[other] <= max(_MIN_CUT_SHARE, _MAX_CUT_RATIO * cut[0]):
        return None
    seen = (
        f"a body that the scan cuts through from {AXIS_DIRECTIONS[other]} ({cut[other]:.0%} of its "
        f"ends), not from {AXIS_DIRECTIONS[0]} ({cut[0]:.0%})"
    )
    return Sign(0, False, seen)


def _head_and_feet(body: _Body, organs: Mapping[str, Mask]) -> Sign | None:
    """Compare the height of the lungs with that of liver and spleen, or of the body's centre."""
    share_Z, step_mm = body.lung_share_Z, body.spacing_mm[0]
    if not share_Z.any():
        return None
    lungs_mm = float(np.average(np.arange(len(share_Z)), weights=share_Z**2)) * step_mm
    centre_mm = (len(share_Z) - 1) / 2 * step_mm
    above_mm, least_mm, other = lungs_mm - centre_mm, _MIN_LUNG_OFFSET * centre_mm, "body's centre"
    if organs:
        organs_mm = [body.centre_mm(0, mask_ZYX) for mask_ZYX in organs.values()]
        above_mm, least_mm = lungs_mm - float(np.mean(organs_mm)), _MIN_LUNG_OFFSET_MM
        other = " and ".join(organs)
    if abs(above_mm) < least_mm:
        return None
    seen = f"head and feet look swapped: the lungs lie {-above_mm:.0f} mm below the {other}"
    return Sign(0, above_mm > 0, seen)


def _front_and_back(body: _Body) -> Sign | None:
    """Compare the spine with the centre of the body in front of it and behind it.

    The spine is where a column of voxels along Z, in the middle half of the body, has most bone.
    In a scan without lungs this may be contrast in the bowel. Bowel gas tells: it lies in front.
    """
    from scipy import ndimage

    lungs = np.flatnonzero(body.lung_share_Z > body.lung_share_Z.max() / 4)
    part = slice(None)
    if lungs.size:
        margin = body.num_voxels(_NEAR_LUNGS_MM)[0]
        part = slice(max(0, lungs[0] - margin), lungs[-1] + 1 + margin)
    mask_ZYX = body.mask_ZYX[part]
    bone_ZYX = (mask_ZYX & (body.hu_ZYX[part] > _BONE_HU)).astype(np.float32)
    sigma = (0, *(_SPINE_MM / step for step in body.spacing_mm[1:]))
    # Clipped, so that bone in many slices counts more than much contrast in a few.
    share_YX = ndimage.gaussian_filter(bone_ZYX, sigma).clip(max=_SPINE_DENSITY).mean(axis=0)
    num_columns = share_YX.shape[1]
    share_YX[:, : num_columns // 4] = share_YX[:, num_columns - num_columns // 4 :] = 0
    y, x = (int(i) for i in np.unravel_index(share_YX.argmax(), share_YX.shape))
    rows = np.flatnonzero(mask_ZYX[:, :, x].mean(axis=0) > 0.5)
    if share_YX[y, x] < _MIN_SPINE_SHARE or not rows.size:
        return None
    centre = (rows[0] + rows[-1]) / 2
    behind = float(y - centre)
    if abs(behind) < _MIN_SPINE_OFFSET * rows.size:
        return None
    if not lungs.size:
        gas_ZYX = body.without_thin(body.air_ZYX, _SMOOTHING_MM)
        if not gas_ZYX.any() or (np.nonzero(gas_ZYX)[1].mean() - centre) * behind >= 0:
            return None
    ahead_mm = -behind * body.spacing_mm[1]
    seen = (
        f"front and back look swapped: the spine lies {ahead_mm:.0f} mm in front of the body's "
        "centre"
    )
    return Sign(1, behind > 0, seen)


def _labelled_sides(body: _Body, organs: Mapping[str, Mask]) -> Sign | None:
    """Compare liver and spleen along X, or one of them with the body's centre."""
    x_mm = {name: body.centre_mm(2, mask_ZYX) for name, mask_ZYX in organs.items()}
    centre_mm = body.centre_mm(2)
    left_mm = x_mm.get("spleen", centre_mm) - x_mm.get("liver", centre_mm)
    # A spleen on the right is still left of the liver's centre where it was drawn in the liver.
    right_mm = {
        "liver": x_mm.get("liver", centre_mm) - centre_mm,
        "spleen": centre_mm - x_mm.get("spleen", centre_mm),
    }
    wrong = max(right_mm, key=lambda name: right_mm[name])
    if right_mm[wrong] > _MIN_OWN_SIDE_MM and left_mm > 0:
        side = "left" if wrong == "liver" else "right"
        seen = f"the {wrong}'s centre lies {right_mm[wrong]:.0f} mm {side} of the body's"
        return Sign(2, False, seen)
    if abs(left_mm) < _MIN_SIDE_MM:
        return None
    right, left = (name if name in x_mm else "body" for name in ("liver", "spleen"))
    seen = (
        f"left and right look swapped: the {right}'s centre lies {-left_mm:.0f} mm left of the "
        f"{left}'s"
    )
    return Sign(2, left_mm > 0, seen)


def _sides(body: _Body, ends: Sign | None) -> Sign | None:
    """Look for the liver below the lungs and for the heart between them.

    Each is the deepest soft tissue of a slice. The heart must lie on the other side than the liver,
    because a large spleen looks like a liver.
    """
    if ends is None:
        return None
    upwards = slice(None, None, 1 if ends.agrees else -1)
    share_Z = body.lung_share_Z[upwards]
    bottom = int(np.argmax(share_Z > share_Z.max() / 4))
    if bottom == 0:
        return None
    below = slice(max(0, bottom - body.num_voxels(_NEAR_LUNGS_MM)[0]), bottom)
    x_mm_Z = _deepest_x_mm(body)[upwards] - body.centre_mm(2)
    liver_mm = float(np.median(x_mm_Z[below]))
    heart_mm = float(np.median(x_mm_Z[share_Z > 0.7 * share_Z.max()]))
    if abs(liver_mm) < _MIN_LIVER_MM or abs(heart_mm) < _MIN_SIDE_MM or liver_mm * heart_mm > 0:
        return None
    seen = (
        f"left and right look swapped: the largest organ below the lungs lies {liver_mm:.0f} mm "
        f"left of the body's centre, the heart {-heart_mm:.0f} mm right of it"
    )
    return Sign(2, liver_mm < 0, seen)


def _deepest_x_mm(body: _Body) -> NDArray[np.float64]:
    """Return the position along X of the deepest soft tissue of each slice."""
    from scipy import ndimage

    low, high = _ORGAN_HU
    soft_ZYX = body.mask_ZYX & (body.smooth_ZYX > low) & (body.smooth_ZYX < high)
    columns = [
        ndimage.distance_transform_edt(plane_YX, sampling=body.spacing_mm[1:]).max(axis=0).argmax()
        for plane_YX in soft_ZYX
    ]
    return np.array(columns) * body.spacing_mm[2]
