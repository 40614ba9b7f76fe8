"""All scores of one test case, a row for each organ that it annotates.

Z slices, Y X voxels of the scan in canonical orientation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from fullscale.evaluation.calibration import ReliabilityCurve
from fullscale.evaluation.metrics import score_gate, score_overlap, score_physical
from fullscale.evaluation.surface import Mask, largest_component
from fullscale.prediction.predictor import Predictor
from fullscale.scans.cohort import Case, Cohort
from fullscale.scans.volume import Volume, read_image, read_labels

CLEANED = "_cleaned"
"""Ends the name of a score taken after all but the organ's largest component was dropped."""

NO_GATE, SOFT_GATE = "_no_gate", "_soft_gate"
"""End the names of scores taken from the same prediction under another gate."""

ABLATED = ("dice", "num_false_positive_slices")
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
    ablate_gate: bool,
    calibration: Mapping[str, ReliabilityCurve] | None,
) -> list[Row]:
    """Score every annotated organ of a case; one organ's volumes are in memory at a time.

    Args:
        predictor: a network ready to segment.
        case: what to score.
        cohort: the cohort it comes from.
        min_false_positive_px: predicted pixels that make an organ-free slice a false positive.
        keep_largest: score the largest component of each organ, too.
        ablate_gate: score Dice and false-positive slices without the gate and with a soft one,
            too; the decoder then runs for every slice.
        calibration: organ to the curve to which its voxels are added, after the hard gate.

    Returns:
        A row for each organ: case, patient, organ and `score_mask`; for a network with a
        classifier the fields of `GateScores` and, where asked, the ablation; where asked,
        `score_mask` of the largest component under names that end in `_cleaned`.
    """
    scan, labels = read_pair(case)
    spacing_mm = scan.spacing_mm
    found = predictor.predict(scan, "none" if ablate_gate else "hard")
    del scan  # as large as two masks, and the scores do not need it
    rows = []
    for organ in cohort.annotated_organs(case, predictor.description.organs):
        true_ZYX = np.isin(labels.values_ZYX, predictor.description.organs[organ])
        gate_Z = found.organ_probability(organ)
        row: Row = {"case": case.name, "patient": case.patient, "organ": organ}
        of_gate: Row = {} if gate_Z is None else asdict(score_gate(gate_Z > 0.5, true_ZYX))
        probability_ZYX = found.restore(organ)
        if gate_Z is not None:
            if ablate_gate:
                for suffix, mask_ZYX in other_gates(probability_ZYX, gate_Z, predictor.threshold):
                    other = asdict(score_overlap(mask_ZYX, true_ZYX, min_false_positive_px))
                    of_gate |= rename({name: other[name] for name in ABLATED}, suffix)
            probability_ZYX[gate_Z <= 0.5] = 0
        if calibration is not None:
            calibration[organ].add(probability_ZYX, true_ZYX, spacing_mm)
        predicted_ZYX = probability_ZYX >= predictor.threshold
        del probability_ZYX  # as large as four masks
        row |= score_mask(predicted_ZYX, true_ZYX, spacing_mm, min_false_positive_px) | of_gate
        if keep_largest:
            cleaned_ZYX = largest_component(predicted_ZYX)
            cleaned = score_mask(cleaned_ZYX, true_ZYX, spacing_mm, min_false_positive_px)
            row |= rename(cleaned, CLEANED)
        rows.append(row)
    return rows


def other_gates(
    probability_ZYX: np.ndarray, gate_Z: np.ndarray, threshold: float
) -> Iterator[tuple[str, Mask]]:
    """What would have been segmented without a gate, and with a soft one.

    Args:
        probability_ZYX: before any gate.
        gate_Z: the classifier's probability that a slice holds the organ.
        threshold: probability from which a voxel belongs to the organ.

    Yields:
        How names of its scores end, and the mask, boolean (Z, Y, X).
    """
    yield NO_GATE, probability_ZYX >= threshold
    soft_ZYX = np.empty(probability_ZYX.shape, dtype=bool)
    for mask_YX, probability_YX, gate in zip(soft_ZYX, probability_ZYX, gate_Z, strict=True):
        np.greater_equal(probability_YX * gate, threshold, out=mask_YX)
    yield SOFT_GATE, soft_ZYX


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
