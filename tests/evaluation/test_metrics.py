import math

import numpy as np
import pytest

from fullscale.evaluation.metrics import score_classifier, score_overlap, score_physical
from model.overlap import dice_score

SPACING_MM = (5.0, 2.0, 1.0)


def masks(*slices):
    """Stack rows of '#' and '.' into a boolean volume: one string per slice, rows by '/'."""
    return np.array(
        [[[pixel == "#" for pixel in row] for row in text.split("/")] for text in slices]
    )


TRUE = masks("##/##", "#./..", "../..", "../..")
PREDICTED = masks("##/#.", "../..", "##/..", "#./..")
EMPTY = np.zeros_like(TRUE)


@pytest.mark.parametrize(
    ("overlap", "predicted", "true", "expected"),
    [
        (4, 4, 4, 1.0),
        (0, 3, 5, 0.0),
        (2, 4, 4, 0.5),
        (0, 0, 7, 0.0),
        (0, 7, 0, 0.0),
        (3, 4, 5, 2 / 3),
    ],
)
def test_dice_matches_hand_computed_value(overlap, predicted, true, expected):
    assert dice_score(overlap, predicted, true) == pytest.approx(expected)


def test_dice_of_two_empty_masks_is_not_a_number():
    assert math.isnan(dice_score(0, 0, 0))


def test_overlap_matches_hand_count():
    scores = score_overlap(PREDICTED, TRUE, SPACING_MM, min_false_positive_mm2=4)
    assert scores.dice == pytest.approx(2 * 3 / (6 + 5))
    assert scores.iou == pytest.approx(3 / 8)
    assert (scores.num_true_voxels, scores.num_predicted_voxels) == (5, 6)
    assert (scores.num_organ_slices, scores.num_free_slices) == (2, 2)
    assert scores.num_false_positive_slices == 1
    assert scores.slice_fpr == 0.5
    assert (scores.num_near_free_slices, scores.num_remote_free_slices) == (2, 0)
    assert scores.num_near_false_positive_slices == 1
    assert scores.num_remote_false_positive_slices == 0
    assert scores.num_false_positive_voxels == 3
    assert scores.num_free_voxels == 11
    assert scores.voxel_fpr == pytest.approx(3 / 11)


def test_classifier_scores_match_hand_count():
    scores = score_classifier(np.array([True, False, True, False]), TRUE)
    assert (scores.num_false_closings, scores.num_closed_voxels) == (1, 1)
    assert scores.num_false_openings == 1
    assert (scores.classifier_sensitivity, scores.classifier_specificity) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("opened", "sensitivity", "specificity"),
    [([1, 1, 1, 1], 1, 0), ([0, 0, 0, 0], 0, 1), ([1, 1, 0, 0], 1, 1), ([0, 0, 1, 1], 0, 0)],
)
def test_classifier_sensitivity_and_specificity(opened, sensitivity, specificity):
    scores = score_classifier(np.array(opened, dtype=bool), TRUE)
    assert (scores.classifier_sensitivity, scores.classifier_specificity) == (
        sensitivity,
        specificity,
    )


def test_classifier_rates_without_slices_to_judge_are_not_numbers():
    everywhere = np.ones_like(TRUE)
    assert math.isnan(score_classifier(np.ones(4, dtype=bool), everywhere).classifier_specificity)
    assert math.isnan(score_classifier(np.ones(4, dtype=bool), EMPTY).classifier_sensitivity)


@pytest.mark.parametrize(
    ("min_mm2", "spacing", "slices"),
    [
        (0.5, SPACING_MM, 2),
        (2, SPACING_MM, 2),
        (2.1, SPACING_MM, 1),
        (4, SPACING_MM, 1),
        (4.1, SPACING_MM, 0),
        (4.1, (5.0, 2.0, 2.0), 1),
        (4, (1.0, 2.0, 1.0), 1),
    ],
)
def test_false_positive_slices_need_an_area(min_mm2, spacing, slices):
    scores = score_overlap(masks("##/..", "#./.."), masks("../..", "../.."), spacing, min_mm2)
    assert scores.num_false_positive_slices == slices
    assert scores.num_remote_false_positive_slices == slices
    assert scores.dice == 0.0


@pytest.mark.parametrize(
    ("slice_mm", "near_slices", "near_false"),
    [(2.5, 6, 4), (5.0, 4, 2), (5.00001, 4, 2), (5.1, 2, 1), (10.0, 2, 1), (12.0, 0, 0)],
)
def test_false_positives_next_to_the_organ_are_counted_apart(slice_mm, near_slices, near_false):
    true = np.zeros((9, 2, 2), dtype=bool)
    true[3] = True
    predicted = np.ones_like(true)
    predicted[[2, 5]] = False
    scores = score_overlap(predicted, true, (slice_mm, 1.0, 1.0), 1)
    assert (scores.num_free_slices, scores.num_false_positive_slices) == (8, 6)
    assert scores.num_near_free_slices == near_slices + (slice_mm == 2.5)
    assert scores.num_remote_free_slices == 8 - scores.num_near_free_slices
    assert scores.num_near_false_positive_slices == near_false + (slice_mm == 2.5)
    assert scores.num_remote_false_positive_slices == 6 - scores.num_near_false_positive_slices


def test_what_nobody_judged_is_neither_organ_free_nor_counted():
    judged = np.ones_like(TRUE)
    judged[1, 1, 1] = judged[2, 1, 1] = False  # a slice with the organ, and one without
    scores = score_overlap(PREDICTED & judged, TRUE, SPACING_MM, 4, judged)
    assert (scores.num_organ_slices, scores.num_free_slices) == (2, 1)
    assert (scores.num_near_free_slices, scores.num_false_positive_slices) == (1, 0)
    assert (scores.num_false_positive_voxels, scores.num_free_voxels) == (3, 9)
    nothing = np.zeros_like(TRUE)
    scores = score_overlap(nothing, nothing, SPACING_MM, 4, judged_ZYX=nothing)
    assert (scores.num_free_slices, scores.num_free_voxels) == (0, 0)
    assert math.isnan(scores.slice_fpr)
    assert math.isnan(scores.voxel_fpr)


def test_rates_without_free_slices_are_not_numbers():
    true = masks("#./..")
    scores = score_overlap(true, true, SPACING_MM, 1)
    assert math.isnan(scores.slice_fpr)
    assert scores.voxel_fpr == 0.0


def test_volume_difference_is_in_millilitres_and_signed():
    voxel_ml = 5 * 2 * 1 / 1000
    more = score_physical(PREDICTED, TRUE, SPACING_MM).volume_difference_ml
    less = score_physical(TRUE, PREDICTED, SPACING_MM).volume_difference_ml
    assert more == pytest.approx(voxel_ml)
    assert less == pytest.approx(-voxel_ml)


def test_organ_that_neither_has_is_perfect_and_nowhere():
    overlap, physical = (
        score_overlap(EMPTY, EMPTY, SPACING_MM, 1),
        score_physical(EMPTY, EMPTY, SPACING_MM),
    )
    assert (overlap.dice, overlap.iou) == (1, 1)
    assert len(vars(physical)) == 7
    assert all(math.isnan(value) for value in vars(physical).values())
    assert overlap.slice_fpr == 0


@pytest.mark.parametrize(
    ("predicted", "true", "difference_ml"), [(EMPTY, TRUE, -0.05), (PREDICTED, EMPTY, 0.06)]
)
def test_missed_organ_is_a_diagonal_away(predicted, true, difference_ml):
    overlap, physical = (
        score_overlap(predicted, true, SPACING_MM, 1),
        score_physical(predicted, true, SPACING_MM),
    )
    assert overlap.dice == overlap.iou == 0
    diagonal = math.sqrt(20**2 + 4**2 + 2**2)
    assert physical.hd95_mm == pytest.approx(diagonal)
    assert physical.mean_surface_distance_mm == pytest.approx(diagonal)
    assert physical.surface_dice_1mm == physical.surface_dice_3mm == 0
    assert physical.area_surface_dice_1mm == physical.area_surface_dice_3mm == 0
    assert physical.volume_difference_ml == pytest.approx(difference_ml)


def test_no_distance_exceeds_that_of_a_missed_organ():
    one, other = np.zeros_like(TRUE), np.zeros_like(TRUE)
    one[0, 0, 0] = other[-1, -1, -1] = True
    missed = score_physical(one, EMPTY, SPACING_MM).hd95_mm
    assert score_physical(one, other, SPACING_MM).hd95_mm < missed


def test_perfect_prediction_is_perfect_in_every_score():
    overlap, physical = (
        score_overlap(TRUE, TRUE, SPACING_MM, 1),
        score_physical(TRUE, TRUE, SPACING_MM),
    )
    assert (overlap.dice, overlap.iou, overlap.voxel_fpr) == (1, 1, 0)
    assert tuple(vars(physical).values()) == (0, 0, 1, 1, 1, 1, 0)


def test_surface_dice_at_three_millimetres_forgives_more():
    moved = np.roll(TRUE, 1, axis=1)
    scores = score_physical(moved, TRUE, SPACING_MM)
    assert scores.surface_dice_1mm < scores.surface_dice_3mm == 1
    assert scores.area_surface_dice_1mm < scores.area_surface_dice_3mm == 1


def test_scores_refuse_shapes_that_differ():
    with pytest.raises(ValueError, match=r"prediction \(1, 2, 2\) and truth \(2, 2, 2\)"):
        score_overlap(masks("#./.."), masks("#./..", "../.."), SPACING_MM, 1)
    with pytest.raises(ValueError, match=r"slice classifier of shape \(3,\) for 4 slices"):
        score_classifier(np.ones(3, dtype=bool), TRUE)
