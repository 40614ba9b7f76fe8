"""Batch norm over the samples of all training processes.

Each process holds a part of the batch. The statistics are combined, so that training on several
processes gives, up to rounding, the same curve as one process with the whole batch.
torch.nn.SyncBatchNorm is not used: it supports CUDA only, is no subclass of BatchNorm2d, so it
would not be folded, and repeats its exchange where a map is recomputed in the backward pass.

All processes must run the same norms in the same order. Their numbers of samples may differ and
may be 0. In eval mode nothing is exchanged.

Shapes: R processes, B batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.batchnorm import batch_statistics


def synchronise_norms(network: nn.Module) -> None:
    """Convert every BatchNorm2d of a network to `SynchronisedNorm`, in place.

    Weights, state dict and eval mode do not change. Without `torch.distributed`, or with a single
    process, the call has no effect; neither has a second call.

    Gradients follow the convention of DistributedDataParallel: each process computes its own share
    of the gradients of a norm's weight and bias, and their sum over processes is the gradient of
    the sum of the processes' losses. The gradient of the input is complete.

    Raises:
        ValueError: a norm has no weights, running statistics or momentum.
    """
    if num_processes() == 1:
        return
    for name, module in network.named_modules():
        if type(module) is not nn.BatchNorm2d:
            continue
        if not module.affine or not module.track_running_stats or module.momentum is None:
            raise ValueError(
                f"batch norm {name!r} cannot be synchronised: it needs weights, running "
                f"statistics and a momentum, found {module}"
            )
        # The object is kept, because an optimiser may already hold its parameters.
        module.__class__ = SynchronisedNorm


def num_processes() -> int:
    """Return the number of processes in the default group; 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Statistics(NamedTuple):
    """Statistics of one batch over all processes.

    Attributes:
        mean: one value per channel, C.
        variance: one value per channel, C; divided by `num_values`.
        num_values: values of a channel over all processes, a scalar.
    """

    mean: Tensor
    variance: Tensor
    num_values: Tensor


class SynchronisedNorm(nn.BatchNorm2d):
    """BatchNorm2d with batch statistics over all processes."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """B x C x H x W -> the same shape."""
        return self.for_batch(x_BCHW)(x_BCHW)

    def for_batch(self, x_BCHW: Tensor) -> Callable[[Tensor], Tensor]:
        """Exchange statistics, update the running ones, and return the norm of this batch.

        The returned function communicates and updates nothing, so it may be called again when a
        map is recomputed.
        """
        if not self.training or num_processes() == 1:
            return super().forward
        statistics = joint_statistics(x_BCHW)
        self._count(statistics)
        apply = cast(Callable[..., Tensor], Normalise.apply)
        return lambda x: apply(x, self.weight, self.bias, self.eps, *statistics)

    @torch.no_grad()
    def _count(self, batch: Statistics) -> None:
        mean, variance = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
        momentum = cast(float, self.momentum)
        mean.lerp_(batch.mean.to(mean), momentum)
        unbiased = batch.variance * batch.num_values / (batch.num_values - 1)
        variance.lerp_(unbiased.to(variance), momentum)
        cast(Tensor, self.num_batches_tracked).add_(1)


@torch.no_grad()
def joint_statistics(x_BCHW: Tensor) -> Statistics:
    """Return mean and variance over the values of all processes, bit-identical on each.

    Chan et al., 1979: avoids the cancellation of E[x^2] - E[x]^2.
    """
    channels = x_BCHW.shape[1]
    dtype = torch.promote_types(x_BCHW.dtype, torch.float32)
    mean, variance = (each.to(dtype) for each in batch_statistics(x_BCHW))
    own = torch.cat([mean, variance, mean.new_tensor([x_BCHW.numel() // channels])])
    # all_gather, not all_reduce: every process then adds in the same order.
    gathered = [torch.empty_like(own) for _ in range(num_processes())]
    dist.all_gather(gathered, own)
    all_RN = torch.stack(gathered)
    mean_RC, variance_RC = all_RN[:, :channels], all_RN[:, channels:-1]
    num_values_R1 = all_RN[:, -1:]
    total = num_values_R1.sum()
    share_R1 = num_values_R1 / total
    mean = (share_R1 * mean_RC).sum(dim=0)
    variance = (share_R1 * (variance_RC + (mean_RC - mean) ** 2)).sum(dim=0)
    return Statistics(mean, variance, total)


class Normalise(torch.autograd.Function):
    """(x - mean) / deviation * weight + bias with the joint statistics of all processes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        mean: Tensor,
        variance: Tensor,
        num_values: Tensor,
    ) -> Tensor:
        """B x C x H x W -> the same shape, channels last."""
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(variance + eps), num_values)
        ctx.eps = eps
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias; sums for x's go over all processes."""
        x, weight, mean, inverse, num_values = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        gw, gb = torch.zeros_like(weight), torch.zeros_like(weight)
        if len(x) > 0:  # torch divides by the number of samples
            _, gw, gb = torch.ops.aten.native_batch_norm_backward(
                grad, x, weight, None, None, mean, inverse, True, ctx.eps, (False, True, True)
            )
        sums = torch.stack([gw, gb])
        dist.all_reduce(sums)
        mean_gw, mean_gb = sums / num_values
        # gx = scale (grad - mean_gb - (x - mean) inverse mean_gw), as a sum of three terms
        scale = weight * inverse
        slope = -scale * inverse * mean_gw
        constant = -scale * mean_gb - slope * mean
        scale, slope, constant = (each[:, None, None] for each in (scale, slope, constant))
        gx = torch.addcmul(constant, x, slope).addcmul_(grad, scale)
        return gx.to(x), gw, gb, None, None, None, None
