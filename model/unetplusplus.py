"""UNet++: Zhou et al., DLMIA 2018 and IEEE TMI 2020, as the UNet 3+ authors' program has it."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from model.blocks import DoubleConv, Up
from model.encoders import Encoder
from model.segmentation import SegmentationNetwork


class NestedColumn(nn.Module):
    """Nodes X^{i,j} of one j: each joins all maps of its row with the upsampled map below."""

    def __init__(self, channels: list[int], column: int) -> None:
        super().__init__()
        pairs = list(pairwise(channels))[: len(channels) - column]
        self.ups = nn.ModuleList(Up(deep, fine) for fine, deep in pairs)
        self.blocks = nn.ModuleList(
            DoubleConv((column + 1) * fine, fine, norm=False) for fine, _ in pairs
        )

    def forward(self, rows: list[list[Tensor]]) -> list[list[Tensor]]:
        """Rows of maps, the finest first -> the rows with one more map, without the last row."""
        joined = [
            torch.cat([up(below[-1]), *row], dim=1)
            for up, row, below in zip(self.ups, rows, rows[1:], strict=False)
        ]
        new = [block(x) for block, x in zip(self.blocks, joined, strict=True)]
        return [[*row, x] for row, x in zip(rows, new, strict=False)]


class UNetPlusPlus(SegmentationNetwork):
    """Nested dense skip connections.

    With deep supervision each node of the finest row has a 1x1 head. The first logits are the mean
    of all heads, which is the network's result; in training those of each head follow.
    """

    def __init__(self, encoder: Encoder, *, num_organs: int, deep_supervision: bool) -> None:
        super().__init__(encoder, num_organs)
        num_columns = len(encoder.channels) - 1
        self.columns = nn.ModuleList(
            NestedColumn(encoder.channels, column) for column in range(1, num_columns + 1)
        )
        self.heads = nn.ModuleList(
            nn.Conv2d(encoder.channels[0], num_organs, 1)
            for _ in range(num_columns if deep_supervision else 1)
        )

    def decode(self, maps: list[Tensor], *, all_heads: bool) -> list[Tensor]:
        """Return the mean of the heads, then each head, that of the last node first."""
        rows = [[x] for x in maps]
        for column in self.columns:
            rows = column(rows)
        nodes = rows[0][-len(self.heads) :]
        logits = [head(x) for head, x in zip(self.heads, nodes, strict=True)]
        if len(logits) == 1:
            return logits
        mean = torch.stack(logits).mean(dim=0)
        return [mean, *reversed(logits)] if all_heads else [mean]
