"""Parts that the networks share.

Shapes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.batchnorm import norm_relu
from model.synchronised import SynchronisedNorm

RECOMPUTE_FROM_BYTES = 16 * 2**20


class Recomputing(nn.Module):
    """A module that can compute large maps again in the backward pass instead of keeping them.

    Attributes:
        recompute_from_bytes: size of a map from which it does so; None = never.
    """

    recompute_from_bytes: int | None = RECOMPUTE_FROM_BYTES


class ConvBlock(nn.Module):
    """Convolution (3x3 unless told otherwise, same size), batch norm (or none), ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        dilation: int = 1,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
        )
        self.norm: nn.Module = nn.BatchNorm2d(out_channels) if norm else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """B x C x H x W -> B x out_channels x H x W."""
        return norm_relu(self.norm, self.conv(x_BCHW))

    def fold_norms(self) -> None:
        """Move the batch norm (in eval mode) into the convolution."""
        fold_norm([self.conv], self.norm)
        self.norm = nn.Identity()


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
            bias=False,
        )
        self.norm: nn.Module = nn.BatchNorm2d(out_channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """B x C x H x W -> B x out_channels x (H / stride) x (W / stride)."""
        return cast(Tensor, self.norm(self.conv(x_BCHW)))

    def fold_norms(self) -> None:
        """Move the batch norm (in eval mode) into the convolution."""
        fold_norm([self.conv], self.norm)
        self.norm = nn.Identity()


class DoubleConv(nn.Sequential, Recomputing):
    """Two convolution blocks: one level of a plain encoder or decoder."""

    def __init__(
        self, in_channels: int, out_channels: int, *, dilation: int = 1, norm: bool = True
    ) -> None:
        super().__init__(
            ConvBlock(in_channels, out_channels, dilation=dilation, norm=norm),
            ConvBlock(out_channels, out_channels, dilation=dilation, norm=norm),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """B x C x H x W -> B x out_channels x H x W."""
        first, second = cast(tuple[ConvBlock, ConvBlock], tuple(self))
        x = first.conv(x_BCHW)
        x = norm_relu_then(first.norm, second.conv, x, self.recompute_from_bytes)
        return norm_relu(second.norm, x)


def norm_relu_then(
    norm: nn.Module, conv: nn.Module, x_BCHW: Tensor, recompute_from_bytes: int | None
) -> Tensor:
    """conv(relu(norm(x))), which of a large map keeps only x for the backward pass.

    The ReLU's result is computed again from x there, which costs little beside the convolution.
    `torch.compile` decides such things for itself.
    """
    # Processes may differ in which maps they compute again: what they exchange comes before.
    normalise = norm.for_batch(x_BCHW) if isinstance(norm, SynchronisedNorm) else norm

    def run(x: Tensor) -> Tensor:
        return cast(Tensor, conv(norm_relu(normalise, x)))

    if (
        not torch.compiler.is_compiling()  # which knows no nbytes while sizes are symbols
        and isinstance(norm, nn.BatchNorm2d)
        and torch.is_grad_enabled()
        and recompute_from_bytes is not None
        and x_BCHW.nbytes >= recompute_from_bytes
    ):
        return cast(
            Tensor,
            checkpoint(
                run,
                x_BCHW,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=lambda: (nullcontext(), statistics_kept(norm)),
            ),
        )
    return run(x_BCHW)


@contextmanager
def statistics_kept(norm: nn.BatchNorm2d) -> Iterator[None]:
    """Within, the norm leaves its running statistics alone, so that they count a batch once."""
    kept = dict(norm.named_buffers())
    for name, buffer in kept.items():
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for name, buffer in kept.items():
            setattr(norm, name, buffer)


def join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along channels, channels last in memory."""
    return torch.cat([each.permute(0, 2, 3, 1) for each in parts], dim=-1).permute(0, 3, 1, 2)


@torch.no_grad()
def fold_norm(convs: Sequence[nn.Conv2d], norm: nn.Module) -> None:
    """Fold a batch norm over the joined outputs of `convs` into their weights and biases.

    It is worked out in float64 on the CPU, since not every accelerator has that type.
    """
    if not isinstance(norm, nn.BatchNorm2d):
        return
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        raise ValueError("a batch norm without running statistics cannot be folded")
    weight, shift, mean, var = (each.cpu().double() for each in (norm.weight, norm.bias, mean, var))
    scale = weight * torch.rsqrt(var + norm.eps)
    shift -= mean * scale
    sizes = [conv.out_channels for conv in convs]
    for conv, a, b in zip(convs, torch.split(scale, sizes), torch.split(shift, sizes), strict=True):
        bias = torch.zeros_like(b) if conv.bias is None else conv.bias.cpu().double()
        conv.weight.copy_(conv.weight.cpu().double() * a[:, None, None, None])
        conv.bias = nn.Parameter((bias * a + b).to(conv.weight), requires_grad=False)


class Up(nn.ConvTranspose2d):
    """Learned doubling of the resolution: 4x4 transposed convolution, stride 2."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 4, stride=2, padding=1)


def resize(x_BCHW: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resampling to `size` (H, W), half-pixel centres."""
    if tuple(x_BCHW.shape[-2:]) == tuple(size):
        return x_BCHW
    return F.interpolate(x_BCHW, size=tuple(size), mode="bilinear", align_corners=False)


@torch.no_grad()
def initialise(net: nn.Module) -> None:
    """Kaiming-normal convolutions (fan in), zero biases, identity batch norms.

    The fan of a transposed convolution is what one output pixel sees: in_channels x (4 / 2)^2.
    """
    for module in net.modules():
        if isinstance(module, nn.ConvTranspose2d):
            taps = module.weight[0, 0].numel() / (module.stride[0] * module.stride[1])
            nn.init.normal_(module.weight, std=(module.in_channels * taps) ** -0.5)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
