"""All scores of one test case, a row for each organ that it annotates.

Z slices, Y X voxels of the scan in canonical orientation.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from model.metrics import score_gate, score_overlap, score_physical
from model.surface import Mask, largest_component
from scans.cohort import Case, Cohort
from scans.volume import Volume, read_image, read_labels
from tasks.predict import Predictor

CLEANED = "_cleaned"
"""Ends the name of a score taken after all but the organ's largest component was dropped."""

TRUTH_ONLY = ("num_true_voxels", "num_organ_slices", "num_free_slices", "num_free_voxels")
"""Counts that no change of the prediction changes."""

Row = dict[str, Any]


def score_case(
    predictor: Predictor,
    case: Case,
    cohort: Cohort,
    *,
    min_false_positive_px: int,
    keep_largest: bool,
) -> list[Row]:
    """Score every annotated organ of a case; one organ's volumes are in memory at a time.

    Args:
        predictor: a network ready to segment.
        case: what to score.
        cohort: the cohort it comes from.
        min_false_positive_px: predicted pixels that make an organ-free slice a false positive.
        keep_largest: score the largest component of each organ, too.

    Returns:
        A row for each organ: case, patient, organ and `score_mask`; for a network with a
        classifier the fields of `GateScores`; where asked, `score_mask` of the largest component
        under names that end in `_cleaned`.
    """
    scan, labels = read_pair(case)
    found = predictor.predict(scan)
    rows = []
    for organ in cohort.annotated_organs(case, predictor.description.organs):
        true_ZYX = np.isin(labels.values_ZYX, predictor.description.organs[organ])
        predicted_ZYX = found.restore(organ) >= predictor.threshold
        spacing_mm = scan.spacing_mm
        row = {"case": case.name, "patient": case.patient, "organ": organ}
        row |= score_mask(predicted_ZYX, true_ZYX, spacing_mm, min_false_positive_px)
        organ_probability_Z = found.organ_probability(organ)
        if organ_probability_Z is not None:
            row |= asdict(score_gate(organ_probability_Z > 0.5, true_ZYX))
        if keep_largest:
            cleaned_ZYX = largest_component(predicted_ZYX)
            cleaned = score_mask(cleaned_ZYX, true_ZYX, spacing_mm, min_false_positive_px)
            row |= rename(cleaned, CLEANED)
        rows.append(row)
    return rows


def rename(row: Row, suffix: str) -> Row:
    """The scores of another prediction, under names of their own, beside the raw ones."""
    return {f"{name}{suffix}": value for name, value in row.items() if name not in TRUTH_ONLY}


def read_pair(case: Case) -> tuple[Volume, Volume]:
    """Scan and annotation of a case."""
    return read_image(case.image), read_labels(case.label)


def score_mask(
    predicted_ZYX: Mask,
    true_ZYX: Mask,
    spacing_mm: tuple[float, float, float],
    min_false_positive_px: int,
) -> Row:
    """Dice, IoU, the fields of `PhysicalScores`, both false-positive rates, then all counts."""
    overlap = score_overlap(predicted_ZYX, true_ZYX, min_false_positive_px)
    return {
        "dice": overlap.dice,
        "iou": overlap.iou,
        **asdict(score_physical(predicted_ZYX, true_ZYX, spacing_mm)),
        "slice_fpr": overlap.slice_fpr,
        "voxel_fpr": overlap.voxel_fpr,
        **asdict(overlap),
    }
