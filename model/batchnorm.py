"""Batch norm and ReLU for training on the CPU with channels-last memory.

In that layout torch adds up all values of a channel in a single float32 sum: at 320 x 320 the
relative error is 1e-5 in the statistics and 1e-3 in the gradients of a deep network. This module
sums each column of pixels separately and combines the columns. That is as accurate as torch with
channels first, and no slower.

Shapes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


def norm_relu(norm: Callable[[Tensor], Tensor], x_BCHW: Tensor) -> Tensor:
    """Return relu(norm(x)); x may be overwritten, so nothing else may need it."""
    # A subclass, such as SynchronisedNorm, has its own statistics.
    if type(norm) is nn.BatchNorm2d and _needs_exact_sums(norm, x_BCHW):
        apply = cast(Callable[..., Tensor], BatchNormReLU.apply)
        return apply(x_BCHW, norm.weight, norm.bias, norm)
    return F.relu(norm(x_BCHW), inplace=True)


def _needs_exact_sums(norm: nn.BatchNorm2d, x_BCHW: Tensor) -> bool:
    """Return True where torch's own sums are inaccurate and `BatchNormReLU` applies."""
    return (
        norm.training
        and norm.momentum is not None
        and x_BCHW.device.type == "cpu"
        and x_BCHW.dtype == norm.weight.dtype
        and x_BCHW.numel() > x_BCHW.shape[1]
        and x_BCHW.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
    )


def by_column(x_BCHW: Tensor) -> Tensor:
    """View a channels-last map as a matrix, (B H) x (W C)."""
    batch, channels, height, width = x_BCHW.shape
    return x_BCHW.permute(0, 2, 3, 1).reshape(batch * height, width * channels)


def batch_statistics(x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each channel, divided by the number of values; 0 if empty."""
    channels = x_BCHW.shape[1]
    if x_BCHW.numel() == 0:
        return x_BCHW.new_zeros(channels), x_BCHW.new_zeros(channels)
    # Each (column, channel) pair is passed as one channel: short sums, little rounding.
    means, variances = torch.ops.aten.batch_norm_update_stats(by_column(x_BCHW), None, None, 0.0)
    means, variances = means.view(-1, channels), variances.view(-1, channels)
    return means.mean(dim=0), variances.mean(dim=0) + means.var(dim=0, correction=0)


class BatchNormReLU(torch.autograd.Function):
    """relu(batch_norm(x)) with batch statistics; updates the norm's running statistics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        """Channels-last B x C x H x W -> the same shape."""
        num_values = x.numel() // x.shape[1]
        mean, variance = batch_statistics(x)
        if norm.running_mean is not None and norm.running_var is not None:
            momentum = cast(float, norm.momentum)
            norm.running_mean.lerp_(mean, momentum)
            norm.running_var.lerp_(variance * num_values / (num_values - 1), momentum)
            cast(Tensor, norm.num_batches_tracked).add_(1)
        y = F.batch_norm(x, mean, variance, weight, bias, training=False, eps=norm.eps).relu_()
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(variance + norm.eps), y)
        ctx.eps = norm.eps
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the gradients of x, weight and bias; None for the norm."""
        x, weight, mean, inverse, y = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
        gx, gw, gb = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, inverse, True, ctx.eps, (True, True, True)
        )
        return gx, gw, gb, None
