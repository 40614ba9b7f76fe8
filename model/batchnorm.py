"""Batch norm and ReLU for training on the CPU with channels last in memory.

There torch sums each channel one value after the other in float32, over every pixel of the batch:
at 320 x 320 the statistics are wrong by 1e-5 of their size and gradients of a deep network by
1e-3. Here each column of pixels is summed apart and the columns are put together, which is as exact
as torch is with channels first, and no slower.

Shapes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


def norm_relu(norm: Callable[[Tensor], Tensor], x_BCHW: Tensor) -> Tensor:
    """ReLU of the norm of a map that nothing else needs: it may be overwritten."""
    # A subclass sums in its own way.
    if type(norm) is nn.BatchNorm2d and _sums_badly(norm, x_BCHW):
        apply = cast(Callable[..., Tensor], BatchNormReLU.apply)
        return apply(x_BCHW, norm.weight, norm.bias, norm)
    return F.relu(norm(x_BCHW), inplace=True)


def _sums_badly(norm: nn.BatchNorm2d, x_BCHW: Tensor) -> bool:
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
    """A channels-last map as a matrix, (B H) x (W C), in the same memory."""
    batch, channels, height, width = x_BCHW.shape
    return x_BCHW.permute(0, 2, 3, 1).reshape(batch * height, width * channels)


def batch_statistics(x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (divided by the number of values) of each channel; 0 of an empty batch."""
    channels = x_BCHW.shape[1]
    if x_BCHW.numel() == 0:
        return x_BCHW.new_zeros(channels), x_BCHW.new_zeros(channels)
    means, variances = torch.ops.aten.batch_norm_update_stats(by_column(x_BCHW), None, None, 0.0)
    means, variances = means.view(-1, channels), variances.view(-1, channels)
    return means.mean(dim=0), variances.mean(dim=0) + means.var(dim=0, correction=0)


class BatchNormReLU(torch.autograd.Function):
    """relu(batch_norm(x)) with batch statistics; also updates the norm's running ones."""

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
        """Gradients of x, weight and bias."""
        x, weight, mean, inverse, y = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
        gx, gw, gb = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, inverse, True, ctx.eps, (True, True, True)
        )
        return gx, gw, gb, None
