"""Refine the probabilities of an organ in a slice by a fully connected random field (CRF).

Mean field of Kraehenbuehl and Koltun 2011, "Efficient inference in fully connected CRFs with
Gaussian edge potentials", for two labels, organ and rest, with a Potts penalty: every pixel pulls
every other one to its own label, the more the nearer they are (smoothness), and the more the nearer
and the more alike in HU they are (appearance). Each kernel is normalised symmetrically, so that the
weights mean the same in boxes of every size.

The sum over all pairs of pixels in the box around the organ is exact to rounding, without a lattice
or a window: a Gaussian of places is separable, and one of HU is a sum of a few products of a
function of one pixel and the same function of the other (Nystroem method, Williams and Seeger
2001). So each sum is a few products of small matrices.

H W pixels of a box, R such functions, M nodes between the lowest and the highest HU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BOX_FROM = 0.01
"""Probability from which a pixel is in the box."""
MARGIN_PX = 4
_SURE = 1e-6
"""Probabilities are kept this far from 0 and 1, whose logits are infinite."""
_LEAST_TOTAL = 1e-6
"""Sum of a kernel over the other pixels that still counts; below, a pixel is like no other."""
_NODE_STEP = 0.5
"""Distance of the nodes in standard deviations of HU."""
_LEAST_EIGENVALUE = 1e-11
"""Functions of a smaller eigenvalue, as a share of the largest, are rounding errors."""

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
) -> Tensor:
    """Return the probabilities of one organ after the mean field.

    Args:
        probability_HW: float32, in [0, 1].
        image_hu_HW: HU, from any zero.
        pixel_mm: distance of pixels.
        settings: parameters of the field.
    """
    # In float64: the sums over the others, which are small for a pixel that is like no other, are
    # differences of sums over all.
    image_hu_HW = image_hu_HW.double()
    near = _sum_of_near(image_hu_HW, pixel_mm / settings.smoothness_mm)
    alike = _sum_of_alike(
        image_hu_HW / settings.appearance_hu,
        _sum_of_near(image_hu_HW, pixel_mm / settings.appearance_mm),
    )
    kernels = (
        (settings.appearance_weight, _normalise(alike, image_hu_HW)),
        (settings.smoothness_weight, _normalise(near, image_hu_HW)),
    )
    logit_HW = torch.logit(probability_HW.double(), _SURE)
    found_HW = torch.sigmoid(logit_HW)
    for _ in range(settings.num_iterations):
        # The rest pulls the logit of a pixel down, the organ pulls it up.
        balance_HW = 2 * found_HW - 1
        pull_HW = sum((weight * kernel(balance_HW) for weight, kernel in kernels), logit_HW)
        found_HW = torch.sigmoid(pull_HW)
    return found_HW.to(probability_HW.dtype)


def _normalise(kernel: Kernel, like_HW: Tensor) -> Kernel:
    """Return a kernel without the pixel itself, divided by the roots of both pixels' sums."""
    total_HW = kernel(torch.ones_like(like_HW)) - 1
    root_HW = total_HW.clamp(min=_LEAST_TOTAL).rsqrt()

    def normalised(values_HW: Tensor) -> Tensor:
        scaled_HW = root_HW * values_HW
        return root_HW * (kernel(scaled_HW) - scaled_HW)

    return normalised


def _gaussian(length: int, step: float, like: Tensor) -> Tensor:
    """Return exp(-d^2 / 2) of the distances d between places in a row, `step` apart."""
    place = torch.arange(length).to(like) * step
    return torch.exp((place[:, None] - place).square() / -2)


def _sum_of_near(like_HW: Tensor, step: float) -> Kernel:
    """Return the kernel of place alone, which is separable.

    Args:
        like_HW: whose shape, dtype and device count.
        step: distance of pixels in standard deviations.
    """
    height, width = like_HW.shape
    rows_HH, columns_WW = _gaussian(height, step, like_HW), _gaussian(width, step, like_HW)
    return lambda values_HW: rows_HH @ values_HW @ columns_WW


def _sum_of_alike(hu_HW: Tensor, near: Kernel) -> Kernel:
    """Return the kernel of place and HU.

    Args:
        hu_HW: HU in standard deviations.
        near: the kernel of place, also of several images, R x H x W.
    """
    functions_RHW = _split_gaussian(hu_HW)
    return lambda values_HW: (functions_RHW * near(functions_RHW * values_HW)).sum(dim=0)


def _split_gaussian(hu_HW: Tensor) -> Tensor:
    """Return functions f of a pixel, R x H x W: exp(-(a - b)^2 / 2) is the sum of f(a) f(b).

    Args:
        hu_HW: HU in standard deviations, float64.
    """
    hu_HW1 = hu_HW[..., None]
    low, high = float(hu_HW1.min()), float(hu_HW1.max())
    num_nodes = int((high - low) / _NODE_STEP) + 5
    node_M = low + (torch.arange(num_nodes).to(hu_HW1) - 2) * _NODE_STEP
    eigenvalue_M, vector_MM = torch.linalg.eigh(_gaussian(num_nodes, _NODE_STEP, hu_HW1))
    kept_M = eigenvalue_M > _LEAST_EIGENVALUE * eigenvalue_M.max()
    to_functions_MR: Tensor = vector_MM[:, kept_M] * eigenvalue_M[kept_M].rsqrt()
    alike_HWM = ((hu_HW1 - node_M).square() / -2).exp()
    return (alike_HWM @ to_functions_MR).movedim(-1, 0)


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
