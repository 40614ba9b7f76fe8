import math

import pytest
import torch

from model.metrics import dice_score, score_organ


def masks(*slices):
    """Stack rows of '#' and '.' into a boolean volume: one string per slice, rows by '/'."""
    return torch.tensor(
        [[[pixel == "#" for pixel in row] for row in text.split("/")] for text in slices]
    )


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


def test_scores_match_hand_count():
    true = masks("##/##", "#./..", "../..", "../..")
    predicted = masks("##/#.", "../..", "##/..", "#./..")
    gate = torch.tensor([True, False, True, True])
    scores = score_organ(predicted, true, gate, min_false_positive_px=2)
    assert scores.dice == pytest.approx(2 * 3 / (6 + 5))
    assert (scores.num_true_voxels, scores.num_predicted_voxels) == (5, 6)
    assert (scores.num_organ_slices, scores.num_free_slices) == (2, 2)
    assert scores.num_false_positive_slices == 1
    assert scores.slice_fpr == 0.5
    assert scores.num_false_positive_voxels == 3
    assert scores.voxel_fpr == pytest.approx(3 / 11)
    assert (scores.num_false_closings, scores.num_closed_voxels) == (1, 1)
    assert scores.num_false_openings == 2


@pytest.mark.parametrize(("k", "slices"), [(1, 2), (2, 1), (3, 0)])
def test_false_positive_slices_need_k_pixels(k, slices):
    true = masks("../..", "../..")
    predicted = masks("##/..", "#./..")
    scores = score_organ(predicted, true, torch.ones(2, dtype=torch.bool), k)
    assert scores.num_false_positive_slices == slices
    assert scores.dice == 0.0


def test_rates_without_free_slices_are_not_numbers():
    true = masks("#./..")
    scores = score_organ(true, true, torch.ones(1, dtype=torch.bool), 1)
    assert math.isnan(scores.slice_fpr)
    assert scores.voxel_fpr == 0.0


def test_score_refuses_shapes_that_differ():
    with pytest.raises(ValueError, match=r"prediction \(1, 2, 2\), truth \(2, 2, 2\)"):
        score_organ(masks("#./.."), masks("#./..", "../.."), torch.ones(2, dtype=torch.bool), 1)
