"""Refine the probabilities of an organ in a slice by a fully connected random field (CRF).

Mean field of Kraehenbuehl and Koltun 2011, "Efficient inference in fully connected CRFs with
Gaussian edge potentials", for two labels, organ and rest, with a Potts penalty: every pixel pulls
every other one to its own label, the more the nearer they are (smoothness), and the more the nearer
and the more alike in HU they are (appearance). Each kernel is normalised symmetrically, so that the
weights mean the same in boxes of every size. Instead of a lattice that approximates the sum over
all pixels, it is computed as it is, in the box around the organ. A box whose pairs of pixels are
more than `MAX_PAIRS` takes, for appearance, only the pairs in a window around each pixel, as in
ConvCRF (Teichmann and Cipolla 2018).

H W pixels of a box, N = H W, P places of a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

MAX_PAIRS = 8192**2
"""Pairs of pixels in memory at a time, in float32: 256 MB for each kernel."""
BOX_FROM = 0.01
"""Probability from which a pixel is in the box."""
MARGIN_PX = 4
_SURE = 1e-6
"""Probabilities are kept this far from 0 and 1, whose logits are infinite."""

Kernel = Callable[[Tensor], Tensor]
"""Values of the pixels, H x W -> for each pixel their sum, weighted by the kernel, H x W."""


@dataclass(frozen=True)
class CrfSettings:
    """Parameters of the field.

    Attributes:
        appearance_weight: of the kernel of place and HU.
        appearance_mm: its standard deviation in the slice.
        appearance_hu: its standard deviation in HU.
        smoothness_weight: of the kernel of place alone.
        smoothness_mm: its standard deviation.
        num_iterations: of the mean field.
    """

    appearance_weight: float = 3.0
    appearance_mm: float = 24.0
    appearance_hu: float = 40.0
    smoothness_weight: float = 1.0
    smoothness_mm: float = 4.0
    num_iterations: int = 5


DEFAULTS = CrfSettings()


def refine_slices(
    probability_KBHW: Tensor,
    image_BHW: Tensor,
    pixel_mm: float,
    window_hu: tuple[float, float],
    settings: CrfSettings = DEFAULTS,
) -> Tensor:
    """Return the probabilities of organs after the mean field, slice by slice.

    Args:
        probability_KBHW: float32, in [0, 1].
        image_BHW: intensities in [0, 1], of the window.
        pixel_mm: distance of pixels.
        window_hu: HU of intensity 0 and 1.
        settings: parameters of the field.

    Returns:
        As `probability_KBHW`; pixels outside the box around an organ are unchanged.
    """
    refined_KBHW = probability_KBHW.clone()
    image_hu_BHW = image_BHW * (window_hu[1] - window_hu[0])
    for refined_BHW in refined_KBHW:
        for refined_HW, image_hu_HW in zip(refined_BHW, image_hu_BHW, strict=True):
            box = _find_box(refined_HW)
            if box is not None:
                refined_HW[box] = refine_box(refined_HW[box], image_hu_HW[box], pixel_mm, settings)
    return refined_KBHW


def refine_box(
    probability_HW: Tensor,
    image_hu_HW: Tensor,
    pixel_mm: float,
    settings: CrfSettings = DEFAULTS,
    max_pairs: int = MAX_PAIRS,
) -> Tensor:
    """Return the probabilities of one organ after the mean field.

    Args:
        probability_HW: float32, in [0, 1].
        image_hu_HW: HU, from any zero.
        pixel_mm: distance of pixels.
        settings: parameters of the field.
        max_pairs: of pixels; a box with more takes those in a window.
    """
    sigma_hu = settings.appearance_hu * math.sqrt(2)
    if probability_HW.numel() ** 2 <= max_pairs:
        alike = _sum_over_all(image_hu_HW / sigma_hu, pixel_mm / settings.appearance_mm)
    else:
        reach = max(1, (math.isqrt(max_pairs // probability_HW.numel()) - 1) // 2)
        alike = _sum_in_window(image_hu_HW / sigma_hu, pixel_mm / settings.appearance_mm, reach)
    kernels = (
        (settings.appearance_weight, _normalise(alike, image_hu_HW)),
        (
            settings.smoothness_weight,
            _normalise(_sum_of_near(image_hu_HW, pixel_mm / settings.smoothness_mm), image_hu_HW),
        ),
    )
    logit_HW = torch.logit(probability_HW, _SURE)
    found_HW = torch.sigmoid(logit_HW)
    for _ in range(settings.num_iterations):
        # The rest pulls the logit of a pixel down, the organ pulls it up.
        balance_HW = 2 * found_HW - 1
        pull_HW = sum((weight * kernel(balance_HW) for weight, kernel in kernels), logit_HW)
        found_HW = torch.sigmoid(pull_HW)
    return found_HW


def _normalise(kernel: Kernel, like_HW: Tensor) -> Kernel:
    """Return a kernel without the pixel itself, divided by the roots of both pixels' sums."""
    tiny = torch.finfo(like_HW.dtype).tiny
    total_HW = kernel(torch.ones_like(like_HW)) - 1
    root_HW = total_HW.clamp(min=tiny).rsqrt()

    def normalised(values_HW: Tensor) -> Tensor:
        scaled_HW = root_HW * values_HW
        return root_HW * (kernel(scaled_HW) - scaled_HW)

    return normalised


def _gaussian(length: int, step: float, like: Tensor) -> Tensor:
    """Return exp(-d^2 / 2) of the distances d between places in a row, `step` apart."""
    place = torch.arange(length).to(like) * step
    return torch.exp((place[:, None] - place).square() / -2)


def _sum_of_near(like_HW: Tensor, step: float) -> Kernel:
    """Return the kernel of place alone, which is separable; distances in standard deviations."""
    height, width = like_HW.shape
    rows_HH, columns_WW = _gaussian(height, step, like_HW), _gaussian(width, step, like_HW)
    return lambda values_HW: rows_HH @ values_HW @ columns_WW


def _sum_over_all(hu_HW: Tensor, step: float) -> Kernel:
    """Return the kernel of place and HU over all pixels.

    Args:
        hu_HW: HU in standard deviations times the root of 2.
        step: distance of pixels in standard deviations.
    """
    height, width = hu_HW.shape
    hu_N = hu_HW.reshape(-1)
    kernel_NN = (hu_N[:, None] - hu_N).square_().neg_().exp_()
    kernel_NN *= torch.kron(_gaussian(height, step, hu_HW), _gaussian(width, step, hu_HW))
    return lambda values_HW: (kernel_NN @ values_HW.reshape(-1)).reshape(height, width)


def _sum_in_window(hu_HW: Tensor, step: float, reach: int) -> Kernel:
    """Return the same over pixels at most `reach` rows and columns away."""
    size, sides = 2 * reach + 1, [reach] * 4

    def neighbours(values_HW: Tensor, outside: float) -> Tensor:
        return F.unfold(F.pad(values_HW[None, None], sides, value=outside), size)[0]  # P x N

    row_P = _gaussian(size, step, hu_HW)[reach]
    place_P1 = torch.outer(row_P, row_P).reshape(-1, 1)
    difference_PN = neighbours(hu_HW, math.inf) - hu_HW.reshape(1, -1)
    kernel_PN = difference_PN.square_().neg_().exp_() * place_P1
    return lambda values_HW: (kernel_PN * neighbours(values_HW, 0)).sum(dim=0).reshape(hu_HW.shape)


def _find_box(probability_HW: Tensor) -> tuple[slice, slice] | None:
    """Return the box around the pixels from BOX_FROM on, with a margin; None without any."""
    inside_HW = probability_HW >= BOX_FROM
    if not inside_HW.any():
        return None
    ends = []
    for axis, length in ((1, inside_HW.shape[0]), (0, inside_HW.shape[1])):
        place = inside_HW.any(dim=axis).nonzero()
        low, high = int(place.min()), int(place.max())
        ends.append(slice(max(0, low - MARGIN_PX), min(length, high + MARGIN_PX + 1)))
    return ends[0], ends[1]
