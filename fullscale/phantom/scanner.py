"""The phantom's CT scanner: samples a body on a grid, with partial volume, blur, noise, streaks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.ndimage as ndi

from fullscale.phantom.contrast import Contrast
from fullscale.phantom.neighbours import build_neighbours
from fullscale.phantom.organs import LIVER, SPLEEN, build_liver, build_spleen
from fullscale.phantom.shapes import Array, Frame, Points, Structure, Triple, grid_over, waves
from fullscale.phantom.trunk import build_trunk

ORIENTATIONS = ("LPS", "RAS", "LAS", "RPI", "LPI", "RAI", "RPS", "LAI")
ORIENTATION_WEIGHTS = (0.28, 0.24, 0.14, 0.1, 0.08, 0.06, 0.05, 0.05)
AIR_HU, FLOOR_HU, CEILING_HU = -1000.0, -1024, 3071
PLANE_GAP_MM = 2.7
"""A slice averages planes that lie at most this far apart."""


@dataclass(frozen=True)
class Body:
    """A patient's structures in the standard frame, and how the frame lies in the scanner."""

    structures: list[Structure]
    frame: Frame
    organ_span_mm: tuple[float, float]
    """Lowest and highest z of liver and spleen in the scanner."""
    fat_mm: float
    metal_mm: Triple | None
    """Where a surgical clip lies in the scanner, if the patient has one."""


def build_body(rng: np.random.Generator, contrast: Contrast) -> Body:
    """Draws a patient. With an equal `rng`, another `contrast` leaves every shape as it is."""
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
    return Body(
        [*trunk.structures, *neighbours.beneath, *spleen, *liver, *neighbours.above],
        frame,
        (float(heights.min()), float(heights.max())),
        trunk.fat_mm,
        (clip[0], clip[1], clip[2]) if has_clip else None,
    )


@dataclass(frozen=True)
class Acquisition:
    """The scanner's grid, kernel and noise. Shapes and positions are (z, y, x), LPS."""

    shape: tuple[int, int, int]
    spacing_mm: Triple
    origin_mm: Triple
    """Position of the centre of the first voxel."""
    table_mm: Triple
    """Where the scanner's own origin lies; it only moves the affine."""
    orientation: str
    kernel_mm: float
    """Standard deviation of the reconstruction kernel in the plane."""
    noise_hu: float
    streak_hu: float


def draw_acquisition(
    rng: np.random.Generator, body: Body, *, full_size: bool = False, coarsen: float = 1.0
) -> Acquisition:
    """A grid that holds the trunk, with slices above and below liver and spleen.

    `coarsen` enlarges the voxels along every axis, for quick looks.
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
    return Acquisition(
        (num_z, num_y, num_x),
        (thickness, pixel, pixel),
        (
            top - (num_z - 1) * thickness,
            center_y - (num_y - 1) / 2 * pixel,
            center_x - (num_x - 1) / 2 * pixel,
        ),
        (float(rng.uniform(-1200, 300)), float(rng.uniform(-180, 20)), float(rng.uniform(-20, 20))),
        str(rng.choice(ORIENTATIONS, p=ORIENTATION_WEIGHTS)),
        float(rng.uniform(0.7, 1.0)) if full_size else float(rng.uniform(0.7, 1.5)),
        float(rng.uniform(5, 10.5)) * (1.4 if full_size else 1.0),
        float(rng.uniform(0.5, 4)),
    )


def simulate(
    body: Body, scan: Acquisition, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.uint8]]:
    """Scans the body.

    Returns:
        HU (int16) and organ ids (uint8, the organ that fills at least half of the voxel), both
        (Z, Y, X), LPS. Works slice by slice: beside these two, memory holds a few slices.
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
    for index in range(scan.shape[0]):
        z = scan.origin_mm[0] + index * thickness
        planes = [
            Points(*np.broadcast_arrays(*(np.float32(v) for v in (x[None, :], y[:, None], z + o))))
            for o in offsets
        ]
        hu, liver, spleen = np.mean([_paint(body, plane, pixel) for plane in planes], axis=0)
        hu = hu + _metal_hu(body, planes[num_planes // 2]) * (hu > -900)
        hu = ndi.gaussian_filter(hu, scan.kernel_mm / pixel, mode="nearest")
        hu = hu + noise.draw(hu)
        image[index] = np.clip(np.rint(hu), FLOOR_HU, CEILING_HU).astype(np.int16)
        label[index][liver >= 0.5] = LIVER
        label[index][spleen >= 0.5] = SPLEEN
    return image, label


def _paint(body: Body, plane: Points, pixel_mm: float) -> Array:
    """HU and the shares of liver and spleen, (3, Y, X), on one plane without thickness."""
    at = body.frame.to_standard(plane)
    hu = _table_hu(plane, body)
    share = np.zeros((SPLEEN + 1, *hu.shape), dtype=np.float32)
    spans = [(v.min(axis=axis), v.max(axis=axis)) for v, axis in ((at.x, 0), (at.y, 1))]
    low_z, high_z = float(at.z.min()), float(at.z.max())
    windows: dict[tuple[int, ...], Points] = {}
    for structure in body.structures:
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


def _table_hu(plane: Points, body: Body) -> Array:
    """Air, and the two thin curved sheets of the table under the patient."""
    top = (101 + body.fat_mm) * body.frame.scale[1] + 8 - plane.x**2 / 1400
    hu = np.full(plane.x.shape, AIR_HU, dtype=np.float32)
    for depth_mm, sheet_hu in ((0.0, 120.0), (32.0, -40.0)):
        away = np.abs(plane.y - top - depth_mm) - 1.5
        hu += np.clip(0.5 - away / 2.5, 0, 1) * (np.abs(plane.x) < 200) * (sheet_hu - hu)
    return hu


def _metal_hu(body: Body, plane: Points) -> Array | float:
    """What a surgical clip adds: a bright spot and its star of streaks."""
    if body.metal_mm is None:
        return 0.0
    x, y, z = body.metal_mm
    near = np.exp(-(((plane.z - z) / 6) ** 2))
    away, angle = np.hypot(plane.x - x, plane.y - y), np.arctan2(plane.y - y, plane.x - x)
    star = 90 * np.cos(9 * angle + z) * np.exp(-away / 45) * (away > 4)
    return np.asarray(near * (star + 2200 * np.exp(-((away / 2.5) ** 2))))


class NoiseSource:
    """CT noise: blurred grain, stronger deep in the body, and streaks along the widest rows.

    The grain has the spectrum of filtered back-projection: rising with frequency, then cut off
    by a soft kernel; neighbouring slices share some of it.
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
        """White noise through a frequency response, scaled to unit variance."""
        shape = self._scan.shape[1:]
        white = self._rng.standard_normal(shape, dtype=np.float32)
        made = np.fft.irfft2(np.fft.rfft2(white) * response, s=shape)
        return np.asarray(made / made.std(), dtype=np.float32)

    def draw(self, hu: Array) -> Array:
        """Noise in HU for the next slice, given its noiseless HU (Y, X)."""
        self._last = 0.35 * self._last + 0.937 * self._shaped(self._grain)
        pixel = self._scan.spacing_mm[1]
        density = np.clip((hu + 1000) / 1000, 0, 2.2)
        is_body = density > 0.1
        depth = ndi.gaussian_filter(np.minimum(density, 1), 40 / pixel)
        path = np.minimum(density.sum(axis=1, keepdims=True) * pixel / 300, 1.5)
        grain = self._last * (0.3 + 0.7 * np.minimum(depth / 0.8, 1.2)) * np.where(is_body, 1, 0.1)
        streak = self._shaped(self._streak) * path**2 * is_body
        return np.asarray(self._scan.noise_hu * grain + self._scan.streak_hu * streak)
