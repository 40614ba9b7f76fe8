"""A 3x3 convolution of a bilinearly upsampled map, computed in the exchanged order.

Both operations are linear, so with t running over the nine taps

    conv(up(x)) = sum over t of shift_t(up(W_t x)),

where W_t x is a 1x1 convolution at the low resolution. Bilinear upsampling is separable, and
"upsample, then shift, zeros coming in" is one small matrix per axis and tap: the three horizontal
taps are summed by products with w x (scale w) matrices, the three vertical ones by products with
(scale h) x h matrices. The zeros that come in are the convolution's padding, so borders are exact.

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
    """Convolve, then upsample, as matrix products; shapes as for `upsample_conv`.

    In memory the result is O x B x H x W. In this order each product is a large one, and no map
    is copied from one layout to another in between.
    """
    batch, in_channels, height, width = x_BCHW.shape
    x = x_BCHW.permute(0, 2, 3, 1).reshape(-1, in_channels)  # (B h w), C
    taps = weight.permute(3, 2, 0, 1).reshape(-1, in_channels)  # (u v O), C
    x = torch.mm(taps, x.T).view(3, -1, width)  # u, (v O B h), w
    rows, columns = (shifted_upsampling(size, scale, x) for size in (height, width))
    x = sum_of_products(x, columns.mT).view(3, -1, height, scale * width)  # v, (O B), h, W
    x = sum_of_products(rows.unsqueeze(1).expand(-1, x.shape[1], -1, -1), x)  # (O B), H, W
    x = x.view(-1, batch, scale * height, scale * width)
    if bias is not None:
        x = x.add_(bias[:, None, None, None])
    return x.transpose(0, 1)


def sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """Return a[0] @ b[0] + a[1] @ b[1] + ... for stacks of matrices or of batches of matrices."""
    first, *others = zip(a.unbind(0), b.unbind(0), strict=True)
    total = torch.matmul(*first)
    for pair in others:
        total = total.addmm_(*pair) if total.ndim == 2 else total.baddbmm_(*pair)
    return total


def shifted_upsampling(size: int, scale: int, like: Tensor) -> Tensor:
    """Return linear upsampling of `size` points as matrices, shifted by the taps -1, 0 and 1.

    Returns:
        3 x (scale size) x size: [t, y, n] is the weight of point n at position y + t - 1; zero
        beyond the ends.
    """
    identity = torch.eye(size, dtype=like.dtype, device=like.device)
    up = F.interpolate(identity[None], scale_factor=scale, mode="linear", align_corners=False)[0]
    return torch.stack([F.pad(up, (-tap, tap)).T for tap in (-1, 0, 1)])
