"""UNet: Ronneberger et al., MICCAI 2015, as the UNet 3+ authors' program has it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.blocks import DoubleConv, Up
from model.encoders import Encoder
from model.segmentation import SegmentationNetwork


class UNet(SegmentationNetwork):
    """Plain skip connections; the decoder has 4x4 transposed convolutions and no batch norm."""

    def __init__(self, encoder: Encoder, *, num_organs: int) -> None:
        super().__init__(encoder, num_organs)
        pairs = list(zip(encoder.channels, encoder.channels[1:], strict=False))
        self.ups = nn.ModuleList(Up(deep, fine) for fine, deep in pairs)
        self.blocks = nn.ModuleList(DoubleConv(2 * fine, fine, norm=False) for fine, _ in pairs)
        self.head = nn.Conv2d(encoder.channels[0], num_organs, 3, padding=1)

    def decode(self, maps: list[Tensor], *, all_heads: bool) -> list[Tensor]:
        """Logits, the finest head first."""
        x = maps[-1]
        for skip, up, block in zip(maps[-2::-1], self.ups[::-1], self.blocks[::-1], strict=True):
            x = block(torch.cat([up(x), skip], dim=1))
        return [self.head(x)]
