"""What every network returns, and how it becomes probabilities.

Shapes: B batch, K organs, H W pixels.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Gate = Literal["hard", "soft", "none"]


class Output(NamedTuple):
    """Raw scores of a network for a batch of slices.

    Attributes:
        logits: one B x K x H x W tensor per supervised head, the finest first, all at the
            input's resolution. A single entry without deep supervision, and in eval mode.
        organ_logits: B x K x 2 scores of the classification-guided module, index 1 = "the slice
            contains the organ"; None for a network without one.
    """

    logits: list[Tensor]
    organ_logits: Tensor | None


def organ_open(organ_logits: Tensor) -> Tensor:
    """The hard gate: argmax of the two scores. B x K x 2 -> B x K, bool, True = organ present."""
    return organ_logits[..., 1] > organ_logits[..., 0]


def organ_probability(organ_logits: Tensor) -> Tensor:
    """Softmax of "present": above 0.5 where the hard gate is open. B x K x 2 -> B x K."""
    return torch.sigmoid((organ_logits[..., 1] - organ_logits[..., 0]).float())


def check_gate(gate: str) -> None:
    """Raise ValueError unless `gate` names a way of gating."""
    if gate not in get_args(Gate):
        raise ValueError(f"unknown gate {gate!r}: use one of {', '.join(get_args(Gate))}")


def probabilities(output: Output, gate: Gate = "hard") -> Tensor:
    """Probability of every organ at every pixel, from the finest head.

    The gate multiplies probabilities, not logits, so a closed gate gives exactly 0 (UNet 3+,
    Huang et al. 2020, section 2.4). Networks without a classifier have no gate.

    Args:
        output: what a network returned.
        gate: "hard" multiplies by 0 or 1 (argmax), "soft" by the probability that the organ is
            present, "none" leaves the probabilities alone.

    Returns:
        B x K x H x W, float32, in [0, 1].

    Raises:
        ValueError: for an unknown gate.
    """
    check_gate(gate)
    probability_BKHW = torch.sigmoid(output.logits[0].float())
    if output.organ_logits is None or gate == "none":
        return probability_BKHW
    if gate == "hard":
        weight = organ_open(output.organ_logits).to(probability_BKHW.dtype)
    else:
        weight = organ_probability(output.organ_logits)
    return probability_BKHW * weight[..., None, None]
