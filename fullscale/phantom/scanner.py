"""Simulate a CT scan of the phantom: sampling with partial volume, blur, noise and streaks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import scipy.ndimage as ndi

from fullscale.phantom.arms import ArmPosition, build_arms
from fullscale.phantom.contrast import Contrast
from fullscale.phantom.neighbours import build_neighbours
from fullscale.phantom.organs import LIVER, SPLEEN, build_liver, build_spleen
from fullscale.phantom.shapes import Array, Frame, Points, Structure, Triple, grid_over, waves
from fullscale.phantom.trunk import build_trunk

# Axis orders of the files and their probabilities; readers must handle all of them.
ORIENTATIONS = ("LPS", "RAS", "LAS", "RPI", "LPI", "RAI", "RPS", "LAI")
ORIENTATION_WEIGHTS = (0.28, 0.24, 0.14, 0.1, 0.08, 0.06, 0.05, 0.05)
AIR_HU, FLOOR_HU, CEILING_HU = -1000.0, -1024, 3071  # the 12-bit range of CT scanners
PADDING_HU = FLOOR_HU
"""Value outside the scan circle."""
LARGE_FIELD_MM = 500.0
"""Diameter of the largest usual scan circle; it cuts the arms of all but slim patients."""
PLANE_GAP_MM = 2.7
"""Largest distance of the planes that are averaged to one thick slice."""


class Sheet(NamedTuple):
    """A sheet of the table: depth of its middle below the table's top, half thickness, HU."""

    depth_mm: float
    half_mm: float
    hu: float


THIN_TABLE = (Sheet(0.0, 1.5, 120.0), Sheet(32.0, 1.5, -40.0))
THICK_TABLE = (Sheet(28.0, 28.0, -900.0), Sheet(3.5, 3.5, 190.0), Sheet(56.0, 2.5, 60.0))
"""Curved sheets, in painting order; the thick table has foam between two."""
CUSHION_DIP_MM = 14.0  # how far a cushion rises beside the back that presses it down


class Cushion(NamedTuple):
    """A foam cushion between table and back: thickness below the back, and its HU."""

    thickness_mm: float
    hu: float


@dataclass(frozen=True)
class Body:
    """One patient.

    Attributes:
        structures: structures in the standard frame, in painting order.
        frame: position of the standard frame in the scanner.
        organ_span_mm: lowest and highest z of liver and spleen in the scanner.
        fat_mm: thickness of the subcutaneous fat.
        metal_mm: position of a surgical clip in the scanner, if any.
        arms_reach_mm: largest |x| of the arms in the scanner; 0 without arms.
    """

    structures: list[Structure]
    frame: Frame
    organ_span_mm: tuple[float, float]
    fat_mm: float
    metal_mm: Triple | None
    arms_reach_mm: float = 0.0


def build_body(
    rng: np.random.Generator,
    contrast: Contrast,
    *,
    arms: ArmPosition = "none",
    arms_rng: np.random.Generator | None = None,
) -> Body:
    """Draw a patient; with equal generators, the shapes do not depend on `contrast`.

    Args:
        rng: source of all random draws but those of the arms.
        contrast: HU of the scan.
        arms: where the arms are: raised out of the scan ("none"), "beside" the trunk with air
            between, or "touching" it. Everything else is the same.
        arms_rng: source of the arms' random draws; needed with arms.

    Raises:
        ValueError: an unknown position, or arms without `arms_rng`.
    """
    if arms not in get_args(ArmPosition):
        wanted = ", ".join(get_args(ArmPosition))
        raise ValueError(f"arms are {arms!r}, expected one of {wanted}")
    if arms != "none" and arms_rng is None:
        raise ValueError(f"arms are {arms!r} and arms_rng is None: pass a generator to draw them")
    size = rng.normal(1.0, 0.045)
    x, y, z = (float(v) for v in np.clip(size * rng.normal(1, 0.03, 3), 0.88, 1.13))
    u, v, w = (waves(rng, 8, (150, 320)) for _ in range(3))
    frame = Frame((x, y, z), float(rng.normal(0, 2)), (u, v, w))
    clip = [float(rng.uniform(*r)) for r in ((-60, 60), (-50, 10), (-60, 40))]
    has_clip = rng.uniform() < 0.15
    trunk = build_trunk(rng, contrast.muscle_hu)
    neighbours = build_neighbours(rng, trunk, contrast)
    spleen = build_spleen(rng, trunk, neighbours, contrast, frame)
    liver = build_liver(rng, trunk, neighbours, contrast, frame)
    grid = grid_over(((-180.0, -140.0, -190.0), (180.0, 140.0, 140.0)), 5.0)
    at = frame.to_standard(grid)
    organs = [s.solid for s in (*liver, *spleen) if s.organ]
    heights = np.concatenate([grid.z[solid.distance(at) < 0] for solid in organs])
    body = Body(
        [*trunk.structures, *neighbours.beneath, *spleen, *liver, *neighbours.above],
        frame,
        (float(heights.min()), float(heights.max())),
        trunk.fat_mm,
        (clip[0], clip[1], clip[2]) if has_clip else None,
    )
    if arms == "none" or arms_rng is None:
        return body
    found = build_arms(arms_rng, arms, trunk.skin, contrast, trunk.fat_mm, frame.scale)
    # Painted first, so that the trunk flattens an arm that is pressed to it.
    return replace(
        body,
        structures=[*found.structures, *body.structures],
        arms_reach_mm=found.reach_mm * frame.scale[0] + frame.warp_mm,
    )


@dataclass(frozen=True)
class Acquisition:
    """Grid, kernel and noise of one scan. Shapes and positions are (z, y, x), LPS.

    Attributes:
        shape: number of voxels.
        spacing_mm: distance of voxels.
        origin_mm: position of the centre of the first voxel.
        table_mm: offset of the scanner's origin; it only moves the affine.
        orientation: axis codes of the file.
        kernel_mm: standard deviation of the reconstruction kernel in the plane.
        noise_hu: standard deviation of the noise inside the body.
        streak_hu: amplitude of the streaks along the widest rows.
        circle_mm: diameter of the scan circle about the middle of the grid, which has the value
            `PADDING_HU` outside; None: a circle that holds the whole grid.
        sheets: the table.
        cushion: what lies between table and patient, if anything.
    """

    shape: tuple[int, int, int]
    spacing_mm: Triple
    origin_mm: Triple
    table_mm: Triple
    orientation: str
    kernel_mm: float
    noise_hu: float
    streak_hu: float
    circle_mm: float | None = None
    sheets: tuple[Sheet, ...] = THIN_TABLE
    cushion: Cushion | None = None

    def resize(self, width_mm: float, height_mm: float) -> Acquisition:
        """Return a grid of about this size: whole pixels come or go on all sides."""
        pixel = self.spacing_mm[1]
        num_y, num_x = (round(size / pixel) for size in (height_mm, width_mm))
        z, y, x = self.origin_mm
        return replace(
            self,
            shape=(self.shape[0], num_y, num_x),
            origin_mm=(
                z,
                y - (num_y - self.shape[1]) // 2 * pixel,
                x - (num_x - self.shape[2]) // 2 * pixel,
            ),
        )

    def pad(self, circle_mm: float) -> Acquisition:
        """Return the scan with a square field around a scan circle of this diameter.

        Outside the circle the image has the value `PADDING_HU`.
        """
        return replace(self.resize(circle_mm, circle_mm), circle_mm=circle_mm)

    def reslice(self, slice_mm: float) -> Acquisition:
        """Return the scan of the same range in slices of `slice_mm`.

        A slice gathers photons in proportion to its thickness, so the noise changes with the
        inverse square root of it.

        Raises:
            ValueError: `slice_mm` is not above 0.
        """
        if not slice_mm > 0:
            raise ValueError(f"slice_mm is {slice_mm}, expected more than 0")
        old = self.spacing_mm[0]
        length = self.shape[0] * old
        num = max(round(length / slice_mm), 1)
        middle = self.origin_mm[0] + (self.shape[0] - 1) / 2 * old
        return replace(
            self,
            shape=(num, *self.shape[1:]),
            spacing_mm=(slice_mm, *self.spacing_mm[1:]),
            origin_mm=(middle - (num - 1) / 2 * slice_mm, *self.origin_mm[1:]),
            noise_hu=self.noise_hu * float(np.sqrt(old / slice_mm)),
        )


def draw_acquisition(
    rng: np.random.Generator, body: Body, *, full_size: bool = False, coarsen: float = 1.0
) -> Acquisition:
    """Draw a grid that covers trunk and arms, with slices above and below liver and spleen.

    The grid of a body with arms is that of the body without, and pixels around it.

    Args:
        rng: source of all random draws; their number is the same for every argument.
        body: the patient.
        full_size: 512 x 512 pixels and thin slices.
        coarsen: factor that enlarges the voxels along every axis, for previews.
    """
    width = 2 * (149 + 0.8 * body.fat_mm) * body.frame.scale[0] + float(rng.uniform(8, 30))
    low, high = body.organ_span_mm
    length = min((high - low) / float(rng.uniform(0.42, 0.74)), 350.0)
    pixel, flatness = float(rng.uniform(2.85, 3.2)), float(rng.choice([1.0, 0.8, 0.8]))
    thickness = float(np.clip(np.round(2 * length / rng.integers(27, 36)) / 2, 4, 8))
    fine, thin = float(np.clip(width / 512, 0.7, 0.9)), float(rng.uniform(1.0, 1.3))
    share_above = float(rng.uniform(0.3, 0.6))
    if full_size:
        pixel, thickness, num_x, num_y = fine, thin, 512, 512
        length = max(length, 330.0)
    else:
        num_x = int(np.clip(4 * np.ceil(width / pixel / 4), 112, 144))
        pixel = max(pixel, width / num_x) * coarsen
        num_x, thickness = int(num_x / coarsen), thickness * coarsen
        num_y = int(num_x * flatness)
    num_z = int(np.ceil(length / thickness))
    top = high + float(np.clip((length - (high - low)) * share_above, 32, 75))
    center_x, center_y = float(rng.uniform(-6, 6)), 3 + float(rng.uniform(-6, 6))
    scan = Acquisition(
        (num_z, num_y, num_x),
        (thickness, pixel, pixel),
        (
            top - (num_z - 1) * thickness,
            center_y - (num_y - 1) / 2 * pixel,
            center_x - (num_x - 1) / 2 * pixel,
        ),
        (float(rng.uniform(-1200, 300)), float(rng.uniform(-180, 20)), float(rng.uniform(-20, 20))),
        str(rng.choice(ORIENTATIONS, p=ORIENTATION_WEIGHTS)),
        # Kernel and noise follow measurements on real scans of this voxel size.
        float(rng.uniform(0.7, 1.0)) if full_size else float(rng.uniform(0.7, 1.5)),
        float(rng.uniform(5, 10.5)) * (1.4 if full_size else 1.0),
        float(rng.uniform(0.5, 4)),
    )
    if body.arms_reach_mm:
        reach_mm = body.arms_reach_mm + abs(center_x) + 2 * pixel
        scan = scan.resize(2 * reach_mm, scan.shape[1] * pixel)
    return scan


def simulate(
    body: Body, scan: Acquisition, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.uint8]]:
    """Scan the body slice by slice, so that memory holds the result and a few slices.

    Returns:
        HU (int16) and organ ids (uint8, the organ that fills at least half of the voxel), both
        (Z, Y, X), LPS.
    """
    image = np.empty(scan.shape, dtype=np.int16)
    label = np.zeros(scan.shape, dtype=np.uint8)
    y, x = (
        (scan.origin_mm[axis] + np.arange(scan.shape[axis]) * scan.spacing_mm[axis])
        for axis in (1, 2)
    )
    thickness, pixel = scan.spacing_mm[0], scan.spacing_mm[2]
    num_planes = int(np.ceil(thickness / PLANE_GAP_MM))
    offsets = ((np.arange(num_planes) + 0.5) / num_planes - 0.5) * thickness
    noise = NoiseSource(rng, scan)
    is_padding = _outside_circle(scan)
    for index in range(scan.shape[0]):
        z = scan.origin_mm[0] + index * thickness
        planes = [
            Points(*np.broadcast_arrays(*(np.float32(v) for v in (x[None, :], y[:, None], z + o))))
            for o in offsets
        ]
        hu, liver, spleen = np.mean([_paint(body, scan, plane) for plane in planes], axis=0)
        hu = hu + _metal_hu(body, planes[num_planes // 2]) * (hu > -900)
        hu = ndi.gaussian_filter(hu, scan.kernel_mm / pixel, mode="nearest")
        hu = hu + noise.draw(hu)
        image[index] = np.clip(np.rint(hu), FLOOR_HU, CEILING_HU).astype(np.int16)
        if is_padding is not None:
            image[index][is_padding] = PADDING_HU
        label[index][liver >= 0.5] = LIVER
        label[index][spleen >= 0.5] = SPLEEN
    return image, label


def _outside_circle(scan: Acquisition) -> npt.NDArray[np.bool_] | None:
    """Return which pixels (Y, X) have their centre outside the scan circle, if it is smaller."""
    if scan.circle_mm is None:
        return None
    y, x = ((np.arange(n) - (n - 1) / 2) * scan.spacing_mm[1] for n in scan.shape[1:])
    return np.asarray(np.hypot(y[:, None], x[None, :]) > scan.circle_mm / 2)


def _paint(body: Body, scan: Acquisition, plane: Points) -> Array:
    """Return HU and the pixel shares of liver and spleen, (3, Y, X), on one thin plane."""
    pixel_mm = scan.spacing_mm[2]
    at = body.frame.to_standard(plane)
    hu = _table_hu(plane, body, scan)
    share = np.zeros((SPLEEN + 1, *hu.shape), dtype=np.float32)
    spans = [(v.min(axis=axis), v.max(axis=axis)) for v, axis in ((at.x, 0), (at.y, 1))]
    low_z, high_z = float(at.z.min()), float(at.z.max())
    windows: dict[tuple[int, ...], Points] = {}
    for structure in body.structures:
        # Skip pixels outside the structure's box: most structures cover a small part of a plane.
        low, high = structure.solid.box
        if low_z > high[2] + pixel_mm or high_z < low[2] - pixel_mm:
            continue
        columns, rows = (
            np.flatnonzero((top > low[i] - pixel_mm) & (bottom < high[i] + pixel_mm))
            for i, (bottom, top) in enumerate(spans)
        )
        if not columns.size or not rows.size:
            continue
        edges = (int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)
        window = (slice(*edges[:2]), slice(*edges[2:]))
        here = windows.setdefault(edges, Points(*(v[window] for v in at)))
        # The distance at the pixel centre approximates the share of the pixel that is inside.
        cover = np.clip(0.5 - structure.solid.distance(here) / pixel_mm, 0, 1)
        if structure.inside is not None:
            cover = cover * share[structure.inside][window]
        if not cover.any():
            continue
        tissue_hu = structure.hu(here) if callable(structure.hu) else structure.hu
        hu[window] += cover * (tissue_hu - hu[window])
        if structure.inside is None:
            for organ in (LIVER, SPLEEN):
                shared = share[organ][window]
                shared += cover * ((structure.organ == organ) - shared)
    return np.stack([hu, share[LIVER], share[SPLEEN]])


def _table_hu(plane: Points, body: Body, scan: Acquisition) -> Array:
    """Return the HU (Y, X) of air and of cushion and curved table below the patient."""
    back = (101 + body.fat_mm) * body.frame.scale[1]
    hu = np.full(plane.x.shape, AIR_HU, dtype=np.float32)

    def paint(depth: Array, half_mm: float, half_width_mm: float, layer_hu: float) -> None:
        cover = np.clip(0.5 - (np.abs(depth) - half_mm) / 2.5, 0, 1)
        hu[...] += cover * (np.abs(plane.x) < half_width_mm) * (layer_hu - hu)

    gap_mm = 8.0
    if scan.cushion is not None:
        half_mm = (scan.cushion.thickness_mm + CUSHION_DIP_MM) / 2
        top = back + scan.cushion.thickness_mm - plane.x**2 / 1400
        paint(plane.y - top + half_mm, half_mm, 185, scan.cushion.hu)
        gap_mm = scan.cushion.thickness_mm - min(s.depth_mm - s.half_mm for s in scan.sheets)
    top = back + gap_mm - plane.x**2 / 1400
    for depth_mm, half_mm, sheet_hu in scan.sheets:
        paint(plane.y - top - depth_mm, half_mm, 200, sheet_hu)
    return hu


def _metal_hu(body: Body, plane: Points) -> Array | float:
    """Return the HU that a surgical clip adds: a bright spot with a star of streaks."""
    if body.metal_mm is None:
        return 0.0
    x, y, z = body.metal_mm
    near = np.exp(-(((plane.z - z) / 6) ** 2))
    away, angle = np.hypot(plane.x - x, plane.y - y), np.arctan2(plane.y - y, plane.x - x)
    star = 90 * np.cos(9 * angle + z) * np.exp(-away / 45) * (away > 4)
    return np.asarray(near * (star + 2200 * np.exp(-((away / 2.5) ** 2))))


class NoiseSource:
    """CT noise: grain that grows with depth in the body, and streaks along the widest rows.

    The grain has the spectrum of filtered back-projection: it rises with frequency and is cut off
    by a soft kernel. Neighbouring slices are correlated.
    """

    def __init__(self, rng: np.random.Generator, scan: Acquisition) -> None:
        self._rng = rng
        self._scan = scan
        fy = np.fft.fftfreq(scan.shape[1], scan.spacing_mm[1])[:, None]
        fx = np.fft.rfftfreq(scan.shape[2], scan.spacing_mm[2])[None, :]
        cut = 0.62 * 0.5 / scan.spacing_mm[1]
        f = np.hypot(fx, fy) / cut
        self._grain = np.sqrt(f + 0.15) * np.exp(-f * f / 2)
        self._streak = np.exp(-((fx * 60) ** 2) - (fy / cut) ** 2 / 2)
        self._last = self._shaped(self._grain)

    def _shaped(self, response: npt.NDArray[np.float64]) -> Array:
        """Return white noise (Y, X) filtered by a frequency response, scaled to unit variance."""
        shape = self._scan.shape[1:]
        white = self._rng.standard_normal(shape, dtype=np.float32)
        made = np.fft.irfft2(np.fft.rfft2(white) * response, s=shape)
        return np.asarray(made / made.std(), dtype=np.float32)

    def draw(self, hu: Array) -> Array:
        """Return the noise of the next slice in HU, given its noiseless HU (Y, X)."""
        # 0.35^2 + 0.937^2 = 1: correlated with the last slice, at constant variance.
        self._last = 0.35 * self._last + 0.937 * self._shaped(self._grain)
        pixel = self._scan.spacing_mm[1]
        density = np.clip((hu + 1000) / 1000, 0, 2.2)
        is_body = density > 0.1
        depth = ndi.gaussian_filter(np.minimum(density, 1), 40 / pixel)
        path = np.minimum(density.sum(axis=1, keepdims=True) * pixel / 300, 1.5)
        grain = self._last * (0.3 + 0.7 * np.minimum(depth / 0.8, 1.2)) * np.where(is_body, 1, 0.1)
        streak = self._shaped(self._streak) * path**2 * is_body
        return np.asarray(self._scan.noise_hu * grain + self._scan.streak_hu * streak)
