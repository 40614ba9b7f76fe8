"""Several networks as one: the mean of their probabilities.

Shapes: B batch, K organs, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from model.segmentation import OrganClassifier, SegmentationNetwork


class Ensemble(nn.Module):
    """Networks of one recipe, trained with different seeds, that segment together.

    The probability of an organ at a pixel is the mean of the members' probabilities, each after
    the decision of the member's own slice classifier (CGM). The ensemble's probability that a
    slice contains an organ is the highest of the members': so where it is 0.5 or less, every
    member has closed the slice, and the organ's probability is exactly 0, as for a single network.

    Args:
        members: with the same organs, either all with a slice classifier or all without.

    Raises:
        ValueError: there is no member, or they differ in their organs or in having a classifier.

    Attributes:
        members: the networks.
        num_organs: channels of the probabilities, K.
    """

    def __init__(self, members: Sequence[SegmentationNetwork]) -> None:
        super().__init__()
        kinds = {(member.num_organs, member.classifier is not None) for member in members}
        if len(kinds) != 1:
            raise ValueError(
                f"found {len(members)} members with {len(kinds)} combinations of organs and slice "
                "classifier: expected at least one member, and the same for all"
            )
        self.members = nn.ModuleList(members)
        self.num_organs = members[0].num_organs

    @property
    def classifier(self) -> OrganClassifier | None:
        """Return the first member's slice classifier; None for members without one."""
        return list_members(self)[0].classifier


AnyNetwork = SegmentationNetwork | Ensemble
"""What predicts: a network, or several as one."""


def list_members(network: AnyNetwork) -> list[SegmentationNetwork]:
    """Return the members of an ensemble; a single network is its own only member."""
    if isinstance(network, Ensemble):
        return [cast(SegmentationNetwork, member) for member in network.members]
    return [network]


def join_probabilities(members: Sequence[Tensor]) -> Tensor:
    """Return the ensemble's probabilities of pixels: the mean of the members', of any shape."""
    return members[0] if len(members) == 1 else torch.stack(tuple(members)).mean(dim=0)


def join_organ_probabilities(members: Sequence[Tensor]) -> Tensor:
    """Return the ensemble's probabilities that slices contain organs: the highest of the members'.

    Args:
        members: B x K each.
    """
    return members[0] if len(members) == 1 else torch.stack(tuple(members)).amax(dim=0)
