"""Rules for slices, network and training: pure functions of a fingerprint and measured speeds.

docs/plan.md says where each comes from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fullscale.planning.fingerprint import PERCENTILES, CaseFacts, OrganFacts

LADDER = (
    (8.0, 8),
    (6.0, 8),
    (4.0, 8),
    (3.0, 8),
    (3.0, 16),
    (2.0, 16),
    (2.0, 32),
    (1.6, 32),
    (1.6, 64),
)
"""Size of a pixel in mm and width of the network, from the cheapest pair to the dearest."""
STRIDE_PX = 16
"""Side of the deepest map's pixels: slices are a multiple of it, so that none is padded."""
MIN_SIZE_PX, MAX_SIZE_PX = 64, 1024
MARGIN_KNOWN, MARGIN_SAMPLED = 1.05, 1.1
"""Side of a slice by the largest trunk measured, if all or only some of the scans were measured."""
AROUND = (5.0, 95.0)
"""Percentiles of the surroundings of organs that the window must hold."""
ODD_SCANS = 10.0
"""Percentage of scans whose HU the window may leave out, at each end."""
WINDOW_STEP_HU = 10
MIN_NEIGHBOUR_MM, MAX_NEIGHBOUR_MM = 3.0, 8.0
BATCH_SIZE = 16
LEARNING_RATE, AT_WIDTH, MIN_LEARNING_RATE = 0.003, 8, 1e-4
MIN_EPOCHS = 10
MIN_STEPS_PER_EPOCH = 32
MIN_DRAWS = 12000
"""Slices drawn in a training: on the sample so many reach 0.02 more Dice than 4600."""
MAX_LOADER_WORKERS = 8
MIN_CGM_PATIENTS = 15
"""Patients of a training from which on the slice classifier (CGM) is kept."""


@dataclass(frozen=True)
class Rung:
    """A pair of `LADDER` for one cohort.

    Attributes:
        pixel_mm: of a slice.
        size_px: side of a slice.
        width: channels of the first level.
    """

    pixel_mm: float
    size_px: int
    width: int

    @property
    def operations(self) -> float:
        """Return a number that grows as the operations of convolutions do."""
        return float(self.size_px**2 * self.width**2)


@dataclass(frozen=True)
class Length:
    """The length of a training.

    Attributes:
        num_epochs: epochs.
        slices_per_epoch: slices in an epoch, whole batches.
        is_auto: `train.slices_per_epoch: auto` gives this number.
    """

    num_epochs: int
    slices_per_epoch: int
    is_auto: bool


def make_ladder(
    scan_pixel_mm: float,
    side_mm: float,
    *,
    pixel_mm: float | None = None,
    size_px: int | None = None,
    width: int | None = None,
) -> list[Rung]:
    """Return the rungs for a cohort; of rungs that cost the same, the one with the finest pixels.

    Args:
        scan_pixel_mm: median distance of the scans' voxels in a slice; finer pixels show no more.
        side_mm: that a slice must cover.
        pixel_mm: fixed by the user; None if it is free.
        size_px: the same.
        width: the same.
    """
    finest: dict[tuple[int, int], Rung] = {}
    for rung_mm, rung_width in LADDER:
        step_mm = pixel_mm or max(rung_mm, round(scan_pixel_mm, 1))
        if size_px is not None and pixel_mm is None:
            step_mm = max(step_mm, math.ceil(side_mm / size_px * 10) / 10)
        needed = math.ceil(side_mm / step_mm / STRIDE_PX) * STRIDE_PX
        size = size_px or min(max(needed, MIN_SIZE_PX), MAX_SIZE_PX)
        rung = Rung(step_mm, size, width or rung_width)
        finest[rung.size_px, rung.width] = rung  # the ladder goes from coarse to fine
    return sorted(finest.values(), key=lambda rung: rung.operations)


def slice_side_mm(cases: Sequence[CaseFacts]) -> float:
    """Return the side that a slice must cover, in mm.

    Args:
        cases: outside the test set; at least one has a trunk.
    """
    trunks = [max(case.trunk_mm) for case in cases if case.trunk_mm is not None]
    margin = MARGIN_KNOWN if len(trunks) == len(cases) else MARGIN_SAMPLED
    return margin * max(trunks)


def median_pixel_mm(cases: Iterable[CaseFacts]) -> float:
    """Return the median distance of voxels in a slice, in mm."""
    return float(np.median([case.spacing_mm[1:] for case in cases]))


def choose_window(organs: Iterable[OrganFacts]) -> tuple[int, int] | None:
    """Return the window in HU that holds organs and surroundings; None without any organ.

    Args:
        organs: of all measured scans. The window holds all but `ODD_SCANS` of them: contrast
            differs between scans, and in a window for the median scan the brighter half is clipped.
    """
    drawn = [organ for organ in organs if organ.inside_hu and organ.around_hu]
    if not drawn:
        return None
    inside = np.array([organ.inside_hu for organ in drawn])
    around = np.array([organ.around_hu for organ in drawn])
    low, high = (PERCENTILES.index(value) for value in AROUND)
    ends = (
        np.percentile(np.minimum(inside[:, 0], around[:, low]), ODD_SCANS),
        np.percentile(np.maximum(inside[:, -1], around[:, high]), 100 - ODD_SCANS),
    )
    return (
        math.floor(ends[0] / WINDOW_STEP_HU) * WINDOW_STEP_HU,
        math.ceil(ends[1] / WINDOW_STEP_HU) * WINDOW_STEP_HU,
    )


def choose_neighbour_mm(cases: Iterable[CaseFacts]) -> float | Literal["auto"]:
    """Return the distance of a slice's neighbours: auto, unless slices are very thin or thick."""
    median_mm = float(np.median([case.spacing_mm[0] for case in cases]))
    limited_mm = min(max(median_mm, MIN_NEIGHBOUR_MM), MAX_NEIGHBOUR_MM)
    return "auto" if limited_mm == median_mm else limited_mm


def keeps_cgm(num_patients: int) -> bool:
    """Return whether a network that has a slice classifier (CGM) keeps it.

    Args:
        num_patients: who are trained on.
    """
    return num_patients >= MIN_CGM_PATIENTS


def choose_learning_rate(width: int) -> float:
    """Return the learning rate of AdamW for a width, two digits."""
    rate = LEARNING_RATE * AT_WIDTH / max(width, AT_WIDTH)
    return float(f"{max(rate, MIN_LEARNING_RATE):.2g}")


def choose_loader_workers(num_cores: int, *, on_gpu: bool) -> int | None:
    """Return the processes that read slices; None where the default does."""
    if not on_gpu or num_cores > MAX_LOADER_WORKERS:
        return None
    return max(1, num_cores - 1)


def fit_length(
    budget_s: float,
    slice_s: float,
    validation_s: float,
    auto_slices: int,
    batch_size: int,
) -> Length | None:
    """Return the length of trainings that fills a time; None if the time does not suffice.

    Epochs have the slices of `auto`, but at least `MIN_STEPS_PER_EPOCH` steps, so that validation
    does not take most of the time. Where too few would fit, there are `MIN_EPOCHS` of the length
    that does.

    Args:
        budget_s: time of all trainings together.
        slice_s: seconds of a training slice, summed over all trainings.
        validation_s: seconds of one validation, summed over all trainings.
        auto_slices: slices in an epoch of `train.slices_per_epoch: auto`.
        batch_size: slices in a step.
    """
    fewest = MIN_STEPS_PER_EPOCH * batch_size
    num_slices = max(auto_slices // batch_size * batch_size, fewest)
    num_epochs = round(budget_s / (num_slices * slice_s + validation_s))
    if num_epochs < MIN_EPOCHS or num_epochs * num_slices < MIN_DRAWS:
        free_s = budget_s / MIN_EPOCHS - validation_s
        num_epochs, num_slices = MIN_EPOCHS, int(free_s / slice_s) // batch_size * batch_size
    if num_slices < fewest or num_epochs * num_slices < MIN_DRAWS:
        return None
    return Length(num_epochs, num_slices, num_slices == auto_slices // batch_size * batch_size)


def shortest_s(slice_s: float, validation_s: float, batch_size: int) -> float:
    """Return the least time for which `fit_length` has a length; arguments are those of it."""
    num_slices = max(MIN_DRAWS, MIN_EPOCHS * MIN_STEPS_PER_EPOCH * batch_size)
    return 1.1 * (num_slices * slice_s + MIN_EPOCHS * validation_s)
