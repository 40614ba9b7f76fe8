"""UNet (Ronneberger et al., MICCAI 2015), in two forms, and Attention UNet.

Shapes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from model.blocks import ConvNorm, DoubleConv, Up
from model.encoders import Encoder
from model.segmentation import SegmentationNetwork


class UNet(SegmentationNetwork):
    """Plain skip connections; the decoder upsamples by 4x4 transposed convolutions.

    Without `norm` the decoder has no batch norm, as in the UNet 3+ authors' program.
    """

    def __init__(self, encoder: Encoder, *, num_organs: int, norm: bool = True) -> None:
        super().__init__(encoder, num_organs)
        pairs = list(pairwise(encoder.channels))
        self.ups = nn.ModuleList(Up(deep, fine) for fine, deep in pairs)
        self.blocks = nn.ModuleList(DoubleConv(2 * fine, fine, norm=norm) for fine, _ in pairs)
        self.head = nn.Conv2d(encoder.channels[0], num_organs, 3, padding=1)

    def decode(self, maps: list[Tensor], *, all_heads: bool) -> list[Tensor]:
        """Return the logits of the only head."""
        x = maps[-1]
        for level in reversed(range(len(self.ups))):
            x = self.ups[level](x)
            x = self.blocks[level](torch.cat([x, self.skip(level, maps[level], x)], dim=1))
        return [self.head(x)]

    def skip(self, level: int, x_BCHW: Tensor, decoded_BCHW: Tensor) -> Tensor:
        """Return the map to join with the upsampled decoder map: the encoder's, unchanged."""
        return x_BCHW


class AttentionGate(nn.Module):
    """Attention gate: weight a skip connection pixel by pixel, given the decoder's map.

    x * sigmoid(psi(relu(W_x x + W_g g))), all three 1x1 convolutions with batch norm.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.skip = ConvNorm(channels, channels // 2 or 1)
        self.gating = ConvNorm(channels, channels // 2 or 1)
        self.score = ConvNorm(channels // 2 or 1, 1)

    def forward(self, x_BCHW: Tensor, gating_BCHW: Tensor) -> Tensor:
        """Encoder map and upsampled decoder map, both B x C x H x W -> weighted encoder map."""
        score = self.score(F.relu(self.skip(x_BCHW) + self.gating(gating_BCHW), inplace=True))
        return x_BCHW * torch.sigmoid(score)


class AttentionUNet(UNet):
    """UNet with attention gates on its skip connections: Oktay et al., MIDL 2018.

    The decoder has no batch norm.
    """

    def __init__(self, encoder: Encoder, *, num_organs: int) -> None:
        super().__init__(encoder, num_organs=num_organs, norm=False)
        self.gates = nn.ModuleList(AttentionGate(fine) for fine in encoder.channels[:-1])

    def skip(self, level: int, x_BCHW: Tensor, decoded_BCHW: Tensor) -> Tensor:
        """Return the encoder's map, weighted by its attention gate."""
        return cast(Tensor, self.gates[level](x_BCHW, decoded_BCHW))
