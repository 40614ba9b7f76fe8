"""The output of every network, and its conversion to probabilities.

Shapes: B batch, K organs, H W pixels.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

Gating = Literal["hard", "slab", "soft", "none"]
"""How the slice classifier (CGM) acts on the probabilities, see `gate_weights`."""

PRESENT_ABOVE = 0.5
"""The slice classifier closes slices of this probability and below."""


class Output(NamedTuple):
    """Raw scores of a network for a batch of slices.

    Attributes:
        logits: one B x K x H x W tensor per supervised head, the finest first, all at the
            input's resolution. A single entry without deep supervision, and in eval mode.
        organ_logits: B x K x 2 scores of the slice classifier (CGM), index 1 = "the slice
            contains the organ"; None for a network without one.
    """

    logits: list[Tensor]
    organ_logits: Tensor | None


def organ_present(organ_logits: Tensor) -> Tensor:
    """Return the classifier's decision, argmax of the two scores: B x K x 2 -> B x K, bool."""
    return organ_logits[..., 1] > organ_logits[..., 0]


def organs_unknown(present_BK: Tensor, ignored_BHW: Tensor) -> Tensor:
    """Return where nobody knows if a slice contains an organ, B x K, bool.

    That is where no pixel of it was drawn, but some pixels were not judged.

    Args:
        present_BK: bool, True if the slice contains the organ.
        ignored_BHW: bool, True for pixels that nobody judged.
    """
    return ~present_BK & ignored_BHW.flatten(1).any(dim=1)[:, None]


def organ_probability(organ_logits: Tensor) -> Tensor:
    """Return softmax of "present": B x K x 2 -> B x K; above 0.5 where `organ_present`."""
    # Softmax of two scores is the sigmoid of their difference.
    return torch.sigmoid((organ_logits[..., 1] - organ_logits[..., 0]).float())


def gate_weights(organ_probability_ZK: Tensor, gating: Gating, reach: int = 0) -> Tensor:
    """Return the factor of the probabilities of a scan's slices.

    Args:
        organ_probability_ZK: of `organ_probability`, for consecutive slices and each organ.
        gating: "hard" multiplies by 1 where the slice classifier finds the organ, else by 0
            (UNet 3+, Huang et al. 2020, section 2.4); "slab" multiplies by 1 where it finds it in
            the slice or in one at most `reach` slices away; "soft" multiplies by the probability;
            "none" does not use the classifier.
        reach: of "slab", in slices; see `slab_reach`.

    Returns:
        Z x K, float32, in [0, 1].

    Raises:
        ValueError: unknown `gating`.
    """
    check_gating(gating)
    if gating == "none":
        return torch.ones_like(organ_probability_ZK)
    if gating == "soft":
        return organ_probability_ZK
    open_ZK = (organ_probability_ZK > PRESENT_ABOVE).to(organ_probability_ZK.dtype)
    if gating == "hard" or not reach:
        return open_ZK
    # Beyond the ends max_pool1d pads with minus infinity, so nothing is open there.
    return F.max_pool1d(open_ZK.T, 2 * reach + 1, stride=1, padding=reach).T


def slab_reach(neighbour_step: float) -> int:
    """Return how far an open slice opens others with gating "slab", in slices.

    Every slice within the distance of the network's neighbours, and always the next one: a
    neighbour between two slices is interpolated from both.

    Args:
        neighbour_step: distance of neighbours in slices of the scan, as
            `model.preprocessing.neighbour_step` returns it.
    """
    return max(1, math.floor(neighbour_step))


def check_gating(gating: str) -> None:
    """Raise ValueError unless `gating` is a value of `Gating`."""
    if gating not in get_args(Gating):
        raise ValueError(f"unknown gating {gating!r}: use one of {', '.join(get_args(Gating))}")


def probabilities(output: Output, gating: Gating = "hard") -> Tensor:
    """Return the probability of every organ at every pixel, from the finest head.

    The slice classifier multiplies probabilities, not logits, so an organ that it finds absent has
    probability exactly 0 (UNet 3+, Huang et al. 2020, section 2.4). `gating` has no effect on a
    network without a classifier.

    Args:
        output: of a network.
        gating: see `gate_weights`; "hard" is the argmax. "slab" needs the slices of a scan in
            order, which a batch is not.

    Returns:
        B x K x H x W, float32, in [0, 1].

    Raises:
        ValueError: unknown `gating`, or "slab".
    """
    check_gating(gating)
    if gating == "slab":
        raise ValueError("gating slab needs all slices of a scan: use `predict_batches`")
    probability_BKHW = torch.sigmoid(output.logits[0].float())
    if output.organ_logits is None or gating == "none":
        return probability_BKHW
    if gating == "hard":
        weight = organ_present(output.organ_logits).to(probability_BKHW.dtype)
    else:
        weight = organ_probability(output.organ_logits)
    return probability_BKHW * weight[..., None, None]
