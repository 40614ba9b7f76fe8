"""Batch norm over the samples of every training process.

Each process holds a part of the batch. Their statistics are joined, so that training on several
processes gives the curve of one with the whole batch, to rounding. torch has the same for CUDA
only, as a class that is no BatchNorm2d and would escape folding, and whose exchange is repeated
where a map is computed again in the backward pass.

Every process must run the same norms in the same order; how many samples it holds, even none, is
its own affair. In eval mode nothing is exchanged.

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
    """Let every BatchNorm2d of a network see the samples of all processes, in place.

    Weights, state dict and eval mode stay as they are. Without `torch.distributed`, or with a
    single process, nothing changes. A second call changes nothing either.

    Gradients follow the convention of DistributedDataParallel: those of a norm's weight and bias
    are each process's own share, and their sum over processes is the gradient of the sum of the
    processes' losses. The gradient of the input is complete.

    Raises:
        ValueError: for a norm without weights, running statistics or momentum.
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
        # The same object, because an optimiser may hold its parameters already.
        module.__class__ = SynchronisedNorm


def num_processes() -> int:
    """Processes in the default group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Statistics(NamedTuple):
    """Of one batch, over all processes.

    Attributes:
        mean: C.
        variance: C, divided by the number of values.
        num_values: of a channel, a scalar.
    """

    mean: Tensor
    variance: Tensor
    num_values: Tensor


class SynchronisedNorm(nn.BatchNorm2d):
    """BatchNorm2d that trains on the statistics of all processes."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """B x C x H x W -> the same shape."""
        return self.for_batch(x_BCHW)(x_BCHW)

    def for_batch(self, x_BCHW: Tensor) -> Callable[[Tensor], Tensor]:
        """The norm for this batch only, as a function that exchanges and counts nothing any more.

        The exchange, and the step of the running statistics, have happened on return.
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
    """Mean and variance over the values of all processes; the same bits on each.

    Joined as by Chan et al., 1979: no squares of large means are subtracted.
    """
    channels = x_BCHW.shape[1]
    dtype = torch.promote_types(x_BCHW.dtype, torch.float32)
    mean, variance = (each.to(dtype) for each in batch_statistics(x_BCHW))
    own = torch.cat([mean, variance, mean.new_tensor([x_BCHW.numel() // channels])])
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
    """(x - mean) / deviation * weight + bias, where the statistics depend on every process's x."""

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
        """Gradients of x, of which each process's sums are exchanged, weight and bias."""
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
