"""Encoders: image -> maps, the finest first.

Each takes the coarsest stride wanted. Levels that would be coarser have dilated convolutions
instead (Chen et al., 2017).

Shapes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from model.blocks import ConvBlock, ConvNorm, DoubleConv


class Encoder(nn.Module):
    """B x C x H x W, H and W divisible by the coarsest stride -> maps.

    Attributes:
        channels: of each map, the finest first.
        strides: of each map: 2 means half the resolution.
    """

    channels: list[int]
    strides: list[int]


class PlainEncoder(Encoder):
    """Two convolution blocks a level, 2x2 max-pooling between levels: the paper's encoder.

    Five levels of width x (1, 2, 4, 8, 16); a sixth, as wide as the fifth, for stride 32.
    """

    def __init__(self, in_channels: int, width: int, *, stride: int = 16) -> None:
        super().__init__()
        factors = [1, 2, 4, 8, 16, 32] if stride == 32 else [1, 2, 4, 8, 16]
        self.channels = [width * min(factor, 16) for factor in factors]
        self.strides = [min(factor, stride) for factor in factors]
        self.levels = nn.ModuleList(
            DoubleConv(before, after, dilation=factor // reached)
            for before, after, factor, reached in zip(
                [in_channels, *self.channels], self.channels, factors, self.strides, strict=False
            )
        )

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        """Return one map per level."""
        maps: list[Tensor] = []
        reached = 1
        for level, stride in zip(self.levels, self.strides, strict=True):
            if stride > reached:
                x_BCHW = F.max_pool2d(x_BCHW, 2)
            x_BCHW = level(x_BCHW)
            maps.append(x_BCHW)
            reached = stride
        return maps


class Bottleneck(nn.Module):
    """Residual block of ResNet-50 and deeper: 1x1, 3x3 (strided or dilated), 1x1, sum."""

    def __init__(self, in_channels: int, channels: int, *, stride: int, dilation: int) -> None:
        super().__init__()
        out_channels = 4 * channels
        self.reduce = ConvNorm(in_channels, channels)
        self.conv = ConvNorm(channels, channels, 3, stride=stride, dilation=dilation)
        self.expand = ConvNorm(channels, out_channels)
        self.shortcut = (
            ConvNorm(in_channels, out_channels, stride=stride)
            if stride > 1 or in_channels != out_channels
            else nn.Identity()
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """B x C x H x W -> B x (4 channels) x (H / stride) x (W / stride)."""
        x = F.relu(self.reduce(x_BCHW), inplace=True)
        x = F.relu(self.conv(x), inplace=True)
        return F.relu(self.expand(x) + self.shortcut(x_BCHW), inplace=True)


class ResNet101Encoder(Encoder):
    """ResNet-101 (He et al., CVPR 2016): the stem at half the resolution, then four stages.

    At width 64 its channels are 64, 256, 512, 1024, 2048.
    """

    num_blocks = (3, 4, 23, 3)

    def __init__(self, in_channels: int, width: int, *, stride: int = 32) -> None:
        super().__init__()
        self.channels = [width, *(4 * width * 2**i for i in range(len(self.num_blocks)))]
        self.strides = [min(2 ** (i + 1), stride) for i in range(len(self.channels))]
        self.stem = ConvNorm(in_channels, width, 7, stride=2)
        self.stages = nn.ModuleList()
        for i, num_blocks in enumerate(self.num_blocks):
            first_stride = 1 if i == 0 else self.strides[i + 1] // self.strides[i]
            dilation = 2 ** (i + 2) // self.strides[i + 1]
            befores = [self.channels[i]] + [self.channels[i + 1]] * (num_blocks - 1)
            self.stages.append(
                nn.Sequential(
                    *(
                        Bottleneck(
                            before,
                            width * 2**i,
                            stride=first_stride if block == 0 else 1,
                            dilation=dilation,
                        )
                        for block, before in enumerate(befores)
                    )
                )
            )

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        """Return the stem's map, then one map per stage."""
        maps = [F.relu(self.stem(x_BCHW), inplace=True)]
        x = F.max_pool2d(maps[0], 3, stride=2, padding=1)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class ProjectedEncoder(Encoder):
    """Project an encoder's maps to the plain encoder's channels with 1x1 convolutions.

    The U-shaped networks thus have the same decoder with every encoder.
    """

    def __init__(self, encoder: Encoder, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.strides = encoder.strides
        self.channels = [width * 2**i for i in range(len(encoder.channels))]
        self.projections = nn.ModuleList(
            ConvBlock(before, after, 1)
            for before, after in zip(encoder.channels, self.channels, strict=True)
        )

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        """Return the encoder's maps with `channels` channels."""
        maps = self.encoder(x_BCHW)
        return [project(x) for project, x in zip(self.projections, maps, strict=True)]
