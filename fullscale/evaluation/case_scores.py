"""All scores of one test case, a row for each organ that it annotates.

Z slices, Y X voxels of the scan in canonical orientation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from fullscale.evaluation.metrics import score_classifier, score_overlap, score_physical
from fullscale.prediction.components import Mask, label_mask, largest_component
from fullscale.scans.cohort import IGNORED_ID
from fullscale.scans.volume import Volume, read_image, read_labels

if TYPE_CHECKING:
    from fullscale.evaluation.calibration import ReliabilityCurve
    from fullscale.params import EvaluateParams
    from fullscale.prediction.predictor import Predictor, ScanSlices, SlicePrediction
    from fullscale.scans.cohort import Case, Cohort
    from model.output import Gating

CLEANED = "_cleaned"
"""Suffix of scores of each organ's largest component alone."""

VARIANTS: dict[Gating, str] = {
    "none": "_no_classifier",
    "soft": "_soft_classifier",
    "slab": "_slab_classifier",
    "hard": "_hard_classifier",
}
"""Suffixes of scores of the same prediction with another use of the slice classifier (CGM)."""
ABLATED = ("dice", "num_false_positive_slices")
TRUTH_ONLY = (
    "num_true_voxels",
    "num_organ_slices",
    "num_free_slices",
    "num_near_free_slices",
    "num_remote_free_slices",
    "num_free_voxels",
)
"""Counts of the annotation, equal for every variant of a prediction."""

ScoreRow = dict[str, Any]


def predict_case(
    predictor: Predictor, slices: ScanSlices, settings: EvaluateParams
) -> SlicePrediction:
    """Predict the slices of a case's scan for `score_case`.

    Where the uses of the slice classifier are compared, the decoder runs for every slice, also for
    those that the slice classifier closes.

    Args:
        predictor: a network ready to segment.
        slices: as `Predictor.slice_scan` returns them.
        settings: the section `evaluate` of params.yaml.
    """
    return predictor.predict(slices, "none" if is_ablated(predictor, settings) else None)


def is_ablated(predictor: Predictor, settings: EvaluateParams) -> bool:
    """Return whether all uses of the slice classifier are scored.

    Not of an ensemble, in which each member has its own slice classifier.
    """
    return settings.ablate_slice_classifier and predictor.num_members == 1


def score_case(
    predictor: Predictor,
    predicted: SlicePrediction,
    case: Case,
    labels: Volume,
    cohort: Cohort,
    organs: Mapping[str, Sequence[int]],
    settings: EvaluateParams,
    calibration: Mapping[str, ReliabilityCurve] | None,
) -> list[ScoreRow]:
    """Score every annotated organ of a case on the label map that users get.

    Where the probabilities of two organs overlap, the more probable one has the voxel, as in a
    label map that `fullscale predict` writes: both come from `Predictor.to_labels`. Voxels that
    nobody judged count neither as prediction nor as truth, and slices with such voxels and without
    the organ are not organ-free.

    Args:
        predictor: a network ready to segment.
        predicted: of the case, as `predict_case` returns it; of an ensemble joined by
            `model.inference.join_predictions`.
        case: the case to score.
        labels: its annotation.
        cohort: the cohort of the case.
        organs: the organs to score, all of them the network's, with their label ids in the
            annotation. A network may have been trained with other ids.
        settings: the section `evaluate` of params.yaml.
        calibration: organ to the curve to which its voxels are added, after the slice classifier.

    Returns:
        A row for each organ: case, patient, organ and the values of `score_mask`. A network with a
        slice classifier adds the fields of `ClassifierScores` and, if requested, the ablation.
        If requested, the values of `score_mask` for the largest component follow, with the suffix
        `_cleaned`.
    """
    spacing_mm = labels.spacing_mm
    min_mm2 = settings.min_false_positive_mm2
    ablates = is_ablated(predictor, settings)
    found = predicted.gated(predictor.gate) if ablates else predicted
    label_ZYX = predictor.label_map(found)
    variants = {}
    if ablates and predicted.has_classifier:
        variants = {
            suffix: predictor.label_map(predicted.gated(gating))
            for gating, suffix in VARIANTS.items()
            if gating != predictor.gate
        }
    judged_ZYX = labels.values_ZYX != IGNORED_ID
    rows = []
    for organ in cohort.annotated_organs(case, organs):
        label_id = predictor.description.organs[organ][0]
        true_ZYX = label_mask(labels.values_ZYX, organs[organ])
        predicted_ZYX = label_ZYX == label_id
        truth = true_ZYX, spacing_mm, min_mm2, judged_ZYX
        scores = score_mask(predicted_ZYX & judged_ZYX, *truth)
        row: ScoreRow = {"case": case.name, "patient": case.patient, "organ": organ} | scores
        open_Z = found.open_slices(organ, predictor.gate)
        if open_Z is not None:
            known_Z = judged_ZYX.all(axis=(1, 2)) | true_ZYX.any(axis=(1, 2))
            row |= asdict(score_classifier(open_Z[known_Z], true_ZYX[known_Z]))
        for suffix, variant_ZYX in variants.items():
            other = asdict(score_overlap((variant_ZYX == label_id) & judged_ZYX, *truth))
            row |= add_suffix({name: other[name] for name in ABLATED}, suffix)
        if settings.largest_component:
            largest_ZYX = largest_component(predicted_ZYX)
            is_all = np.array_equal(largest_ZYX, predicted_ZYX)
            cleaned = scores if is_all else score_mask(largest_ZYX & judged_ZYX, *truth)
            row |= add_suffix(cleaned, CLEANED)
        if calibration is not None:
            calibration[organ].add(found.restore(organ), true_ZYX, spacing_mm, judged_ZYX)
        rows.append(row)
    return rows


def add_suffix(row: ScoreRow, suffix: str) -> ScoreRow:
    """Return the scores that depend on the prediction, with a suffix on their names."""
    return {f"{name}{suffix}": value for name, value in row.items() if name not in TRUTH_ONLY}


def read_pair(case: Case) -> tuple[Volume, Volume]:
    """Read scan and annotation of a case."""
    return read_image(case.image), read_labels(case.label)


def score_mask(
    predicted_ZYX: Mask,
    true_ZYX: Mask,
    spacing_mm: tuple[float, float, float],
    min_false_positive_mm2: float,
    judged_ZYX: Mask,
) -> ScoreRow:
    """Return Dice, IoU, the fields of `PhysicalScores`, both false-positive rates, all counts."""
    overlap = score_overlap(predicted_ZYX, true_ZYX, spacing_mm, min_false_positive_mm2, judged_ZYX)
    return {
        "dice": overlap.dice,
        "iou": overlap.iou,
        **asdict(score_physical(predicted_ZYX, true_ZYX, spacing_mm)),
        "slice_fpr": overlap.slice_fpr,
        "voxel_fpr": overlap.voxel_fpr,
        **asdict(overlap),
    }
