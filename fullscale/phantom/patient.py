"""Simulate one scan of one patient, with arms, tables, fields and slices as real cohorts hold them.

What a keyword does not name stays as it is: the same patient with other options has the same body,
and its organs lie at the same places in the world.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from fullscale.phantom.arms import ArmPosition
from fullscale.phantom.contrast import draw_contrast
from fullscale.phantom.scanner import (
    LARGE_FIELD_MM,
    THICK_TABLE,
    Acquisition,
    Cushion,
    build_body,
    draw_acquisition,
    simulate,
)

CUSHION_MM, CUSHION_HU = (10.0, 25.0), (-80.0, -50.0)
"""Range of a cushion's thickness and HU: foam with a cover, nearly as dense as fat."""


class Options(TypedDict, total=False):
    """Variants of a scan that `simulate_patient` can make; see there."""

    arms: ArmPosition
    slice_mm: float | None
    padded: bool
    cushion: bool
    thick_table: bool


def simulate_patient(
    seed: int,
    patient: int,
    *,
    repeat: int = 0,
    arms: ArmPosition = "none",
    slice_mm: float | None = None,
    padded: bool = False,
    cushion: bool = False,
    thick_table: bool = False,
    full_size: bool = False,
    coarsen: float = 1.0,
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.uint8], Acquisition]:
    """Simulate a scan of a patient; equal arguments give equal arrays.

    `arms`, `padded`, `cushion` and `thick_table` leave the label of every old voxel as it is: they
    add pixels around the grid and change the HU outside the body, and the noise.

    Args:
        seed: seed of the cohort.
        patient: number of the patient, from 0.
        repeat: number of the scan: another contrast, grid and noise of the same body.
        arms: "none", "beside" the trunk with 10 to 40 mm of air between, or "touching" it over a
            part of its height. The grid grows until it holds them.
        slice_mm: thickness of the slices, over the same range as without. Thin slices are noisier.
        padded: a square field with a scan circle of `LARGE_FIELD_MM`, which may cut the arms, and
            -1024 outside of it.
        cushion: a foam cushion 10 to 25 mm thick under the back.
        thick_table: a table 60 mm thick instead of two thin sheets.
        full_size: 512 x 512 pixels of 0.7 to 0.9 mm and thin slices.
        coarsen: factor that enlarges the pixels, and the slices unless `slice_mm` is given.

    Returns:
        HU (int16) and organ ids (uint8), both (Z, Y, X), LPS, and their grid.

    Raises:
        ValueError: `slice_mm` not above 0, or an unknown position of the arms.
    """
    # A generator for each part: what an option draws does not move the draws of the others.
    scan_rng = np.random.default_rng([seed, patient, 1 + repeat])
    body_rng, arms_rng, cushion_rng = (
        np.random.default_rng([seed, patient, 0, *key]) for key in ((), (1,), (2,))
    )
    body = build_body(body_rng, draw_contrast(scan_rng), arms=arms, arms_rng=arms_rng)
    scan = draw_acquisition(scan_rng, body, full_size=full_size, coarsen=coarsen)
    if slice_mm is not None:
        scan = scan.reslice(slice_mm)
    if padded:
        scan = scan.pad(LARGE_FIELD_MM)
    if thick_table:
        scan = replace(scan, sheets=THICK_TABLE)
    if cushion:
        drawn = (float(cushion_rng.uniform(*limits)) for limits in (CUSHION_MM, CUSHION_HU))
        scan = replace(scan, cushion=Cushion(*drawn))
    return *simulate(body, scan, scan_rng), scan
