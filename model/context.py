"""Networks with context modules on the deepest map: PSPNet, DeepLab v2, v3, v3+, and FCN-8s.

Two differences from the papers: no auxiliary head, and no batch norm after global pooling, as it
could not train on a single image (one value per channel).

Shapes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from model.blocks import ConvBlock, join, resize
from model.encoders import Encoder
from model.segmentation import SegmentationNetwork


class PooledBranch(nn.Module):
    """Average-pool to bins x bins, 1x1 convolution, upsample back."""

    def __init__(self, in_channels: int, out_channels: int, bins: int) -> None:
        super().__init__()
        self.bins = bins
        self.block = ConvBlock(in_channels, out_channels, 1, norm=bins > 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """B x C x H x W -> B x out_channels x H x W."""
        pooled = self.block(F.adaptive_avg_pool2d(x_BCHW, self.bins))
        return resize(pooled, x_BCHW.shape[-2:])


class PSPNet(SegmentationNetwork):
    """Pyramid pooling, Zhao et al., CVPR 2017: the deepest map, its means over 1, 2, 3, 6 bins."""

    def __init__(self, encoder: Encoder, *, num_organs: int) -> None:
        super().__init__(encoder, num_organs)
        deepest = encoder.channels[-1]
        quarter = deepest // 4
        self.pyramid = nn.ModuleList(PooledBranch(deepest, quarter, bins) for bins in (1, 2, 3, 6))
        self.mix = ConvBlock(deepest + 4 * quarter, quarter)
        self.dropout = nn.Dropout2d(0.1)
        self.head = nn.Conv2d(quarter, num_organs, 1)

    def decode(self, maps: list[Tensor], *, all_heads: bool) -> list[Tensor]:
        """Return the logits of the only head."""
        x = maps[-1]
        pooled = join([x, *(branch(x) for branch in self.pyramid)])
        return [self.head(self.dropout(self.mix(pooled)))]


class DeepLabV2(SegmentationNetwork):
    """Atrous spatial pyramid, Chen et al., IEEE TPAMI 2018: the sum of four dilated 3x3 heads."""

    def __init__(self, encoder: Encoder, *, num_organs: int) -> None:
        super().__init__(encoder, num_organs)
        self.heads = nn.ModuleList(
            nn.Conv2d(encoder.channels[-1], num_organs, 3, padding=rate, dilation=rate)
            for rate in (6, 12, 18, 24)
        )

    def decode(self, maps: list[Tensor], *, all_heads: bool) -> list[Tensor]:
        """Return the sum of the heads."""
        return [torch.stack([head(maps[-1]) for head in self.heads]).sum(dim=0)]


class AtrousPyramid(nn.Module):
    """Atrous spatial pyramid pooling of DeepLab v3: 1x1, three dilated 3x3, and global pooling."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                ConvBlock(in_channels, out_channels, 1),
                *(ConvBlock(in_channels, out_channels, dilation=rate) for rate in (6, 12, 18)),
                PooledBranch(in_channels, out_channels, bins=1),
            ]
        )
        self.mix = ConvBlock(len(self.branches) * out_channels, out_channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """B x C x H x W -> B x out_channels x H x W."""
        return cast(Tensor, self.mix(join([branch(x_BCHW) for branch in self.branches])))


class DeepLabV3(SegmentationNetwork):
    """DeepLab v3, Chen et al., 2017: the pyramid, one more 3x3 block, the head."""

    def __init__(self, encoder: Encoder, *, num_organs: int, width: int) -> None:
        super().__init__(encoder, num_organs)
        channels = 4 * width
        self.pyramid = AtrousPyramid(encoder.channels[-1], channels)
        self.mix = ConvBlock(channels, channels)
        self.head = nn.Conv2d(channels, num_organs, 1)

    def decode(self, maps: list[Tensor], *, all_heads: bool) -> list[Tensor]:
        """Return the logits of the only head."""
        return [self.head(self.mix(self.pyramid(maps[-1])))]


class DeepLabV3Plus(SegmentationNetwork):
    """DeepLab v3+, Chen et al., ECCV 2018: the pyramid refined with the map of stride 4."""

    def __init__(self, encoder: Encoder, *, num_organs: int, width: int) -> None:
        super().__init__(encoder, num_organs)
        channels, low_channels = 4 * width, max(3 * width // 4, 1)
        self.low_level = encoder.strides.index(4)
        self.pyramid = AtrousPyramid(encoder.channels[-1], channels)
        self.reduce = ConvBlock(encoder.channels[self.low_level], low_channels, 1)
        self.mix = nn.Sequential(
            ConvBlock(channels + low_channels, channels), ConvBlock(channels, channels)
        )
        self.head = nn.Conv2d(channels, num_organs, 1)

    def decode(self, maps: list[Tensor], *, all_heads: bool) -> list[Tensor]:
        """Return the logits of the only head."""
        low = self.reduce(maps[self.low_level])
        context = resize(self.pyramid(maps[-1]), low.shape[-2:])
        return [self.head(self.mix(join([context, low])))]


class FCN8s(SegmentationNetwork):
    """Fully convolutional network, Long et al., CVPR 2015: scores of strides 32, 16, 8 added up."""

    def __init__(self, encoder: Encoder, *, num_organs: int) -> None:
        super().__init__(encoder, num_organs)
        self.scored = [encoder.strides.index(stride) for stride in (8, 16, 32)]
        self.heads = nn.ModuleList(
            nn.Conv2d(encoder.channels[level], num_organs, 1) for level in self.scored
        )

    def decode(self, maps: list[Tensor], *, all_heads: bool) -> list[Tensor]:
        """Return the summed scores, at stride 8."""
        fine, *deeper = (
            head(maps[level]) for head, level in zip(self.heads, self.scored, strict=True)
        )
        middle, coarse = deeper
        return [fine + resize(middle + resize(coarse, middle.shape[-2:]), fine.shape[-2:])]
