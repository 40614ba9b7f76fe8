from __future__ import annotations

import pytest
import torch
from pytorch_msssim import ms_ssim as library_ms_ssim

from model.similarity import (
    MeanContrast,
    ms_ssim,
    ms_ssim_window,
    repeat_channels,
    smooth,
    spread_out,
)


@pytest.mark.parametrize(
    ("side", "window", "num_scales"),
    [
        (32, 3, 4),
        (33, 3, 5),
        (47, 3, 5),
        (48, 3, 5),
        (64, 3, 5),
        (65, 5, 5),
        (80, 5, 5),
        (96, 5, 5),
        (97, 7, 5),
        (128, 7, 5),
        (144, 9, 5),
        (160, 9, 5),
        (161, 11, 5),
        (176, 11, 5),
        (320, 11, 5),
        (512, 11, 5),
    ],
)
def test_ms_ssim_window_fits_the_coarsest_scale(side: int, window: int, num_scales: int) -> None:
    assert ms_ssim_window(side) == (window, num_scales)
    coarsest = side
    for _ in range(num_scales - 1):
        coarsest = (coarsest + 1) // 2
    assert window <= coarsest


@pytest.mark.parametrize("side", [31, 16, 1])
def test_ms_ssim_refuses_images_that_are_too_small(side: int) -> None:
    with pytest.raises(ValueError, match=rf"at least 32 pixels a side, got {side}"):
        ms_ssim(torch.rand(1, side, 64), torch.rand(1, side, 64))


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 96), (96, 80), (176, 192)])
def test_ms_ssim_agrees_with_the_library(height: int, width: int) -> None:
    torch.manual_seed(0)
    g = (torch.rand(3, 1, height, width) > 0.5).float()
    p = (0.7 * g + 0.3 * torch.rand_like(g)).clamp(0, 1)
    window = ms_ssim_window(min(height, width))[0]
    expected = library_ms_ssim(p, g, data_range=1, size_average=False, win_size=window)
    torch.testing.assert_close(ms_ssim(p, g).squeeze(1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("p", "g"), [(0.2, 0.6), (0.5, 0.0), (1.0, 0.0), (0.3, 0.3)])
def test_ms_ssim_of_constant_images_is_the_luminance_of_the_last_scale(p: float, g: float) -> None:
    value = ms_ssim(torch.full((1, 64, 64), p, dtype=torch.float64), torch.full((1, 64, 64), g))
    luminance = (2 * p * g + 1e-4) / (p * p + g * g + 1e-4)
    assert value.item() == pytest.approx(max(luminance, 1e-4) ** 0.1333, rel=1e-3)


@pytest.mark.parametrize("side", [32, 33, 34, 35, 48, 63, 100])
def test_ms_ssim_of_an_image_with_itself_is_one(side: int) -> None:
    image = torch.rand(2, side, side + 3)
    torch.testing.assert_close(ms_ssim(image, image), torch.ones(2))


def test_ms_ssim_with_negative_contrast_stays_a_number() -> None:
    board = (torch.arange(64).unsqueeze(0) + torch.arange(64).unsqueeze(1)) % 2
    p = (1.0 - board).unsqueeze(0).requires_grad_()
    value = ms_ssim(p, board.unsqueeze(0))
    value.sum().backward()
    assert 0 < value.item() < 0.9
    assert torch.isfinite(p.grad).all()


def test_window_is_the_normalised_gaussian() -> None:
    point = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    point[..., 2, 2] = 1
    gauss = torch.exp(-(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) ** 2) / 4.5)
    gauss /= gauss.sum()
    torch.testing.assert_close(smooth(point, 3)[0, 0], torch.outer(gauss, gauss))


@pytest.mark.parametrize("shape", [(2, 3, 12, 15), (4, 11, 11)])
def test_spreading_is_the_transpose_of_smoothing(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    seed = torch.randn_like(smooth(x, 5))
    torch.testing.assert_close((smooth(x, 5) * seed).sum(), (x * spread_out(seed, 5)).sum())


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_mean_contrast_passes_gradcheck(channels: int) -> None:
    torch.manual_seed(0)
    p = torch.rand(2, 4, 8, 7, dtype=torch.float64).requires_grad_()
    g = torch.rand(2, channels, 8, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: MeanContrast.apply(x, g, 3), p)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_target_of_fewer_channels_is_repeated(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    p = torch.rand(2, 6, 33, 40).contiguous(memory_format=memory_format)
    g = (torch.rand(2, 2, 33, 40) > 0.5).float().contiguous(memory_format=memory_format)
    together = ms_ssim(p, g)
    parts = [ms_ssim(part, g) for part in p.split(2, dim=1)]
    torch.testing.assert_close(together, torch.cat(parts, dim=1))
    assert torch.equal(repeat_channels(g, p)[:, 3], g[:, 1])
