"""Encoders: maps of five levels, the finest first.

Shapes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from model.blocks import DoubleConv

NUM_LEVELS = 5


class Encoder(nn.Module):
    """B x C x H x W -> maps, the finest first.

    Attributes:
        channels: of each map.
    """

    channels: list[int]


class PlainEncoder(Encoder):
    """Two convolution blocks a level, 2x2 max-pooling between levels.

    The channels are width x (1, 2, 4, 8, 16).
    """

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.channels = [width * 2**level for level in range(NUM_LEVELS)]
        self.levels = nn.ModuleList(
            DoubleConv(before, after)
            for before, after in zip([in_channels, *self.channels], self.channels, strict=False)
        )

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        """Maps of 1/1 to 1/16 of the input's size, which 16 divides."""
        maps: list[Tensor] = []
        for level in self.levels:
            maps.append(level(F.max_pool2d(maps[-1], 2) if maps else x_BCHW))
        return maps
