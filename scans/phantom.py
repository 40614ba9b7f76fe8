"""Synthetic abdominal CT with true labels of liver and spleen, in the nnU-Net raw layout.

An analytic body (`phantom_trunk`, `phantom_organs`) is sampled on a scanner's grid: several planes
per slice for the partial volume through it, antialiased surfaces within a plane, a soft
reconstruction kernel, correlated noise and streaks.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
import scipy.ndimage as ndi

from scans.phantom_contrast import Contrast, draw_contrast
from scans.phantom_organs import LIVER, SPLEEN, build_organs
from scans.phantom_shapes import Array, Points, Structure, waves
from scans.phantom_trunk import build_trunk

ORGANS = {"liver": LIVER, "spleen": SPLEEN}
CASES_PER_BLOCK = 13
"""Cases come in blocks: twelve patients, then a second scan of one of them."""
RESCANNED, LIVER_ONLY, SPLEEN_ONLY = 5, 3, 8
ORIENTATIONS = ("LPS", "RAS", "LAS", "RPI", "LPI", "RAI", "RPS", "LAI")
ORIENTATION_WEIGHTS = (0.28, 0.24, 0.14, 0.1, 0.08, 0.06, 0.05, 0.05)
AIR_HU, FLOOR_HU, CEILING_HU = -1000.0, -1024, 3071


@dataclass(frozen=True)
class Case:
    """Who is scanned, how often before, and which organs are annotated."""

    name: str
    patient: int
    repeat: int
    annotated: tuple[str, ...]


def case_at(index: int) -> Case:
    """The case at `index` (from 0); the same whatever the number of cases."""
    block, place = divmod(index, CASES_PER_BLOCK)
    again = place == CASES_PER_BLOCK - 1
    organs = {LIVER_ONLY: ("liver",), SPLEEN_ONLY: ("spleen",)}.get(place, tuple(ORGANS))
    patient = block * (CASES_PER_BLOCK - 1) + (RESCANNED if again else place)
    return Case(f"phantom_{index + 1:03d}", patient, int(again), organs)


@dataclass(frozen=True)
class Body:
    """A patient's structures in the standard frame, and how the frame lies in the scanner."""

    structures: list[Structure]
    scale: tuple[float, float, float]
    roll_deg: float
    warp: tuple[Callable[[Points], Array], ...]
    liver_span_mm: tuple[float, float]
    fat_mm: float
    metal: tuple[float, float, float] | None

    def to_standard(self, p: Points) -> Points:
        """Scanner position to the standard adult's, by roll, scale and a smooth deformation."""
        c, s = (
            np.float32(np.cos(np.deg2rad(self.roll_deg))),
            np.float32(np.sin(np.deg2rad(self.roll_deg))),
        )
        q = Points(
            (c * p.x + s * p.y) / np.float32(self.scale[0]),
            (c * p.y - s * p.x) / np.float32(self.scale[1]),
            p.z / np.float32(self.scale[2]),
        )
        return Points(*(v + np.float32(4.5) * w(q) for v, w in zip(q, self.warp, strict=True)))


def build_body(seed: int, patient: int, contrast: Contrast) -> Body:
    """The patient's body. Another contrast leaves every shape as it is."""
    rng = np.random.default_rng([seed, patient, 0])
    size = rng.normal(1.0, 0.045)
    scale = tuple(float(v) for v in np.clip(size * rng.normal(1, 0.03, 3), 0.88, 1.13))
    warp = tuple(waves(rng, 8, (150, 320)) for _ in range(3))
    roll_deg = float(rng.normal(0, 2.0))
    metal = (
        (float(rng.uniform(-60, 60)), float(rng.uniform(-50, 10)), float(rng.uniform(-60, 40)))
        if rng.uniform() < 0.2
        else None
    )
    trunk = build_trunk(rng, contrast.muscle_hu)
    organs = build_organs(rng, trunk, contrast)
    liver = next(s.solid for s in organs if s.organ == LIVER)
    return Body(
        trunk.structures + organs,
        (scale[0], scale[1], scale[2]),
        roll_deg,
        warp,
        _span(liver.distance, liver.box, scale[2]),
        trunk.fat_mm,
        metal,
    )


def _span(
    distance: Callable[[Points], Array],
    box: tuple[tuple[float, float, float], tuple[float, float, float]],
    scale: float,
) -> tuple[float, float]:
    axes = [np.arange(a, b, 5, dtype=np.float32) for a, b in zip(*box, strict=True)]
    inside = distance(Points(*np.meshgrid(*axes, indexing="ij"))) < 0
    heights = axes[2][inside.any(axis=(0, 1))] * scale
    return float(heights.min()), float(heights.max())


@dataclass(frozen=True)
class Acquisition:
    """The scanner's grid, kernel and noise. Shapes and spacings are (z, y, x)."""

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float]
    """LPS position (z, y, x) of the centre of voxel (0, 0, 0) of the LPS array."""
    world_shift_mm: tuple[float, float, float]
    """Table position: added to LPS (x, y, z) in the affine."""
    orientation: str
    kernel_mm: float
    noise_hu: float
    streak_hu: float


def draw_acquisition(
    rng: np.random.Generator, body: Body, full_size: bool, coarsen: float = 1.0
) -> Acquisition:
    """A grid that holds the trunk, with slices above and below the liver."""
    width = 2 * (149 + body.fat_mm * 0.75) * body.scale[0] + rng.uniform(10, 36)
    pixel = float(rng.uniform(2.7, 3.2)) * coarsen
    num_x = int(np.clip(np.ceil(width / pixel / 4) * 4, 112 / coarsen, 144 / coarsen))
    num_y = num_x if rng.uniform() < 0.35 else int(np.ceil(num_x * 0.8 / 4) * 4)
    low, high = body.liver_span_mm
    length = (high - low) / rng.uniform(0.45, 0.78)
    num_z = int(rng.integers(28, 42))
    thickness = float(np.clip(round(length / num_z * 2 / coarsen) / 2, 4, 8)) * coarsen
    if full_size:
        pixel, num_x, num_y = float(np.clip(width / 512, 0.7, 0.9)), 512, 512
        thickness = float(rng.uniform(1.0, 1.5))
    else:
        pixel = max(pixel, width / num_x)
    num_z = max(int(np.ceil(length / thickness)), 6)
    above = float(np.clip((num_z * thickness - (high - low)) * rng.uniform(0.3, 0.6), 20, 75))
    top = high + above
    center_y = 4.0 + 0.3 * body.fat_mm + rng.uniform(-6, 6)
    return Acquisition(
        (num_z, num_y, num_x),
        (thickness, pixel, pixel),
        (
            top - (num_z - 1) * thickness,
            center_y - (num_y - 1) / 2 * pixel,
            float(rng.uniform(-8, 8)) - (num_x - 1) / 2 * pixel,
        ),
        (float(rng.uniform(-20, 20)), float(rng.uniform(-180, 20)), float(rng.uniform(-1200, 300))),
        str(rng.choice(ORIENTATIONS, p=ORIENTATION_WEIGHTS)),
        float(rng.uniform(1.5, 2.4)) if not full_size else float(rng.uniform(0.7, 1.0)),
        float(rng.uniform(5, 11)) * (1.3 if full_size else 1.0),
        float(rng.uniform(0.5, 4.0)),
    )


def simulate(
    body: Body, scan: Acquisition, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.uint8]]:
    """HU (int16) and label ids (uint8), both (Z, Y, X), LPS. Works slice by slice."""
    image = np.empty(scan.shape, dtype=np.int16)
    label = np.zeros(scan.shape, dtype=np.uint8)
    x, y = (
        (scan.origin_mm[axis] + np.arange(scan.shape[axis]) * scan.spacing_mm[axis]).astype(
            np.float32
        )
        for axis in (2, 1)
    )
    thickness, pixel = scan.spacing_mm[0], scan.spacing_mm[2]
    num_planes = int(np.ceil(thickness / 2.5))
    offsets = ((np.arange(num_planes) + 0.5) / num_planes - 0.5) * thickness
    noise = NoiseSource(rng, scan)
    for index in range(scan.shape[0]):
        z = scan.origin_mm[0] + index * thickness
        planes = [_paint_plane(body, x, y, float(z + o), pixel) for o in offsets]
        hu, liver, spleen = np.mean(planes, axis=0)
        hu = _add_metal(hu, body, x, y, float(z))
        hu = ndi.gaussian_filter(hu, scan.kernel_mm / pixel, mode="nearest")
        hu = hu + noise.draw(hu)
        image[index] = np.clip(np.rint(hu), FLOOR_HU, CEILING_HU).astype(np.int16)
        label[index][liver >= 0.5] = LIVER
        label[index][spleen >= 0.5] = SPLEEN
    return image, label


def _paint_plane(body: Body, x: Array, y: Array, z: float, pixel_mm: float) -> Array:
    """HU and the shares of liver and spleen, (3, Y, X), on one plane without thickness."""
    plane = Points(*np.broadcast_arrays(x[None, :], y[:, None], np.float32(z)))
    at = body.to_standard(plane)
    hu = _table_hu(plane, body)
    share = np.zeros((2, *hu.shape), dtype=np.float32)
    low_x, high_x = at.x.min(axis=0), at.x.max(axis=0)
    low_y, high_y = at.y.min(axis=1), at.y.max(axis=1)
    low_z, high_z = float(at.z.min()), float(at.z.max())
    margin = pixel_mm
    for structure in body.structures:
        low, high = structure.solid.box
        if low_z > high[2] + margin or high_z < low[2] - margin:
            continue
        columns = np.flatnonzero((high_x > low[0] - margin) & (low_x < high[0] + margin))
        rows = np.flatnonzero((high_y > low[1] - margin) & (low_y < high[1] + margin))
        if not columns.size or not rows.size:
            continue
        window = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        here = Points(*(v[window] for v in at))
        cover = np.clip(0.5 - structure.solid.distance(here) / np.float32(pixel_mm), 0, 1)
        if not cover.any():
            continue
        tissue = structure.hu if isinstance(structure.hu, float) else structure.hu(here)
        hu[window] += cover * (tissue - hu[window])
        if structure.organ is not None:
            for organ in (LIVER, SPLEEN):
                shared = share[organ - 1][window]
                shared += cover * ((structure.organ == organ) - shared)
    return np.stack([hu, *share])


def _table_hu(plane: Points, body: Body) -> Array:
    """Air, and the two thin curved sheets of the table under the patient."""
    top = (101 + 0.8 * body.fat_mm) * body.scale[1] + 9 - plane.x**2 / 1400
    hu = np.full(plane.x.shape, AIR_HU, dtype=np.float32)
    for depth, sheet_hu in ((0.0, -150.0), (32.0, -350.0)):
        away = np.abs(plane.y - top - depth) - np.float32(1.5)
        sheet = np.clip(0.5 - away / 2.5, 0, 1) * (np.abs(plane.x) < 200)
        hu += sheet * (sheet_hu - hu)
    return hu


def _add_metal(hu: Array, body: Body, x: Array, y: Array, z: float) -> Array:
    """A surgical clip or stent end with its star of streaks, where the patient has one."""
    if body.metal is None:
        return hu
    mx, my, mz = body.metal
    near = np.exp(-(((z - mz) / 6) ** 2))
    if near < 0.01:
        return hu
    dx, dy = x[None, :] - np.float32(mx), y[:, None] - np.float32(my)
    away = np.hypot(dx, dy)
    angle = np.arctan2(dy, dx)
    star = 160 * near * np.cos(9 * angle + mz) * np.exp(-away / 45) * (away > 4)
    spot = 2200 * near * np.exp(-((away / 2.5) ** 2))
    return np.asarray(hu + (star + spot) * (hu > -900), dtype=np.float32)


class NoiseSource:
    """CT noise: blurred grain, stronger deep in the body, and streaks along the wide rows."""

    def __init__(self, rng: np.random.Generator, scan: Acquisition) -> None:
        self._rng = rng
        self._scan = scan
        _, height, width = scan.shape
        fy = np.fft.fftfreq(height, scan.spacing_mm[1])[:, None]
        fx = np.fft.rfftfreq(width, scan.spacing_mm[2])[None, :]
        f = np.hypot(fx, fy)
        cut = 0.5 / scan.spacing_mm[1] * 0.62
        self._grain = np.sqrt(f / cut + 0.15) * np.exp(-((f / cut) ** 2) / 2)
        self._streak = np.exp(-((fx * 60) ** 2)) * np.exp(-((fy / cut) ** 2) / 2)
        self._last = self._shaped(self._grain)

    def _shaped(self, response: npt.NDArray[np.float64]) -> Array:
        """White noise through a frequency response, scaled to unit variance."""
        height, width = self._scan.shape[1:]
        white = self._rng.standard_normal((height, width), dtype=np.float32)
        made = np.fft.irfft2(np.fft.rfft2(white) * response, s=(height, width))
        return np.asarray(made / made.std(), dtype=np.float32)

    def draw(self, hu: Array) -> Array:
        """Noise in HU for the next slice, whose noiseless HU are (Y, X)."""
        self._last = np.float32(0.35) * self._last + np.float32(0.937) * self._shaped(self._grain)
        pixel = self._scan.spacing_mm[1]
        tissue = np.clip((hu + 1000) / 1000, 0, 2.2)
        depth = ndi.gaussian_filter(np.minimum(tissue, 1), 40 / pixel)
        path = tissue.sum(axis=1, keepdims=True) * pixel / 300
        inside = tissue > 0.1
        grain = self._last * (0.3 + 0.7 * np.minimum(depth / 0.8, 1.2)) * np.where(inside, 1, 0.1)
        streak = self._shaped(self._streak) * np.minimum(path, 1.5) ** 2 * inside
        return np.asarray(
            self._scan.noise_hu * grain + self._scan.streak_hu * streak, dtype=np.float32
        )


def oriented(volume: npt.NDArray[np.generic], scan: Acquisition) -> nib.Nifti1Image:
    """The (Z, Y, X) LPS volume as a NIfTI image in the scan's own voxel order."""
    data = np.transpose(volume, (2, 1, 0))
    step = np.array(scan.spacing_mm[::-1])
    start = np.array(scan.origin_mm[::-1]) + np.array(scan.world_shift_mm)
    axes = np.diag(step)
    for axis, (code, lps) in enumerate(zip(scan.orientation, "LPS", strict=True)):
        if code != lps:
            data = np.flip(data, axis)
            start[axis] += step[axis] * (data.shape[axis] - 1)
            axes[axis, axis] = -step[axis]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes, start
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    image = nib.Nifti1Image(np.asfortranarray(data), affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    return image


def write_sample(
    folder: Path,
    num_cases: int,
    seed: int,
    *,
    full_size: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Writes a synthetic cohort in the nnU-Net raw layout, as a whole or not at all.

    Args:
        folder: Where to write; must not exist yet, or be empty.
        num_cases: How many scans, at least 1. 26 scans are 24 patients.
        seed: Same seed, same bytes. Case i does not depend on `num_cases`.
        full_size: 512 x 512 pixels of 0.7 to 0.9 mm and about 300 slices, for benchmarks.
        progress: Called with (cases done, num_cases) after every case.

    Returns:
        The case names in order.

    Raises:
        ValueError: `num_cases` below 1 or `seed` below 0.
        FileExistsError: `folder` is a file, or holds something.
    """
    if num_cases < 1:
        raise ValueError(f"num_cases is {num_cases}, expected at least 1: ask for one case or more")
    if seed < 0:
        raise ValueError(f"seed is {seed}, expected 0 or more: choose a non-negative whole number")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, expected a new or empty folder: name another")
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} is not empty, expected a new or empty folder: "
            "name another folder, or move its content away first"
        )
    draft = folder.absolute().with_name(f".{folder.absolute().name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    for name in ("imagesTr", "labelsTr"):
        (draft / name).mkdir(parents=True)
    cases = [case_at(index) for index in range(num_cases)]
    for done, case in enumerate(cases, start=1):
        _write_case(draft, case, seed, full_size)
        if progress is not None:
            progress(done, num_cases)
    _write_tables(draft, cases)
    draft.replace(folder)
    return [case.name for case in cases]


def _write_case(folder: Path, case: Case, seed: int, full_size: bool) -> None:
    rng = np.random.default_rng([seed, case.patient, 1 + case.repeat])
    body = build_body(seed, case.patient, draw_contrast(rng))
    scan = draw_acquisition(rng, body, full_size)
    image, label = simulate(body, scan, rng)
    for organ, organ_id in ORGANS.items():
        if organ not in case.annotated:
            label[label == organ_id] = 0
    _save(folder / "imagesTr" / f"{case.name}_0000.nii.gz", oriented(image, scan))
    _save(folder / "labelsTr" / f"{case.name}.nii.gz", oriented(label, scan))


def _save(path: Path, image: nib.Nifti1Image) -> None:
    with path.open("wb") as raw:
        with gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=9, mtime=0) as packed:
            image.to_stream(packed)
        raw.flush()
        os.fsync(raw.fileno())


def _write_tables(folder: Path, cases: list[Case]) -> None:
    description = {
        "name": "Fullscale phantom abdomen",
        "description": "Synthetic abdominal CT with true labels of liver and spleen",
        "labels": {"background": 0, **ORGANS},
        "channel_names": {"0": "CT"},
        "file_ending": ".nii.gz",
        "numTraining": len(cases),
        "licence": "Apache-2.0",
        "reference": "generated by scans/phantom.py of Fullscale; shows no person",
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    with (folder / "cases.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["case", "patient", "annotated"])
        for case in cases:
            table.writerow([case.name, f"patient_{case.patient + 1:03d}", ";".join(case.annotated)])
