"""Pictures of the best, the median and the worst case, with truth, baseline and candidate.

Z slices, Y X pixels, K organs, N chosen slices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fullscale.evaluation.case_scores import read_pair
from fullscale.evaluation.slice_pictures import choose_slices
from fullscale.evaluation.summary import make_predictor, picture_cases
from fullscale.params import Params
from fullscale.prediction.components import label_mask
from fullscale.reporting.numbers import number
from fullscale.reporting.results import Results
from fullscale.reporting.style import Picture, to_png_uri
from fullscale.runtime.console import track
from fullscale.runtime.errors import StageError
from fullscale.scans.cohort import IGNORED_ID, Case, Cohort, is_cohort, read_cohort
from fullscale.scans.slice_outlines import OutlineStyle, draw_outlined_slice

if TYPE_CHECKING:
    import pandas as pd

    from fullscale.prediction.predictor import Predictor

MARGIN_MM = 30.0
"""Margin around the outlines."""

WIDTH_IN = 2.7
Mask = NDArray[np.bool_]


STYLES = (
    OutlineStyle("#ffffff", "solid", 1.8, halo_width=1.4),
    OutlineStyle("#ffb000", "dashed", 1.5, halo_width=1.4),
    OutlineStyle("#4cc9ff", "dotted", 2.0, halo_width=1.4),
)
"""Outlines of truth, baseline and candidate; they differ in lightness and in line."""


@dataclass(frozen=True)
class Gallery:
    """Slices of one case, from the feet to the head."""

    title: str
    pictures: tuple[Picture, ...]


def draw_galleries(results: Results, params: Params) -> list[Gallery]:
    """Segment three test cases again with candidate and baseline, and draw them.

    Raises:
        StageError: scans, scores or a trained network are missing, or the weights are not those of
            the verdict.
        ScanError: the scans in data/ are damaged.
    """
    names = (results.baseline, results.candidate)
    scores = results.scores.get(results.candidate)
    if scores is None:
        raise StageError(f"there are no scores of {results.candidate} to choose cases by")
    chosen = picture_cases(scores)
    data = results.workspace.data
    if not is_cohort(data):
        raise StageError("data/ holds no scans; fetch them with `dvc pull data.dvc`")
    cohort = read_cohort(data)
    by_name = {case.name: case for case in cohort.cases}
    if lost := sorted(set(chosen.values()) - set(by_name)):
        raise StageError(f"data/ lacks {', '.join(lost)}; run `dvc repro`")
    predictors = [_load(name, params, results) for name in names]
    galleries = []
    for rank, name in track(list(chosen.items()), "drawing cases", len(chosen)):
        found = ", ".join(f"{each} {_dice(results.scores, each, name)}" for each in names)
        title = f"{rank.capitalize()}: {name}, Dice {found}"
        galleries.append(draw_gallery(predictors, by_name[name], cohort, title))
    return galleries


def _load(name: str, params: Params, results: Results) -> Predictor:
    from fullscale.prediction.network_files import (  # it loads torch
        choose_deployed,
        digest_weights,
        load_members,
    )

    folders = choose_deployed(
        results.workspace.trainings(name, params.seeds), params.register_.deploy
    )
    trained = load_members(folders)
    wanted = (results.verdict or {}).get("weights_sha256")
    if name == results.candidate and wanted and digest_weights(folders) != wanted:
        raise StageError(
            f"the weights in {folders[0].parent} are not those of the verdict; run `dvc repro` or "
            "`dvc checkout`"
        )
    return make_predictor(trained, params.evaluate)


def _dice(scores: Mapping[str, pd.DataFrame], network: str, case: str) -> str:
    table = scores.get(network)
    if table is None:
        return number(None, 3)
    return number(float(table.loc[table["case"] == case, "dice"].mean()), 3)


def draw_gallery(
    predictors: Sequence[Predictor], case: Case, cohort: Cohort, title: str
) -> Gallery:
    """Draw slices spread over the organs of a case, cropped to the organs with a margin.

    Args:
        predictors: baseline and candidate.
        case: the case to draw.
        cohort: the cohort of the case.
        title: of the gallery.
    """
    scan, labels = read_pair(case)
    organs = predictors[0].description.organs
    shown = cohort.annotated_organs(case, organs)
    truth_KZYX = np.stack([label_mask(labels.values_ZYX, organs[organ]) for organ in shown])
    judged_ZYX = labels.values_ZYX != IGNORED_ID
    masks = [truth_KZYX]
    for predictor in predictors:
        found = predictor.segment(scan).masks
        masks.append(np.stack([found[organ] & judged_ZYX for organ in shown]))
    any_ZYX: Mask = np.asarray(np.concatenate(masks).any(axis=0))
    _, spacing_y_mm, spacing_x_mm = scan.spacing_mm
    box = crop(any_ZYX, (spacing_y_mm, spacing_x_mm))
    names = ("truth", *(predictor.description.name for predictor in predictors))
    pictures = []
    for z in choose_slices(masks):
        figure = draw_slice(
            scan.values_ZYX[z][box],
            [mask_KZYX[:, z][:, *box] for mask_KZYX in masks],
            predictors[0].description.slice.window_hu,
            aspect=spacing_y_mm / spacing_x_mm,
        )
        areas = ", ".join(
            f"{name} {int(mask_KZYX[:, z].sum())}"
            for name, mask_KZYX in zip(names, masks, strict=True)
        )
        alt = f"{case.name}, slice {z}; outlined pixels: {areas}."
        pictures.append(Picture(to_png_uri(figure), alt, f"slice {z}"))
    return Gallery(title, tuple(pictures))


def crop(any_ZYX: Mask, spacing_yx_mm: Sequence[float]) -> tuple[slice, slice]:
    """Return the part Y, X of every slice that holds all outlines and a margin.

    Args:
        any_ZYX: True in outlined voxels; if none is, the whole slice is returned.
        spacing_yx_mm: distance of voxels along Y, X.
    """
    any_YX: Mask = np.asarray(any_ZYX.any(axis=0))
    if not any_YX.any():
        return slice(None), slice(None)
    sides = []
    for axis, spacing_mm in enumerate(spacing_yx_mm):
        along = np.flatnonzero(any_YX.any(axis=1 - axis))
        margin = round(MARGIN_MM / spacing_mm)
        sides.append(slice(max(0, int(along[0]) - margin), int(along[-1]) + margin + 1))
    return sides[0], sides[1]


def draw_slice(
    image_YX: NDArray[np.float32],
    masks: Sequence[Mask],
    window_hu: tuple[float, float],
    aspect: float,
) -> Figure:
    """Draw one slice with the outlines of truth, baseline and candidate.

    Args:
        image_YX: HU, in radiological view (patient's right on the left).
        masks: boolean (K, Y, X) of truth, baseline and candidate.
        window_hu: HU of black and of white.
        aspect: height of a pixel / its width.
    """
    height, width = image_YX.shape
    figure = Figure(figsize=(WIDTH_IN, WIDTH_IN * aspect * height / width))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    outlines = [
        (mask_YX, style)
        for style, mask_KYX in zip(STYLES, masks, strict=True)
        for mask_YX in mask_KYX
    ]
    # The size of the figure has the aspect already, so "auto" fills it.
    draw_outlined_slice(axes, image_YX, outlines, window_hu, aspect="auto")
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    return figure
