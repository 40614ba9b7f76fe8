"""A 3x3 convolution of a bilinearly upsampled map.

Shapes: B batch, C channels, h w pixels before and H W pixels after upsampling.
"""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


def upsample_conv(x_BCHW: Tensor, conv: nn.Conv2d, scale: int) -> Tensor:
    """conv(upsample(x)): bilinear by `scale`, half-pixel centres, then 3x3 with zero padding."""
    if scale > 1:
        x_BCHW = F.interpolate(x_BCHW, scale_factor=scale, mode="bilinear", align_corners=False)
    return conv(x_BCHW)
