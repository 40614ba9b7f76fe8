"""The base of every network: padding, encoder and decoder, slice classifier, output.

Shapes: B batch, C channels, K organs, H W pixels.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from model.blocks import Recomputing, resize
from model.encoders import Encoder
from model.output import Output


class OrganClassifier(nn.Module):
    """Slice classifier of the classification-guided module (CGM): which organs are in the slice.

    Dropout 0.5, 1x1 convolution of the deepest map, global maximum (UNet 3+, section 2.4). The
    maximum is `amax`, whose gradient is deterministic on CUDA.
    """

    def __init__(self, in_channels: int, num_organs: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.conv = nn.Conv2d(in_channels, 2 * num_organs, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """B x C x H x W, the deepest map -> organ logits, B x K x 2."""
        scores: Tensor = self.conv(self.dropout(x_BCHW))
        return scores.amax(dim=(2, 3)).view(x_BCHW.shape[0], -1, 2)


class SegmentationNetwork(nn.Module):
    """Base class of the networks.

    A network has an encoder and defines `decode`, which returns logits, the finest head first. The
    two are separate so that inference can skip the decoder for slices without an organ.

    The input is padded with zeros to a multiple of the encoder's deepest stride. Logits are
    upsampled to the padded size and cropped to the input.

    Attributes:
        encoder: image to maps, the finest first.
        num_organs: channels of the logits, K.
        classifier: the slice classifier (CGM), or None.
    """

    def __init__(self, encoder: Encoder, num_organs: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_organs = num_organs
        self.classifier: OrganClassifier | None = None

    @property
    def stride(self) -> int:
        """Return the number of which the encoder needs H and W to be multiples."""
        return max(self.encoder.strides)

    def encode(self, x_BCHW: Tensor) -> list[Tensor]:
        """B x C x H x W, H and W divisible by `stride` -> maps, the finest first."""
        return cast(list[Tensor], self.encoder(x_BCHW))

    def decode(self, maps: list[Tensor], *, all_heads: bool) -> list[Tensor]:
        """Maps of `encode` -> logits at any resolution, the finest head first.

        Without `all_heads`, only the finest head is needed.
        """
        raise NotImplementedError

    def classify(self, maps: list[Tensor]) -> Tensor | None:
        """Maps of `encode` -> organ logits B x K x 2, or None without a classifier."""
        return None if self.classifier is None else self.classifier(maps[-1])

    def recompute_maps(self, from_bytes: int | None) -> None:
        """Set which maps the backward pass recomputes instead of storing them.

        Only results of batch norm and ReLU that feed a single convolution are recomputed.

        Args:
            from_bytes: smallest size of a map (of a whole batch) that is recomputed; 0 = all,
                None = none. The default is `model.blocks.RECOMPUTE_FROM_BYTES`.
        """
        for module in self.modules():
            if isinstance(module, Recomputing):
                module.recompute_from_bytes = from_bytes

    def forward(self, x_BCHW: Tensor, *, all_heads: bool | None = None) -> Output:
        """Segment a batch of slices.

        Args:
            x_BCHW: B x C x H x W, adjacent slices as channels, intensities in [0, 1].
            all_heads: compute every supervised head; None = in training mode only.
        """
        padded, frame = pad_to_multiple(x_BCHW, self.stride)
        maps = self.encode(padded)
        logits = self.decode(maps, all_heads=self.training if all_heads is None else all_heads)
        return Output([restore(each, frame) for each in logits], self.classify(maps))


class Frame(NamedTuple):
    """Place of an image in its padded copy, in pixels; sizes are (H, W)."""

    top: int
    left: int
    size: tuple[int, int]
    padded_size: tuple[int, int]


def pad_to_multiple(x_BCHW: Tensor, multiple: int) -> tuple[Tensor, Frame]:
    """Pad H and W with zeros, evenly on both sides.

    The result is channels last in memory, the fastest layout for convolutions.
    """
    height, width = x_BCHW.shape[-2:]
    down, right = -height % multiple, -width % multiple
    frame = Frame(down // 2, right // 2, (height, width), (height + down, width + right))
    if down or right:
        edges = (frame.left, right - frame.left, frame.top, down - frame.top)
        x_BCHW = F.pad(x_BCHW, edges)
    return x_BCHW.contiguous(memory_format=torch.channels_last), frame


def restore(x_BCHW: Tensor, frame: Frame) -> Tensor:
    """Resample a map of the padded image, at any resolution, to the image's own pixels."""
    # One map after the other in memory: upsampling so few channels is twice as fast.
    x_BCHW = resize(x_BCHW.contiguous(), frame.padded_size)
    if frame.size == frame.padded_size:
        return x_BCHW
    height, width = frame.size
    return x_BCHW[..., frame.top : frame.top + height, frame.left : frame.left + width]
