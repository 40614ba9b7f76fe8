"""All scores of one test case, a row for each organ that it annotates.

Z slices, Y X voxels of the scan in canonical orientation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from fullscale.evaluation.metrics import score_classifier, score_overlap, score_physical
from fullscale.evaluation.surface import Mask, largest_component
from fullscale.scans.volume import Volume, read_image, read_labels

if TYPE_CHECKING:
    from fullscale.evaluation.calibration import ReliabilityCurve
    from fullscale.params import EvaluateParams
    from fullscale.prediction.predictor import Predictor
    from fullscale.scans.cohort import Case, Cohort

CLEANED = "_cleaned"
"""Suffix of scores of each organ's largest component alone."""

NO_CLASSIFIER, SOFT_CLASSIFIER = "_no_classifier", "_soft_classifier"
"""Suffixes of scores of the same prediction without the slice classifier, and with its probability
as a factor."""

CLASSIFIER_THRESHOLD = 0.5
"""The slice classifier closes slices of this probability and below."""

ABLATED = ("dice", "num_false_positive_slices")
TRUTH_ONLY = ("num_true_voxels", "num_organ_slices", "num_free_slices", "num_free_voxels")
"""Counts of the annotation, equal for every variant of a prediction."""

ScoreRow = dict[str, Any]


def score_case(
    predictor: Predictor,
    case: Case,
    cohort: Cohort,
    organs: Mapping[str, Sequence[int]],
    settings: EvaluateParams,
    calibration: Mapping[str, ReliabilityCurve] | None,
) -> list[ScoreRow]:
    """Score every annotated organ of a case; one organ's volumes are in memory at a time.

    Args:
        predictor: a network ready to segment.
        case: the case to score.
        cohort: the cohort of the case.
        organs: the organs to score, all of them the network's, with their label ids in the
            annotation. A network may have been trained with other ids.
        settings: the section `evaluate` of params.yaml. With `ablate_slice_classifier` the decoder
            runs for every slice, also for those that the slice classifier closes; not for an
            ensemble, in which each member has its own slice classifier.
        calibration: organ to the curve to which its voxels are added, after the slice classifier.

    Returns:
        A row for each organ: case, patient, organ and the values of `score_mask`. A network with a
        slice classifier adds the fields of `ClassifierScores` and, if requested, the ablation.
        If requested, the values of `score_mask` for the largest component follow, with the suffix
        `_cleaned`.
    """
    scan, labels = read_pair(case)
    spacing_mm = scan.spacing_mm
    min_false_positive_px = settings.min_false_positive_px
    ablates = settings.ablate_slice_classifier and predictor.num_members == 1
    found = predictor.predict(scan, "none" if ablates else "hard")
    del scan  # as large as two masks, and the scores do not need it
    rows = []
    for organ in cohort.annotated_organs(case, organs):
        true_ZYX = np.isin(labels.values_ZYX, organs[organ])
        present_Z = found.organ_probability(organ)
        probability_ZYX = found.restore(organ)
        classifier_scores: ScoreRow = {}
        if present_Z is not None:
            open_Z = present_Z > CLASSIFIER_THRESHOLD
            classifier_scores = asdict(score_classifier(open_Z, true_ZYX))
            if ablates:
                variants = classifier_variants(probability_ZYX, present_Z, predictor.threshold)
                for suffix, mask_ZYX in variants:
                    other = asdict(score_overlap(mask_ZYX, true_ZYX, min_false_positive_px))
                    ablated = {name: other[name] for name in ABLATED}
                    classifier_scores |= add_suffix(ablated, suffix)
            probability_ZYX[present_Z <= CLASSIFIER_THRESHOLD] = 0
        if calibration is not None:
            calibration[organ].add(probability_ZYX, true_ZYX, spacing_mm)
        predicted_ZYX = probability_ZYX >= predictor.threshold
        del probability_ZYX  # as large as four masks
        row: ScoreRow = {"case": case.name, "patient": case.patient, "organ": organ}
        row |= score_mask(predicted_ZYX, true_ZYX, spacing_mm, min_false_positive_px)
        row |= classifier_scores
        if settings.largest_component:
            cleaned_ZYX = largest_component(predicted_ZYX)
            cleaned = score_mask(cleaned_ZYX, true_ZYX, spacing_mm, min_false_positive_px)
            row |= add_suffix(cleaned, CLEANED)
        rows.append(row)
    return rows


def classifier_variants(
    probability_ZYX: np.ndarray, present_Z: np.ndarray, threshold: float
) -> Iterator[tuple[str, Mask]]:
    """Yield the masks without the slice classifier, and with its probability as a factor.

    Args:
        probability_ZYX: of the decoder, in [0, 1].
        present_Z: the slice classifier's probability that a slice holds the organ.
        threshold: probability from which a voxel belongs to the organ.

    Yields:
        The suffix of the scores' names, and the mask, boolean (Z, Y, X).
    """
    yield NO_CLASSIFIER, probability_ZYX >= threshold
    # Slice by slice: the product of whole volumes would be as large as four masks.
    soft_ZYX = np.empty(probability_ZYX.shape, dtype=bool)
    for mask_YX, probability_YX, present in zip(soft_ZYX, probability_ZYX, present_Z, strict=True):
        np.greater_equal(probability_YX * present, threshold, out=mask_YX)
    yield SOFT_CLASSIFIER, soft_ZYX


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
    min_false_positive_px: int,
) -> ScoreRow:
    """Return Dice, IoU, the fields of `PhysicalScores`, both false-positive rates, all counts."""
    overlap = score_overlap(predicted_ZYX, true_ZYX, min_false_positive_px)
    return {
        "dice": overlap.dice,
        "iou": overlap.iou,
        **asdict(score_physical(predicted_ZYX, true_ZYX, spacing_mm)),
        "slice_fpr": overlap.slice_fpr,
        "voxel_fpr": overlap.voxel_fpr,
        **asdict(overlap),
    }
