from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model.upsampling import (
    conv_then_upsample,
    exchange_pays,
    shifted_upsampling,
    upsample_conv,
    upsample_then_conv,
)


def test_upsampling_by_two_has_the_half_pixel_weights() -> None:
    up = shifted_upsampling(3, 2, torch.zeros(()))
    centre = [
        [1.0, 0.0, 0.0],
        [0.75, 0.25, 0.0],
        [0.25, 0.75, 0.0],
        [0.0, 0.75, 0.25],
        [0.0, 0.25, 0.75],
        [0.0, 0.0, 1.0],
    ]
    assert up[1].tolist() == centre
    assert up[0].tolist() == [[0.0, 0.0, 0.0], *centre[:-1]]
    assert up[2].tolist() == [*centre[1:], [0.0, 0.0, 0.0]]


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 3),
    in_channels=st.integers(1, 5),
    out_channels=st.integers(1, 4),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    scale=st.sampled_from([2, 3, 4, 8, 16]),
    channels_last=st.booleans(),
)
def test_both_orders_are_the_same_function(
    batch: int,
    in_channels: int,
    out_channels: int,
    height: int,
    width: int,
    scale: int,
    channels_last: bool,
) -> None:
    x = torch.randn(batch, in_channels, height, width, dtype=torch.float64)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    weight = torch.randn(out_channels, in_channels, 3, 3, dtype=torch.float64)
    bias = torch.randn(out_channels, dtype=torch.float64)
    torch.testing.assert_close(
        conv_then_upsample(x, weight, bias, scale), upsample_then_conv(x, weight, bias, scale)
    )


def test_both_orders_have_the_same_gradients() -> None:
    shapes = [(2, 3, 4, 5), (2, 3, 3, 3), (2,)]
    first = [torch.randn(each, dtype=torch.float64, requires_grad=True) for each in shapes]
    second = [each.detach().clone().requires_grad_() for each in first]
    seed = torch.randn(2, 2, 16, 20, dtype=torch.float64)
    (conv_then_upsample(*first, 4) * seed).sum().backward()
    (upsample_then_conv(*second, 4) * seed).sum().backward()
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_exchanged_order_passes_gradcheck() -> None:
    inputs = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in [(1, 2, 2, 3), (2, 2, 3, 3), (2,)]
    ]
    assert torch.autograd.gradcheck(lambda *each: conv_then_upsample(*each, 2), inputs)


def test_exchanged_order_without_a_bias() -> None:
    x, weight = torch.randn(1, 3, 4, 4).double(), torch.randn(2, 3, 3, 3).double()
    torch.testing.assert_close(
        conv_then_upsample(x, weight, None, 2), upsample_then_conv(x, weight, None, 2)
    )


@pytest.mark.parametrize(
    ("in_channels", "out_channels", "side", "scale", "pays"),
    [
        (1024, 64, 20, 16, True),
        (320, 64, 40, 8, True),
        (320, 64, 80, 4, True),
        (320, 64, 160, 2, True),
        (40, 8, 32, 2, True),
        (80, 16, 160, 2, False),
        (40, 8, 160, 2, False),
    ],
)
def test_exchange_pays_where_multiplications_are_saved(
    in_channels: int, out_channels: int, side: int, scale: int, pays: bool
) -> None:
    assert exchange_pays(in_channels, out_channels, (side, side), scale) == pays


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize(("in_channels", "side"), [(2, 40), (64, 5)])
def test_upsample_conv_is_the_convolution_of_the_upsampled_map(
    in_channels: int, side: int, scale: int
) -> None:
    conv = nn.Conv2d(in_channels, 3, 3, padding=1).double()
    x = torch.randn(2, in_channels, side, side + 1, dtype=torch.float64)
    up = nn.Upsample(scale_factor=scale, mode="bilinear", align_corners=False)
    torch.testing.assert_close(upsample_conv(x, conv, scale), conv(up(x)))


def test_exchanged_order_in_autocast_gives_the_low_precision() -> None:
    conv = nn.Conv2d(64, 4, 3, padding=1)
    x = torch.randn(1, 64, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = upsample_conv(x, conv, 8)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), upsample_conv(x, conv, 8), atol=0.1, rtol=0.05)
