"""UNet 3+: Huang et al., ICASSP 2020.

Shapes: B batch, C channels, K organs, H W pixels. Level 1 is the finest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from model.batchnorm import norm_relu
from model.blocks import Recomputing, fold_norm, join, norm_relu_then
from model.encoders import Encoder
from model.segmentation import OrganClassifier, SegmentationNetwork
from model.upsampling import upsample_conv


class FullScaleLevel(Recomputing):
    """One decoder level: a branch from every level, concatenated and mixed.

    Each branch is a 3x3 convolution of a map at this level's resolution. One batch norm over the
    concatenated maps is the same function as the paper's one for each branch, and faster.

    Attributes:
        branches: one convolution per level, the finest first.
    """

    def __init__(self, in_channels: list[int], branch_channels: int) -> None:
        super().__init__()
        joined = branch_channels * len(in_channels)
        self.branches = nn.ModuleList(
            nn.Conv2d(each, branch_channels, 3, padding=1) for each in in_channels
        )
        self.norm: nn.Module = nn.BatchNorm2d(joined)
        self.mix = nn.Conv2d(joined, joined, 3, padding=1)
        self.mix_norm: nn.Module = nn.BatchNorm2d(joined)

    def forward(self, maps: list[Tensor], size: torch.Size) -> Tensor:
        """Compute the level, except `mix_norm` and ReLU.

        Args:
            maps: one per branch, each of `size` or smaller by a power of 2.
            size: H and W of this level.

        Returns:
            B x C x H x W, before `mix_norm` and ReLU: whether those are stored or recomputed
            depends on the convolution that follows.
        """
        parts = [
            upsample_conv(x, cast(nn.Conv2d, conv), size[0] // x.shape[-2])
            for x, conv in zip(maps, self.branches, strict=True)
        ]
        return norm_relu_then(self.norm, self.mix, join(parts), self.recompute_from_bytes)

    def fold_norms(self) -> None:
        """Move the batch norms (in eval mode) into the convolutions."""
        fold_norm([cast(nn.Conv2d, conv) for conv in self.branches], self.norm)
        fold_norm([self.mix], self.mix_norm)
        self.norm = self.mix_norm = nn.Identity()


class UNet3Plus(SegmentationNetwork, Recomputing):
    """Full-scale skip connections, optional deep supervision and slice classifier (CGM).

    Every branch of a decoder level has `width` channels.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        num_organs: int,
        width: int,
        deep_supervision: bool,
        cgm: bool,
    ) -> None:
        super().__init__(encoder, num_organs)
        *finer, deepest = encoder.channels
        joined = width * (len(finer) + 1)
        self.levels = nn.ModuleList(
            FullScaleLevel(
                [*finer[: level + 1], *[joined] * (len(finer) - level - 1), deepest],
                width,
            )
            for level in range(len(finer))
        )
        head_channels = [joined] * len(finer) + [deepest]
        self.heads = nn.ModuleList(
            nn.Conv2d(each, num_organs, 3, padding=1)
            for each in (head_channels if deep_supervision else head_channels[:1])
        )
        if cgm:
            self.classifier = OrganClassifier(deepest, num_organs)

    def decode(self, maps: list[Tensor], *, all_heads: bool) -> list[Tensor]:
        """Return logits, the finest head first; the deepest head uses the encoder's deepest map."""
        pooled = [pool_to_levels(x, len(self.levels) - k) for k, x in enumerate(maps[:-1])]
        decoded = [maps[-1]]
        for i, level in reversed(list(enumerate(cast(Iterable[FullScaleLevel], self.levels)))):
            mixed = level([*(pooled[k][i - k] for k in range(i + 1)), *decoded], maps[i].shape[-2:])
            if i > 0:
                decoded.insert(0, norm_relu(level.mix_norm, mixed))
        finest = norm_relu_then(level.mix_norm, self.heads[0], mixed, self.recompute_from_bytes)
        if not all_heads:
            return [finest]
        return [finest, *(head(x) for head, x in zip(self.heads[1:], decoded, strict=False))]


def pool_to_levels(x_BCHW: Tensor, num_levels: int) -> list[Tensor]:
    """Return a map at its own level and, max-pooled by 2 each time, at the levels below."""
    levels = [x_BCHW]
    while len(levels) < num_levels:
        levels.append(F.max_pool2d(levels[-1], 2))
    return levels
