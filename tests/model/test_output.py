from __future__ import annotations

import pytest
import torch

from model.output import (
    Output,
    gate_weights,
    organ_present,
    organ_probability,
    probabilities,
    slab_reach,
)

SCORES = torch.tensor([[[1.0, 2.0], [2.0, 1.0]], [[0.0, 0.0], [-3.0, -1.0]]])


def make_output() -> Output:
    torch.manual_seed(0)
    return Output([torch.randn(2, 2, 4, 5), torch.randn(2, 2, 4, 5)], SCORES)


def test_hard_gate_is_argmax_and_a_tie_is_closed() -> None:
    assert organ_present(SCORES).tolist() == [[True, False], [False, True]]
    assert torch.equal(organ_present(SCORES), SCORES.argmax(dim=-1).bool())


def test_organ_probability_agrees_with_the_gate() -> None:
    scores = torch.randn(50, 3, 2)
    assert torch.equal(organ_probability(scores) > 0.5, organ_present(scores))
    torch.testing.assert_close(organ_probability(scores), scores.softmax(dim=-1)[..., 1])


def test_closed_gate_gives_exactly_zero_and_open_gate_changes_nothing() -> None:
    output = make_output()
    plain = torch.sigmoid(output.logits[0])
    gated = probabilities(output)
    assert torch.equal(gated[0, 0], plain[0, 0])
    assert torch.equal(gated[1, 1], plain[1, 1])
    assert gated[0, 1].abs().max() == 0
    assert gated[1, 0].abs().max() == 0


def test_soft_gate_multiplies_by_the_probability_of_presence() -> None:
    output = make_output()
    expected = torch.sigmoid(output.logits[0]) * SCORES.softmax(-1)[..., 1, None, None]
    torch.testing.assert_close(probabilities(output, "soft"), expected)


@pytest.mark.parametrize("gating", ["hard", "soft", "none"])
def test_without_a_classifier_every_gating_leaves_probabilities_alone(gating: str) -> None:
    output = Output(make_output().logits, None)
    assert torch.equal(probabilities(output, gating), torch.sigmoid(output.logits[0]))


def test_no_gate_ignores_the_classifier() -> None:
    output = make_output()
    assert torch.equal(probabilities(output, "none"), torch.sigmoid(output.logits[0]))


def test_probabilities_of_half_precision_logits_are_float32() -> None:
    output = Output([torch.randn(1, 1, 2, 2).bfloat16()], SCORES[:1, :1].bfloat16())
    assert probabilities(output, "soft").dtype == torch.float32


PRESENT = torch.tensor([0.1, 0.9, 0.5, 0.2, 0.3, 0.7])[:, None] * torch.tensor([1.0, 0.5])


@pytest.mark.parametrize(
    ("gating", "reach", "expected"),
    [
        ("hard", 2, [0, 1, 0, 0, 0, 1]),
        ("slab", 0, [0, 1, 0, 0, 0, 1]),
        ("slab", 1, [1, 1, 1, 0, 1, 1]),
        ("slab", 2, [1, 1, 1, 1, 1, 1]),
        ("none", 1, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_weights_of_slices(gating: str, reach: int, expected: list[int]) -> None:
    weights = gate_weights(PRESENT, gating, reach)
    assert weights[:, 0].tolist() == expected
    assert weights[:, 1].tolist() == [float(gating == "none")] * 6


def test_soft_weights_are_the_probabilities() -> None:
    assert torch.equal(gate_weights(PRESENT, "soft"), PRESENT)


@pytest.mark.parametrize(
    ("step", "reach"), [(0.4, 1), (0.9375, 1), (1.0, 1), (1.9999, 1), (2.0, 2), (5.5, 5)]
)
def test_slab_reaches_the_next_slice_and_all_within_the_neighbours(step: float, reach: int) -> None:
    assert slab_reach(step) == reach


def test_slab_needs_a_scan() -> None:
    with pytest.raises(ValueError, match="gating slab needs all slices of a scan"):
        probabilities(make_output(), "slab")


def test_unknown_gate_is_refused() -> None:
    with pytest.raises(
        ValueError, match="unknown gating 'open': use one of hard, slab, soft, none"
    ):
        probabilities(make_output(), "open")
