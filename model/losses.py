"""The hybrid loss of UNet 3+: focal + MS-SSIM + IoU, and the slice classifier's cross-entropy.

Every term is computed for each image and organ separately, so that organs that a sample does not
annotate can be left out: their pixels are neither organ nor background. All terms are float32,
also under autocast: squares and differences of near-equal numbers in MS-SSIM need the precision.

Shapes: S side outputs, B batch, K organs, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from model.output import Output

# Wang et al., Asilomar 2003: weights of the five scales, then the usual constants of SSIM.
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
SSIM_C1 = 0.01**2
SSIM_C2 = 0.03**2
SSIM_SIGMA = 1.5
LARGEST_WINDOW = 11
SMALLEST_WINDOW = 3
SMALLEST_SIDE = 32
CONTRAST_FLOOR = 1e-4


class Loss(NamedTuple):
    """Terms of a loss, scalars; 0 for terms that are not requested.

    All are means over annotated (image, organ) pairs. The loss of a batch is therefore the mean of
    the losses of its parts, each weighted by its share of the pairs.

    Attributes:
        total: segmentation + classification; this is minimised.
        segmentation: sum of focal, ms_ssim and iou.
        classification: cross-entropy of the slice classifier (CGM).
        focal, ms_ssim, iou: segmentation terms, means over side outputs.
        sides: each requested term by side output: S values, the finest first, detached.
    """

    total: Tensor
    segmentation: Tensor
    classification: Tensor
    focal: Tensor
    ms_ssim: Tensor
    iou: Tensor
    sides: dict[str, Tensor]


def focal_loss(logits: Tensor, target: Tensor, *, gamma: float = 2.0) -> Tensor:
    """Return the focal loss, mean over pixels: -(1 - p_t)^gamma log p_t; ... x H x W -> ...

    Lin et al., ICCV 2017, with their gamma = 2. UNet 3+ gives no constants; we leave out the class
    weight alpha, so both classes count alike.

    Args:
        logits: ... x H x W.
        target: ... x H x W in [0, 1], broadcast against logits.
        gamma: down-weighting of pixels that are already right; 0 = cross-entropy.
    """
    target = target.to(logits.dtype).expand_as(logits)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    p = torch.sigmoid(logits)
    p_wrong = p + target - 2 * p * target
    return (p_wrong**gamma * cross_entropy).mean(dim=(-2, -1))


def iou_loss(p: Tensor, target: Tensor, *, smooth: float = 1.0) -> Tensor:
    """Return the soft IoU loss: 1 - (sum(p g) + smooth) / (sum(p + g - p g) + smooth).

    Args:
        p: probabilities, ... x H x W.
        target: masks, ... x H x W, broadcast against p.
        smooth: in pixels; makes the loss 0, not 0 / 0, if prediction and mask are both empty.

    Returns:
        ..., in [0, 1].
    """
    target = target.to(p.dtype)
    intersection = (p * target).sum(dim=(-2, -1))
    union = p.sum(dim=(-2, -1)) + target.sum(dim=(-2, -1)) - intersection
    return 1 - (intersection + smooth) / (union + smooth)


def ms_ssim_window(side: int) -> tuple[int, int]:
    """Return window (pixels) and number of scales of MS-SSIM for images with this smaller side.

    From 176 px on the window is the published 11 px. For smaller images it is the largest odd
    window that fits the fifth scale (sides halve, rounding up), at least 3 px. Below 33 px even
    that does not fit: the fifth scale is left out and the other weights are scaled to sum to 1.

    Raises:
        ValueError: the side is below 32 px.
    """
    if side < SMALLEST_SIDE:
        raise ValueError(
            f"MS-SSIM needs images of at least {SMALLEST_SIDE} pixels a side, got {side}: "
            "use larger slices, or leave ms_ssim out of the loss's terms"
        )
    coarsest = -(-side // 2 ** (len(MS_SSIM_WEIGHTS) - 1))
    if coarsest < SMALLEST_WINDOW:
        return SMALLEST_WINDOW, len(MS_SSIM_WEIGHTS) - 1
    return min(LARGEST_WINDOW, coarsest - 1 + coarsest % 2), len(MS_SSIM_WEIGHTS)


def ms_ssim(p: Tensor, target: Tensor) -> Tensor:
    """Return the multi-scale structural similarity of maps in [0, 1] (Wang et al., 2003).

    Gaussian window with sigma 1.5; window size and number of scales as in `ms_ssim_window`.

    Args:
        p: ... x H x W.
        target: ... x H x W, broadcast against p, so that its moments are computed only once.

    Returns:
        ..., in (0, 1].
    """
    window, num_scales = ms_ssim_window(min(p.shape[-2:]))
    target = target.to(p.dtype)
    similarity = torch.ones((), dtype=p.dtype, device=p.device)
    weights = MS_SSIM_WEIGHTS[:num_scales]
    for scale, weight in enumerate(weights):
        luminance, contrast = _ssim_maps(p, target, window)
        term = (
            contrast.mean(dim=(-2, -1))
            if scale < num_scales - 1
            else ((luminance * contrast).mean(dim=(-2, -1)))
        )
        # The term can be negative, and its power then NaN.
        similarity = similarity * term.clamp(min=CONTRAST_FLOOR) ** (weight / sum(weights))
        if scale < num_scales - 1:
            p, target = _halve(p), _halve(target)
    return similarity


def _ssim_maps(p: Tensor, g: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Return luminance and contrast-structure terms at every position where the window fits."""
    # The window is separable: two products with band matrices instead of a large convolution.
    rows, columns = (_gaussian_band(side, window, p) for side in p.shape[-2:])

    def smooth(x: Tensor) -> Tensor:
        return rows @ x @ columns.mT

    mean_p, mean_g = smooth(p), smooth(g)
    variance_p = smooth(p * p) - mean_p**2
    variance_g = smooth(g * g) - mean_g**2
    covariance = smooth(p * g) - mean_p * mean_g
    luminance = (2 * mean_p * mean_g + SSIM_C1) / (mean_p**2 + mean_g**2 + SSIM_C1)
    contrast = (2 * covariance + SSIM_C2) / (variance_p + variance_g + SSIM_C2)
    return luminance, contrast


def _gaussian_band(side: int, window: int, like: Tensor) -> Tensor:
    """Return a matrix, (side - window + 1) x side, whose rows are shifted Gaussian windows."""
    offset = torch.arange(side, device=like.device) - torch.arange(
        side - window + 1, device=like.device
    ).unsqueeze(1)
    weight = torch.exp(-((offset - window // 2) ** 2) / (2 * SSIM_SIGMA**2))
    weight = weight * ((offset >= 0) & (offset < window))
    return (weight / weight.sum(dim=1, keepdim=True)).to(like.dtype)


def _halve(x: Tensor) -> Tensor:
    """Average 2 x 2 pixels; an odd last row or column is averaged alone."""
    halved = F.avg_pool2d(x.flatten(0, -3), 2, ceil_mode=True)
    return halved.view(*x.shape[:-2], *halved.shape[-2:])


SEGMENTATION_TERMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "focal": focal_loss,
    "ms_ssim": lambda logits, target: 1 - ms_ssim(torch.sigmoid(logits), target),
    "iou": lambda logits, target: iou_loss(torch.sigmoid(logits), target),
}


def segmentation_values(
    logits: Sequence[Tensor],
    target_BKHW: Tensor,
    annotated_BK: Tensor | None = None,
    *,
    terms: Sequence[str] = ("focal", "ms_ssim", "iou"),
) -> dict[str, Tensor]:
    """Return each segmentation term for every side output, image and organ.

    Args:
        logits: one B x K x H x W tensor per side output.
        target_BKHW: masks, bool or 0 and 1.
        annotated_BK: bool; masks of organs that a sample does not annotate are not read, and the
            terms there are meaningless. None = all are annotated.
        terms: names from `SEGMENTATION_TERMS`.

    Returns:
        S x B x K per term.

    Raises:
        ValueError: unknown term, no term, or shapes that do not fit.
    """
    unknown = [term for term in terms if term not in SEGMENTATION_TERMS]
    if unknown or not terms:
        raise ValueError(
            f"unknown loss terms {unknown}: use some of {', '.join(SEGMENTATION_TERMS)}"
            if unknown
            else f"no loss terms: use some of {', '.join(SEGMENTATION_TERMS)}"
        )
    check_shapes(logits[0], target_BKHW, annotated_BK)
    with torch.autocast(logits[0].device.type, enabled=False):
        stacked_SBKHW = torch.stack([each.float() for each in logits])
        target = target_BKHW.float()
        if annotated_BK is not None:
            # Unread masks may hold anything, and NaN * 0 would still be NaN in the mean.
            target = torch.where(annotated_BK[..., None, None], target, 0)
        return {term: SEGMENTATION_TERMS[term](stacked_SBKHW, target[None]) for term in terms}


def classification_loss(
    organ_logits: Tensor, target_BKHW: Tensor, annotated_BK: Tensor | None = None
) -> Tensor:
    """Return the binary cross-entropy of both scores against "the slice contains the organ".

    Args:
        organ_logits: B x K x 2, index 1 = present.
        target_BKHW: masks; an organ is present if any pixel is above 0.
        annotated_BK: bool; other pairs are left out. None = all are annotated.

    Returns:
        A scalar, the mean over annotated pairs.
    """
    with torch.autocast(organ_logits.device.type, enabled=False):
        present = (target_BKHW > 0).flatten(2).any(dim=2)
        wanted = torch.stack([~present, present], dim=-1).float()
        cross_entropy = F.binary_cross_entropy_with_logits(
            organ_logits.float(), wanted, reduction="none"
        )
        return _annotated_mean(cross_entropy.mean(dim=-1), annotated_BK)


def total_loss(
    output: Output,
    target_BKHW: Tensor,
    annotated_BK: Tensor | None = None,
    *,
    terms: Sequence[str] = ("focal", "ms_ssim", "iou"),
) -> Loss:
    """Return the loss of UNet 3+: segmentation terms on every side output, and the classifier's.

    Side outputs are averaged (the paper leaves open sum or mean), which keeps the magnitude of the
    loss the same with and without deep supervision.

    Args:
        output: of a network.
        target_BKHW: masks, bool or 0 and 1.
        annotated_BK: bool; other pairs count in no term. None = all are annotated.
        terms: segmentation terms by name, see `SEGMENTATION_TERMS`.

    Returns:
        The terms; 0 if nothing is annotated.

    Raises:
        ValueError: as `segmentation_values`.
    """
    values_SBK = segmentation_values(output.logits, target_BKHW, annotated_BK, terms=terms)
    by_term = {term: _annotated_mean(each, annotated_BK) for term, each in values_SBK.items()}
    zero = target_BKHW.new_zeros((), dtype=torch.float32)
    segmentation = torch.stack(list(by_term.values())).sum()
    classification = (
        zero
        if output.organ_logits is None
        else classification_loss(output.organ_logits, target_BKHW, annotated_BK)
    )
    return Loss(
        total=segmentation + classification,
        segmentation=segmentation,
        classification=classification,
        **{term: by_term.get(term, zero) for term in SEGMENTATION_TERMS},
        sides={
            term: _annotated_mean(each.detach(), annotated_BK, dim=(-2, -1))
            for term, each in values_SBK.items()
        },
    )


def check_shapes(logits: Tensor, target_BKHW: Tensor, annotated_BK: Tensor | None) -> None:
    """Raise ValueError unless masks and annotation flags fit the logits."""
    if target_BKHW.shape != logits.shape:
        raise ValueError(
            f"masks have shape {tuple(target_BKHW.shape)}, the logits {tuple(logits.shape)}: "
            "both must be batch x organs x height x width"
        )
    if annotated_BK is not None and annotated_BK.shape != logits.shape[:2]:
        raise ValueError(
            f"annotation flags have shape {tuple(annotated_BK.shape)}, expected batch x organs = "
            f"{tuple(logits.shape[:2])}"
        )


def _annotated_mean(
    values: Tensor, annotated_BK: Tensor | None, dim: tuple[int, ...] | None = None
) -> Tensor:
    """Return the mean of ... x B x K over annotated pairs; 0, with zero gradient, without any.

    Args:
        values: ... x B x K.
        annotated_BK: bool; None = all are annotated.
        dim: dimensions to average; None = all.
    """
    if annotated_BK is None:
        return values.mean(dim)
    kept = annotated_BK.to(torch.bool).expand_as(values)
    return torch.where(kept, values, 0).sum(dim) / kept.sum(dim).clamp(min=1)
