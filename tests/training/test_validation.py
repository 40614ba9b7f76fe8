import math

import pytest
import torch

from fullscale.training.dataset import Batch
from fullscale.training.validation import NUM_COUNTS, count_batch, count_cases, metrics_of
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
    assert counts[0, 0].tolist() == [2, 2, 4, 0, 0, 0, 0]
    assert counts[1, 0].tolist() == [0, 3, 0, 1, 1, 0, 0]
    assert counts[0, 1].tolist() == [0, 16, 0, 1, 1, 0, 0]


def test_unannotated_organ_counts_nowhere(batch, output):
    assert count_batch(output, batch, 0.5, 1)[2, 1].tolist() == [0] * NUM_COUNTS


def test_few_pixels_are_no_false_positive(batch, output):
    assert count_batch(output, batch, 0.5, 4)[1, 0].tolist() == [0, 3, 0, 1, 0, 0, 0]


def test_classifier_is_counted_where_there_is_one(batch, output):
    present_then_absent = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    classified = Output(output.logits, torch.stack([present_then_absent] * 3))
    counts = count_batch(classified, batch, 0.5, 1)
    assert counts[:, 0, 5].tolist() == [1, 0, 0]
    assert counts[:, 1, 5].tolist() == [1, 1, 0]
    assert counts[:, 0, 6].tolist() == [1, 1, 1]


def test_metrics_pool_slices_of_a_case(batch, output, tiny_params):
    settings = tiny_params.evaluate.model_copy(
        update={"threshold": 0.5, "min_false_positive_px": 3}
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
