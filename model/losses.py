"""The hybrid loss of UNet 3+: focal + MS-SSIM + IoU, and the slice classifier's cross-entropy.

Every term is computed for each image and organ separately, so that organs that a sample does not
annotate can be left out: their pixels are neither organ nor background. All terms are float32,
also under autocast: squares and differences of near-equal numbers in MS-SSIM need the precision.

Shapes: S side outputs, B batch, K organs, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.output import Output, organs_unknown
from model.similarity import ms_ssim, repeat_channels

SideWeights = Literal["equal", "halving"]
"""Weights of side outputs (deep supervision): the same for all, or each coarser one half of the one
before (Isensee et al. 2021, nnU-Net). Their sum is 1."""
IGNORED_LOGIT = -30.0
"""Logit of ignored pixels: a probability of 1e-13, which agrees with the empty mask there."""


class Loss(NamedTuple):
    """Terms of a loss, scalars; 0 for terms that are not requested.

    All are means over annotated (image, organ) pairs. The loss of a batch is therefore the mean of
    the losses of its parts, each weighted by its share of the pairs.

    Attributes:
        total: segmentation + classification; this is minimised.
        segmentation: sum of focal, ms_ssim and iou.
        classification: cross-entropy of the slice classifier (CGM).
        focal, ms_ssim, iou: segmentation terms, weighted means over side outputs.
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
        target: 0 and 1, ... x H x W; it gets no gradient.
        gamma: down-weighting of pixels that are already right; 0 = cross-entropy.
    """
    return cast(Callable[..., Tensor], MeanFocal.apply)(logits, target, gamma)


class MeanFocal(torch.autograd.Function):
    """Focal loss, mean over pixels, in few passes.

    With u = -logit inside the mask and u = logit outside, 1 - p_t is q = sigmoid(u), and -log p_t
    is softplus(u).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, gamma: float) -> Tensor:
        """Arguments of `focal_loss` -> its result."""
        sign = 1 - 2 * target.to(logits.dtype)
        u = logits * sign
        q = torch.sigmoid(u)
        cross_entropy = F.softplus(u)
        ctx.save_for_backward(sign, q, cross_entropy)
        ctx.gamma = gamma
        return (q**gamma).mul_(cross_entropy).mean(dim=(-2, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the logits: sign q^gamma (gamma (1 - q) cross_entropy + q)."""
        sign, q, cross_entropy = ctx.saved_tensors
        slope = (1 - q).mul_(cross_entropy).mul_(ctx.gamma).add_(q).mul_(q**ctx.gamma).mul_(sign)
        return slope.mul_(grad[..., None, None] / q.shape[-2:].numel()), None, None


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


SEGMENTATION_TERMS = ("focal", "ms_ssim", "iou")


def segmentation_values(
    logits: Sequence[Tensor],
    target_BKHW: Tensor,
    annotated_BK: Tensor | None = None,
    *,
    terms: Sequence[str] = SEGMENTATION_TERMS,
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
    batch, num_organs = target_BKHW.shape[:2]
    with torch.autocast(logits[0].device.type, enabled=False):
        target = target_BKHW.float()
        if annotated_BK is not None:
            # Unread masks may hold anything, and NaN * 0 would still be NaN in the mean.
            target = torch.where(annotated_BK[..., None, None], target, 0)
        # Channels are the organs of the first side output, then those of the next, and so on.
        maps = torch.cat([each.float() for each in logits], dim=1)
        maps, target = (
            each.contiguous(memory_format=torch.channels_last) for each in (maps, target)
        )
        repeated, p = repeat_channels(target, maps), torch.sigmoid(maps)
        compute: dict[str, Callable[[], Tensor]] = {
            "focal": lambda: focal_loss(maps, repeated),
            "ms_ssim": lambda: 1 - ms_ssim(p, target),
            "iou": lambda: iou_loss(p, repeated),
        }
        shape = (batch, len(logits), num_organs)
        return {term: compute[term]().view(shape).transpose(0, 1) for term in terms}


def classification_loss(
    organ_logits: Tensor,
    target_BKHW: Tensor,
    annotated_BK: Tensor | None = None,
    ignored_BHW: Tensor | None = None,
) -> Tensor:
    """Return the binary cross-entropy of both scores against "the slice contains the organ".

    Args:
        organ_logits: B x K x 2, index 1 = present.
        target_BKHW: masks; an organ is present if any pixel is above 0.
        annotated_BK: bool; other pairs are left out. None = all are annotated.
        ignored_BHW: bool; pairs that are `organs_unknown` have loss 0. None = no pixel is ignored.

    Returns:
        A scalar, the mean over annotated pairs.
    """
    with torch.autocast(organ_logits.device.type, enabled=False):
        present = (target_BKHW > 0).flatten(2).any(dim=2)
        wanted = torch.stack([~present, present], dim=-1).float()
        cross_entropy = F.binary_cross_entropy_with_logits(
            organ_logits.float(), wanted, reduction="none"
        )
        loss_BK = cross_entropy.mean(dim=-1)
        if ignored_BHW is not None:
            loss_BK = torch.where(organs_unknown(present, ignored_BHW), 0, loss_BK)
        return _annotated_mean(loss_BK, annotated_BK)


def halving_weights(num_sides: int) -> list[float]:
    """Return weights of side outputs, the finest first: each half of the one before, of sum 1."""
    return [2.0**-side / (2 - 2.0 ** (1 - num_sides)) for side in range(num_sides)]


def total_loss(
    output: Output,
    target_BKHW: Tensor,
    annotated_BK: Tensor | None = None,
    ignored_BHW: Tensor | None = None,
    *,
    terms: Sequence[str] = SEGMENTATION_TERMS,
    side_weights: SideWeights = "equal",
) -> Loss:
    """Return the loss of UNet 3+: segmentation terms on every side output, and the classifier's.

    Side outputs are averaged (the paper leaves open sum or mean), which keeps the magnitude of the
    loss the same with and without deep supervision.

    Args:
        output: of a network.
        target_BKHW: masks, bool or 0 and 1.
        annotated_BK: bool; other pairs count in no term. None = all are annotated.
        ignored_BHW: bool, True for pixels that nobody judged; their masks must be empty. They give
            no gradient and add nothing to a term. None = no pixel is ignored.
        terms: segmentation terms by name, see `SEGMENTATION_TERMS`.
        side_weights: see `SideWeights`.

    Returns:
        The terms; 0 if nothing is annotated. `sides` are not weighted.

    Raises:
        ValueError: as `segmentation_values`.
    """
    logits = output.logits
    if ignored_BHW is not None:
        logits = [each.masked_fill(ignored_BHW[:, None], IGNORED_LOGIT) for each in logits]
    values_SBK = segmentation_values(logits, target_BKHW, annotated_BK, terms=terms)
    weighted_SBK = values_SBK
    if side_weights == "halving":
        # Times S, because the mean below divides by it.
        weight_S = torch.tensor(halving_weights(len(output.logits)), device=target_BKHW.device)
        factor_S11 = (weight_S * len(weight_S))[:, None, None]
        weighted_SBK = {term: each * factor_S11 for term, each in values_SBK.items()}
    by_term = {term: _annotated_mean(each, annotated_BK) for term, each in weighted_SBK.items()}
    zero = target_BKHW.new_zeros((), dtype=torch.float32)
    segmentation = torch.stack(list(by_term.values())).sum()
    classification = (
        zero
        if output.organ_logits is None
        else classification_loss(output.organ_logits, target_BKHW, annotated_BK, ignored_BHW)
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
