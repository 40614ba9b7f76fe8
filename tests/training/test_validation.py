import math

import numpy as np
import pytest
import torch

from fullscale.training.dataset import Batch
from fullscale.training.validation import (
    NUM_COUNTS,
    count_batch,
    count_cases,
    metrics_of,
    warn_of_classifier,
    warn_of_samples,
)
from model.output import Output

SIDE = 4


def make_batch(label_BHW, annotated_BK, case_B):
    image = torch.zeros(len(label_BHW), 3, SIDE, SIDE, dtype=torch.int16)
    return Batch(image, label_BHW, torch.tensor(annotated_BK), torch.tensor(case_B))


def logits_of(mask):
    return torch.where(mask, 10.0, -10.0)


@pytest.fixture
def batch():
    """Slice 0: organ 1 on 4 pixels; slice 1: empty; slice 2: organ 2 alone, not annotated."""
    label = torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)
    label[0, :2, :2] = 1
    label[2, 0, 0] = 2
    return make_batch(label, [[True, True], [True, True], [True, False]], [0, 0, 1])


@pytest.fixture
def output():
    """Organ 1 on 2 of its pixels in slice 0, on 3 free pixels of slice 1; organ 2 everywhere."""
    mask = torch.zeros(3, 2, SIDE, SIDE, dtype=torch.bool)
    mask[0, 0, 0, :2] = True
    mask[1, 0, 3, :3] = True
    mask[:, 1] = True
    return Output([logits_of(mask)], None)


def test_counts_are_those_worked_out_by_hand(batch, output):
    counts = count_batch(output, batch, 0.5, 3)
    assert counts[0, 0].tolist() == [2, 2, 4, 0, 0, 0, 0, 0]
    assert counts[1, 0].tolist() == [0, 3, 0, 1, 1, 0, 0, 0]
    assert counts[0, 1].tolist() == [0, 16, 0, 1, 1, 0, 0, 0]


def test_unannotated_organ_counts_nowhere(batch, output):
    assert count_batch(output, batch, 0.5, 1)[2, 1].tolist() == [0] * NUM_COUNTS


def test_few_pixels_are_no_false_positive(batch, output):
    assert count_batch(output, batch, 0.5, 4)[1, 0].tolist() == [0, 3, 0, 1, 0, 0, 0, 0]


def test_classifier_is_counted_where_there_is_one(batch, output):
    present_then_absent = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    classified = Output(output.logits, torch.stack([present_then_absent] * 3))
    counts = count_batch(classified, batch, 0.5, 1)
    # Organ 1 is said to be in every slice, organ 2 in none.
    assert counts[:, 0, 5:].tolist() == [[1, 1, 0], [1, 0, 0], [1, 0, 0]]
    assert counts[:, 1, 5:].tolist() == [[1, 0, 1], [1, 0, 1], [0, 0, 0]]
    metrics = metrics_of(counts[None].sum(dim=1), ("liver", "spleen"))
    assert metrics["val/classifier_accuracy/liver"] == pytest.approx(1 / 3)
    assert metrics["val/classifier_sensitivity/liver"] == 1
    assert metrics["val/classifier_specificity/liver"] == 0
    assert metrics["val/classifier_accuracy/spleen"] == 1
    assert math.isnan(metrics["val/classifier_sensitivity/spleen"])
    assert metrics["val/classifier_specificity/spleen"] == 1


def test_metrics_pool_slices_of_a_case(batch, output, tiny_params):
    settings = tiny_params.evaluate.model_copy(
        update={"threshold": 0.5, "min_false_positive_mm2": 3 * 12**2}
    )
    params = tiny_params.model_copy(update={"evaluate": settings})
    counts = count_cases(lambda image: output, [batch], 2, params, torch.device("cpu"))
    metrics = metrics_of(counts, ("liver", "spleen"))
    assert metrics["val/dice/liver"] == pytest.approx(2 * 2 / (5 + 4))
    assert metrics["val/dice/spleen"] == 0
    assert metrics["val/dice"] == pytest.approx(metrics["val/dice/liver"] / 2)
    assert metrics["val/slice_fpr/liver"] == pytest.approx(1 / 2)
    assert metrics["val/slice_fpr/spleen"] == 1
    assert not [key for key in metrics if "classifier" in key]


def test_parts_of_the_work_add_up(batch, output):
    whole = count_batch(output, batch, 0.5, 1)
    for cut in (1, 2):
        parts = []
        for part in (slice(0, cut), slice(cut, None)):
            few = Batch(*(getattr(batch, name)[part] for name in
                          ("image_BCHW", "label_BHW", "annotated_BK", "case_B")))  # fmt: skip
            parts.append(count_batch(Output([output.logits[0][part]], None), few, 0.5, 1))
        assert torch.equal(torch.cat(parts), whole)


def test_nothing_annotated_is_not_measured():
    metrics = metrics_of(torch.zeros(2, 1, NUM_COUNTS, dtype=torch.int64), ("liver",))
    assert all(math.isnan(value) for value in metrics.values())
    assert set(metrics) == {"val/dice", "val/dice/liver", "val/slice_fpr/liver"}


def test_too_few_slices_without_an_organ_are_a_warning():
    present = np.array([[True, True]] * 17 + [[False, True]] * 3)
    annotated = np.ones_like(present)
    warning = warn_of_samples(annotated, present, ("liver", "spleen"))
    assert "too few slices of an epoch are without spleen (0 of 20) for the slice" in warning
    assert "raise train.organ_free_share, add scans that reach beyond the organ" in warning
    present[-1] = [True, False]
    assert "without liver (2 of 20), spleen (1 of 20) for" in warn_of_samples(
        annotated, present, ("liver", "spleen")
    )


def test_slices_that_do_not_annotate_an_organ_are_not_without_it():
    present = np.array([[True]] * 9 + [[False]] * 9)
    assert warn_of_samples(np.ones_like(present), present, ("liver",)) is None
    assert "liver (0 of 9)" in warn_of_samples(present, present, ("liver",))
    assert warn_of_samples(np.zeros_like(present), present, ("liver",)) is None


def test_classifier_that_leaves_slices_open_is_a_warning():
    metrics = {
        "val/classifier_specificity/liver": 0.13,
        "val/classifier_specificity/spleen": 0.5,
        "val/classifier_specificity/kidney": math.nan,
    }
    organs = ("liver", "spleen", "kidney", "colon")
    warning = warn_of_classifier(metrics, organs)
    assert "less than half of the validation slices without liver (13%); raise train" in warning
    assert warn_of_classifier(metrics, organs[1:]) is None


def test_ignored_pixels_and_slices_that_nobody_judged_count_nowhere(batch, output):
    batch.label_BHW[0, 0, 0] = 255  # in both masks before
    batch.label_BHW[1, 3, :2] = 255  # of the three wrong pixels
    classified = Output(output.logits, torch.tensor([[[0.0, 1.0]] * 2] * 3))
    counts = count_batch(classified, batch, 0.5, 1)
    assert counts[0, 0].tolist() == [1, 1, 3, 0, 0, 1, 1, 0]
    assert counts[1, 0].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
