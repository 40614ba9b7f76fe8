from dataclasses import replace

import numpy as np
import pytest
import torch

from fullscale.prediction.network_files import build, describe_network
from fullscale.training.augmentation import Augment
from fullscale.training.dataset import (
    BatchSharding,
    SliceDataset,
    TrainingSlices,
    training_batches,
)
from fullscale.training.epoch_order import EpochOrder
from fullscale.training.step import SegmentationObjective, learning_rate, make_optimizer, seed_step
from model.preprocessing import IGNORED_LABEL


@pytest.fixture
def network(tiny_params):
    torch.manual_seed(0)
    return build(describe_network("unet3plus", tiny_params))


@pytest.fixture
def objective(tiny_params, network):
    params = tiny_params
    return SegmentationObjective(
        network,
        len(params.organs),
        params.slice.window_hu,
        params.recipes["unet3plus"].loss_terms,
        Augment(params.train.augment, params.slice.window_hu, 0),
    )


def first_batch(store, cases, size=4):
    slices = SliceDataset(store, cases, 8.0)
    order = EpochOrder(np.zeros(len(slices), int), slices.organ_free, len(slices), 0.25, "case", 0)
    return next(training_batches(TrainingSlices(slices, order, BatchSharding(size)), 1))


def test_side_weights_reach_the_loss(objective, tiny_params, network, tiny_store):
    params = tiny_params
    halving = SegmentationObjective(
        network,
        len(params.organs),
        params.slice.window_hu,
        params.recipes["unet3plus"].loss_terms,
        Augment(params.train.augment, params.slice.window_hu, seed=0),
        "halving",
    )
    batch = first_batch(tiny_store, ["case_00"])
    prepared = objective.prepare(batch)
    found = []
    for each in (objective, halving):
        torch.manual_seed(0)  # of dropout
        found.append(each.loss(*prepared, batch.annotated_BK)[1])
    equal, half = found
    sides = torch.stack([equal[f"side{number}/iou"] for number in range(1, 6)])
    weights = torch.tensor([16, 8, 4, 2, 1]) / 31
    torch.testing.assert_close(half["iou"], (sides * weights).sum())
    assert half["side5/iou"] == pytest.approx(equal["side5/iou"].item())


def test_terms_are_named_and_add_up(objective, tiny_store):
    batch = first_batch(tiny_store, ["case_00"])
    total, terms = objective.loss(*objective.prepare(batch), batch.annotated_BK)
    parts = [terms[name] for name in ("focal", "ms_ssim", "iou", "classification")]
    torch.testing.assert_close(sum(parts), total.detach())
    sides = [terms[f"side{number}/iou"] for number in range(1, 6)]
    torch.testing.assert_close(torch.stack(sides).mean(), terms["iou"])
    assert "side6/iou" not in terms
    assert not any(value.requires_grad for value in terms.values())


def test_unannotated_organ_gives_no_gradient(objective, network, tiny_store):
    batch = first_batch(tiny_store, ["case_06"])
    assert batch.annotated_BK.tolist() == [[True, False]] * 4
    objective.loss(*objective.prepare(batch), batch.annotated_BK)[0].backward()
    for head in network.heads:
        assert head.weight.grad[0].abs().sum() > 0
        assert head.weight.grad[1].abs().sum() == 0


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1, 1, 1, 1]),
        ("cosine", [1, 0.5, 0, 0]),
        ("poly", [1, 0.5**0.9, 0, 0]),
    ],
)
def test_schedule_at_start_middle_end_and_beyond(tiny_params, schedule, factors):
    train = tiny_params.train.model_copy(update={"schedule": schedule, "learning_rate": 0.2})
    rates = [learning_rate(train, step, 20) for step in (0, 10, 20, 25)]
    assert rates == pytest.approx([0.2 * factor for factor in factors])


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_optimizer_is_the_one_named(tiny_params, network, name, kind):
    train = tiny_params.train.model_copy(update={"optimizer": name, "learning_rate": 0.25})
    optimizer = make_optimizer(network, train)
    assert isinstance(optimizer, kind)
    assert optimizer.defaults["lr"] == 0.25


def test_what_torch_draws_depends_on_seed_and_key_alone():
    drawn = []
    for key in [(0, 1, 2), (0, 1, 3), (0, 1, 2)]:
        torch.rand(len(drawn))
        seed_step(5, *key)
        drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[2]
    assert drawn[0] != drawn[1]
    seed_step(6, 0, 1, 2)
    assert torch.rand(3).tolist() != drawn[0]


def test_wholly_ignored_slices_teach_nothing(objective, network, tiny_store):
    batch = first_batch(tiny_store, ["case_00"])
    assert not batch.has_ignored
    assert objective.prepare(batch)[2] is None
    image_BCHW, mask_BKHW, _ = objective.prepare(batch)
    ignored_BHW = torch.ones_like(batch.label_BHW, dtype=torch.bool)
    none_BKHW = torch.zeros_like(mask_BKHW)
    objective.loss(image_BCHW, none_BKHW, ignored_BHW, batch.annotated_BK)[0].backward()
    assert all(not each.grad.any() for each in network.parameters() if each.grad is not None)


def test_ignored_pixels_of_slices_reach_the_loss(objective, tiny_store):
    batch = first_batch(tiny_store, ["case_00"])
    label_BHW = torch.full_like(batch.label_BHW, IGNORED_LABEL)
    ignored = replace(batch, label_BHW=label_BHW, has_ignored=True)
    _, mask_BKHW, ignored_BHW = objective.prepare(ignored)
    assert not mask_BKHW.any()
    assert ignored_BHW.float().mean() > 0.5  # background comes in from outside
