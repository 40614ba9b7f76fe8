"""Multi-scale structural similarity (Wang et al., Asilomar 2003), with a backward pass of its own.

Shapes: B batch, C channels, H W pixels, h w positions at which the window fits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

# Weights of the five scales, then the usual constants of SSIM.
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
SSIM_C1 = 0.01**2
SSIM_C2 = 0.03**2
SSIM_SIGMA = 1.5
LARGEST_WINDOW = 11
SMALLEST_WINDOW = 3
SMALLEST_SIDE = 32
CONTRAST_FLOOR = 1e-4


def ms_ssim_window(side: int) -> tuple[int, int]:
    """Return window (pixels) and number of scales of MS-SSIM for images with this smaller side.

    From 176 px on the window is the published 11 px. For smaller images it is the largest odd
    window that fits the fifth scale (sides halve, rounding up), at least 3 px. Below 33 px even
    that does not fit: the fifth scale is left out and the other weights are scaled to sum to 1.

    Raises:
        ValueError: the side is below 32 px.
    """
    if side < SMALLEST_SIDE:
        raise ValueError(
            f"MS-SSIM needs images of at least {SMALLEST_SIDE} pixels a side, got {side}: "
            "use larger slices, or leave ms_ssim out of the loss's terms"
        )
    coarsest = -(-side // 2 ** (len(MS_SSIM_WEIGHTS) - 1))
    if coarsest < SMALLEST_WINDOW:
        return SMALLEST_WINDOW, len(MS_SSIM_WEIGHTS) - 1
    return min(LARGEST_WINDOW, coarsest - 1 + coarsest % 2), len(MS_SSIM_WEIGHTS)


def ms_ssim(p: Tensor, target: Tensor) -> Tensor:
    """Return the multi-scale structural similarity of maps in [0, 1] (Wang et al., 2003).

    Gaussian window with sigma 1.5; window size and number of scales as in `ms_ssim_window`.

    Args:
        p: B x C x H x W or C x H x W; on a CPU fastest with channels last in memory.
        target: of the same shape, or with C / S channels, which are then repeated S times; their
            moments are computed once. It gets no gradient.

    Returns:
        B x C or C, in (0, 1].
    """
    window, num_scales = ms_ssim_window(min(p.shape[-2:]))
    target = target.to(p.dtype)
    mean_contrast = cast(Callable[..., Tensor], MeanContrast.apply)
    similarity = torch.ones((), dtype=p.dtype, device=p.device)
    weights = MS_SSIM_WEIGHTS[:num_scales]
    for scale, weight in enumerate(weights):
        if scale < num_scales - 1:
            term = mean_contrast(p, target, window)
            p, target = _halve(p), _halve(target)
        else:
            term = _mean_structure(p, target, window)
        # The term can be negative, and its power then NaN.
        similarity = similarity * term.clamp(min=CONTRAST_FLOOR) ** (weight / sum(weights))
    return similarity


class MeanContrast(torch.autograd.Function):
    """Contrast and structure of SSIM, mean over the h x w positions of the window.

    (2 cov(p, g) + C2) / (var(p) + var(g) + C2). Differentiated step by step, this would store and
    read each map many times.
    """

    @staticmethod
    def forward(ctx: Any, p: Tensor, g: Tensor, window: int) -> Tensor:
        """Maps as for `ms_ssim`, and the window's side in pixels -> B x C or C."""
        mean_g = smooth(g, window)
        spread_g = smooth(g * g, window) - mean_g**2 + SSIM_C2
        g, mean_g, spread_g = (repeat_channels(each, p) for each in (g, mean_g, spread_g))
        mean_p = smooth(p, window)
        covariance = smooth(p * g, window).addcmul_(mean_p, mean_g, value=-1)
        spread = smooth(p * p, window).addcmul_(mean_p, mean_p, value=-1).add_(spread_g)
        contrast = covariance.mul_(2).add_(SSIM_C2).div_(spread)
        ctx.save_for_backward(p, g, mean_p, mean_g, spread, contrast)
        ctx.window = window
        return contrast.mean(dim=(-2, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of p: sums over the window of the gradients of its moments."""
        p, g, mean_p, mean_g, spread, contrast = ctx.saved_tensors
        of_product = spread.reciprocal().mul_(2)  # of smooth(p g), and so on
        of_square = (of_product * contrast).mul_(-0.5)
        of_mean = (mean_p * of_square).mul_(-2).addcmul_(mean_g, of_product, value=-1)
        gp = spread_out(of_mean, ctx.window).addcmul_(g, spread_out(of_product, ctx.window))
        gp.addcmul_(p, spread_out(of_square, ctx.window), value=2)
        return gp.mul_(grad[..., None, None] / contrast.shape[-2:].numel()), None, None


def _mean_structure(p: Tensor, g: Tensor, window: int) -> Tensor:
    """Return luminance times contrast, mean over positions; arguments as for `ms_ssim`."""
    g = repeat_channels(g, p)
    mean_p, mean_g = smooth(p, window), smooth(g, window)
    covariance = smooth(p * g, window) - mean_p * mean_g
    spread = smooth(p * p, window) + smooth(g * g, window) - mean_p**2 - mean_g**2
    luminance = (2 * mean_p * mean_g + SSIM_C1) / (mean_p**2 + mean_g**2 + SSIM_C1)
    contrast = (2 * covariance + SSIM_C2) / (spread + SSIM_C2)
    return (luminance * contrast).mean(dim=(-2, -1))


def smooth(x: Tensor, window: int) -> Tensor:
    """Average over a Gaussian window wherever it fits: ... x H x W -> ... x h x w."""
    return _filter(x, window, padding=0)


def spread_out(x: Tensor, window: int) -> Tensor:
    """Apply the transpose of `smooth`: ... x h x w -> ... x H x W."""
    return _filter(x, window, padding=window - 1)


def _filter(x: Tensor, window: int, padding: int) -> Tensor:
    """Sum over a Gaussian window, rows, then columns, zeros around."""
    offset = torch.arange(window, device=x.device) - window // 2
    weight = torch.exp(-(offset**2) / (2 * SSIM_SIGMA**2)).to(x.dtype)
    weight = (weight / weight.sum()).expand(x.shape[-3], 1, 1, window)
    # On a GPU cuDNN would round to TF32, and differences of near-equal numbers need more.
    with torch.backends.cudnn.flags(enabled=False):
        x = F.conv2d(x, weight.mT, padding=(padding, 0), groups=len(weight))
        return F.conv2d(x, weight, padding=(0, padding), groups=len(weight))


def repeat_channels(x: Tensor, like: Tensor) -> Tensor:
    """Repeat all channels of x, in turn, until there are as many as `like` has."""
    times = like.shape[-3] // x.shape[-3]
    return x if times == 1 else torch.cat([x] * times, dim=-3)


def _halve(x: Tensor) -> Tensor:
    """Average 2 x 2 pixels; an odd last row or column is averaged alone."""
    return F.avg_pool2d(x, 2, ceil_mode=True)
