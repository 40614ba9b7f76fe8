"""A 3x3 convolution of a bilinearly upsampled map, computed in the exchanged order.

Both operations are linear, so with t running over the nine taps

    conv(up(x)) = sum over t of shift_t(up(W_t x)),

where W_t x is a 1x1 convolution at the low resolution. Bilinear upsampling is separable, and
"upsample, then shift, zeros coming in" is one small matrix per axis: the three vertical taps are
summed by a (scale h) x (3 h) matrix along rows, the three horizontal ones by a (scale w) x (3 w)
matrix along columns. The zeros that come in are the convolution's padding, so borders are exact.

Shapes: B batch, C channels, O output channels, h w pixels before and H W pixels after upsampling,
v the vertical and u the horizontal tap.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


def upsample_conv(x_BCHW: Tensor, conv: nn.Conv2d, scale: int) -> Tensor:
    """Return conv(upsample(x)): bilinear, half-pixel centres, then 3x3 with zero padding.

    Uses the order that needs fewer multiplications.

    Args:
        x_BCHW: B x C x h x w.
        conv: 3x3, stride 1, padding 1, with bias.
        scale: whole factor, 1 or more.

    Returns:
        B x O x (scale h) x (scale w).
    """
    if scale == 1:
        return F.conv2d(x_BCHW, conv.weight, conv.bias, padding=1)
    if exchange_pays(conv.in_channels, conv.out_channels, x_BCHW.shape[-2:], scale):
        return conv_then_upsample(x_BCHW, conv.weight, conv.bias, scale)
    return upsample_then_conv(x_BCHW, conv.weight, conv.bias, scale)


def exchange_pays(
    in_channels: int, out_channels: int, size: tuple[int, int] | torch.Size, scale: int
) -> bool:
    """Return True if convolving first needs fewer multiplications for a map of `size` (h, w).

    The matrices are banded but multiplied as dense ones: no gain for large maps and scale 2.
    """
    height, width = size
    pixels = scale**2 * height * width
    upsample_first = 9 * in_channels * out_channels * pixels
    low_resolution = 9 * in_channels * out_channels * height * width
    rows = scale * height * 3 * height * width * 3 * out_channels
    columns = pixels * 3 * width * out_channels
    return low_resolution + rows + columns < upsample_first


def upsample_then_conv(x_BCHW: Tensor, weight: Tensor, bias: Tensor | None, scale: int) -> Tensor:
    """Upsample, then convolve; shapes as for `upsample_conv`."""
    x_BCHW = F.interpolate(x_BCHW, scale_factor=scale, mode="bilinear", align_corners=False)
    return F.conv2d(x_BCHW, weight, bias, padding=1)


def conv_then_upsample(x_BCHW: Tensor, weight: Tensor, bias: Tensor | None, scale: int) -> Tensor:
    """Convolve, then upsample, as three matrix products; shapes as for `upsample_conv`."""
    batch, in_channels, height, width = x_BCHW.shape
    out_channels = weight.shape[0]
    rows = shifted_upsampling(height, scale, x_BCHW).permute(1, 0, 2).flatten(1)
    columns = shifted_upsampling(width, scale, x_BCHW).permute(1, 2, 0).flatten(1)

    x = x_BCHW.permute(2, 0, 3, 1).reshape(1, -1, in_channels)  # 1, (h B w), C
    taps = weight.permute(2, 1, 3, 0).reshape(3, in_channels, -1)  # v, C, (u O)
    x = torch.bmm(x.expand(3, -1, -1), taps)  # v, (h B w), (u O)
    x = torch.mm(rows, x.reshape(3 * height, -1))  # H, (B w u O)
    x = x.view(-1, 3 * width, out_channels)  # (H B), (w u), O
    x = torch.bmm(columns.expand(len(x), -1, -1), x)  # (H B), W, O
    if bias is not None:
        x = x.add_(bias)
    return x.view(-1, batch, scale * width, out_channels).permute(1, 3, 0, 2)


def shifted_upsampling(size: int, scale: int, like: Tensor) -> Tensor:
    """Return linear upsampling of `size` points as matrices, shifted by the taps -1, 0 and 1.

    Returns:
        3 x (scale size) x size: [t, y, n] is the weight of point n at position y + t - 1; zero
        beyond the ends.
    """
    identity = torch.eye(size, dtype=like.dtype, device=like.device)
    up = F.interpolate(identity[None], scale_factor=scale, mode="linear", align_corners=False)[0]
    return torch.stack([F.pad(up, (-tap, tap)).T for tap in (-1, 0, 1)])
