"""Building blocks that the networks share.

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

# Recomputing smaller maps saves too little memory to be worth the time.
RECOMPUTE_FROM_BYTES = 16 * 2**20


class Recomputing(nn.Module):
    """A module that recomputes large maps in the backward pass instead of storing them.

    Attributes:
        recompute_from_bytes: smallest size of a map that is recomputed; None = store all.
    """

    recompute_from_bytes: int | None = RECOMPUTE_FROM_BYTES


class ConvNorm(nn.Module):
    """Convolution (padded: stride 1 keeps the size), then batch norm."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
            bias=bias,
        )
        self.norm: nn.Module = nn.BatchNorm2d(out_channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """B x C x H x W -> B x out_channels x (H / stride) x (W / stride)."""
        return cast(Tensor, self.norm(self.conv(x_BCHW)))

    def fold_norms(self) -> None:
        """Move the batch norm (in eval mode) into the convolution."""
        fold_norm([self.conv], self.norm)
        self.norm = nn.Identity()


class ConvBlock(ConvNorm):
    """Convolution with bias, batch norm (optional), ReLU; same size."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        dilation: int = 1,
        norm: bool = True,
    ) -> None:
        # Batch norm makes the bias redundant; the UNet 3+ authors' program has it all the same,
        # and its checkpoints hold it.
        super().__init__(in_channels, out_channels, kernel_size, dilation=dilation, bias=True)
        if not norm:
            self.norm = nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """B x C x H x W -> B x out_channels x H x W."""
        return norm_relu(self.norm, self.conv(x_BCHW))


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
    """Return conv(relu(norm(x))), storing only x for the backward pass if the map is large.

    The backward pass recomputes the ReLU's result from x, which is cheap compared with the
    convolution. Under `torch.compile` the compiler decides what to recompute.
    """
    # A process whose part of the batch is smaller may not recompute. The exchange of statistics
    # must not be inside what is recomputed, or such a process would not take part in it.
    normalise = norm.for_batch(x_BCHW) if isinstance(norm, SynchronisedNorm) else norm

    def run(x: Tensor) -> Tensor:
        return cast(Tensor, conv(norm_relu(normalise, x)))

    if (
        not torch.compiler.is_compiling()  # nbytes is unknown while sizes are symbols
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
                preserve_rng_state=False,  # nothing random is recomputed
                context_fn=lambda: (nullcontext(), preserve_statistics(norm)),
            ),
        )
    return run(x_BCHW)


@contextmanager
def preserve_statistics(norm: nn.BatchNorm2d) -> Iterator[None]:
    """Restore the norm's running statistics on exit, so that a batch is counted once."""
    kept = dict(norm.named_buffers())
    for name, buffer in kept.items():
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for name, buffer in kept.items():
            setattr(norm, name, buffer)


def join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate maps along channels, channels last in memory."""
    return torch.cat([each.permute(0, 2, 3, 1) for each in parts], dim=-1).permute(0, 3, 1, 2)


@torch.no_grad()
def fold_norm(convs: Sequence[nn.Conv2d], norm: nn.Module) -> None:
    """Fold a batch norm over the concatenated outputs of `convs` into their weights and biases.

    Raises:
        ValueError: the norm has no running statistics.
    """
    if not isinstance(norm, nn.BatchNorm2d):
        return
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        raise ValueError("a batch norm without running statistics cannot be folded")
    # In float64, so that folding rounds once; on the CPU, as not every accelerator has float64.
    weight, shift, mean, var = (each.cpu().double() for each in (norm.weight, norm.bias, mean, var))
    scale = weight * torch.rsqrt(var + norm.eps)
    shift -= mean * scale
    sizes = [conv.out_channels for conv in convs]
    for conv, a, b in zip(convs, torch.split(scale, sizes), torch.split(shift, sizes), strict=True):
        bias = torch.zeros_like(b) if conv.bias is None else conv.bias.cpu().double()
        conv.weight.copy_(conv.weight.cpu().double() * a[:, None, None, None])
        conv.bias = nn.Parameter((bias * a + b).to(conv.weight), requires_grad=False)


class Up(nn.ConvTranspose2d):
    """Learned upsampling by 2: 4x4 transposed convolution, stride 2."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 4, stride=2, padding=1)


def resize(x_BCHW: Tensor, size: Sequence[int]) -> Tensor:
    """Resample bilinearly to `size` (H, W), half-pixel centres."""
    if tuple(x_BCHW.shape[-2:]) == tuple(size):
        return x_BCHW
    return F.interpolate(x_BCHW, size=tuple(size), mode="bilinear", align_corners=False)


@torch.no_grad()
def initialise(net: nn.Module) -> None:
    """Initialise convolutions with Kaiming normal (fan in), biases with 0, norms with identity.

    The fan of a transposed convolution is the number of inputs of one output pixel:
    in_channels x (4 / 2)^2. He et al., ICCV 2015.
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
