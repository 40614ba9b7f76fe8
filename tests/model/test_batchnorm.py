from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from model.batchnorm import BatchNormReLU, batch_statistics, by_column, norm_relu


def shaken(channels: int, dtype: torch.dtype = torch.float64) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels).to(dtype)
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    return norm


def channels_last(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "shape", [(2, 3, 4, 5), (1, 4, 7, 2), (3, 2, 1, 1), (1, 1, 1, 2), (5, 3, 8, 8)]
)
def test_output_gradients_and_statistics_equal_torch(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    norm = shaken(shape[1])
    other = copy.deepcopy(norm)
    x = channels_last(*shape).requires_grad_()
    seed = torch.randn_like(x)
    y, expected = norm_relu(norm, x), F.relu(other(x))
    torch.testing.assert_close(y, expected)
    inputs = [x, norm.weight, norm.bias], [x, other.weight, other.bias]
    found, wanted = (
        torch.autograd.grad((each * seed).sum(), of)
        for each, of in zip((y, expected), inputs, strict=True)
    )
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two)
    for one, two in zip(norm.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(one, two)


def test_own_sums_are_used_for_channels_last_training() -> None:
    x = channels_last(2, 3, 4, 4).requires_grad_()
    assert isinstance(norm_relu(shaken(3), x).grad_fn, BatchNormReLU._backward_cls)
    assert not isinstance(norm_relu(shaken(3).eval(), x * 1).grad_fn, BatchNormReLU._backward_cls)
    first = x.contiguous() * 1
    assert not isinstance(norm_relu(shaken(3), first).grad_fn, BatchNormReLU._backward_cls)


def test_evaluation_uses_the_running_statistics() -> None:
    norm = shaken(3).eval()
    x = channels_last(2, 3, 4, 4)
    torch.testing.assert_close(norm_relu(norm, x.clone()), F.relu(norm(x)))


def test_norm_that_is_none_leaves_the_relu() -> None:
    x = channels_last(1, 2, 3, 3)
    assert torch.equal(norm_relu(nn.Identity(), x.clone()), x.clamp(min=0))


def test_single_value_per_channel_is_refused_by_torch() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm_relu(shaken(2), channels_last(1, 2, 1, 1))


def test_columns_share_the_maps_memory() -> None:
    x = channels_last(2, 3, 4, 5)
    columns = by_column(x)
    assert columns.shape == (8, 15)
    assert columns.data_ptr() == x.data_ptr()
    assert columns[5, 7] == x[1, 1, 1, 2]


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 4, 7, 2), (1, 1, 1, 1), (5, 3, 8, 8)])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_statistics_are_those_of_each_channel(
    shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=memory_format) + 3
    mean, variance = batch_statistics(x)
    torch.testing.assert_close(mean, x.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(variance, x.var(dim=(0, 2, 3), correction=0))


def test_statistics_of_no_sample_are_zero() -> None:
    for each in batch_statistics(torch.zeros(0, 3, 4, 4)):
        assert torch.equal(each, torch.zeros(3))


def test_statistics_of_a_large_map_are_exact_to_float32() -> None:
    torch.manual_seed(0)
    x = channels_last(1, 8, 256, 256, dtype=torch.float32) * 0.5 + 1
    norm = nn.BatchNorm2d(8)
    norm_relu(norm, x)
    mean = x.double().mean(dim=(0, 2, 3))
    assert (norm.running_mean.double() / 0.1 - mean).abs().max() < 1e-6
    variance = x.double().var(dim=(0, 2, 3))
    assert ((norm.running_var.double() - 0.9) / 0.1 - variance).abs().max() < 2e-6


def test_gradient_passes_gradcheck() -> None:
    norm = shaken(2)
    x = channels_last(2, 2, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *each: BatchNormReLU.apply(*each, copy.deepcopy(norm)), [x, norm.weight, norm.bias]
    )
