"""Metrics of the validation cases during training.

B batch, K organs, V validation cases, N counts, S slices of an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fullscale.params import Params
from fullscale.training.dataset import Batch
from model.output import Output, organ_present, organs_unknown, probabilities
from model.overlap import dice_score, share
from model.preprocessing import IGNORED_LABEL, normalise, one_mask_per_organ

NUM_COUNTS = 8
MIN_SHARE_WITHOUT_ORGAN = 0.15
"""Share of slices without the organ from which the slice classifier learns when to close one."""
MIN_SPECIFICITY = 0.5


def count_batch(
    output: Output, batch: Batch, threshold: float, min_false_positive_px: float
) -> Tensor:
    """Count pixels and slices for the metrics; zeros where an organ is not annotated.

    Args:
        output: of the network.
        batch: the network's input.
        threshold: probability from which a pixel belongs to an organ.
        min_false_positive_px: predicted pixels that make an organ-free slice a false positive.

    Returns:
        int64, B x K x N: pixels in both masks, predicted, true; organ-free slices, those with a
        false positive; slices with a slice classifier, organ slices that it opens, organ-free
        slices that it closes. Ignored pixels are in no mask, and a slice with some of them and
        without the organ is none of these slices.
    """
    ignored_BHW = batch.label_BHW == IGNORED_LABEL
    predicted = (probabilities(output) >= threshold) & ~ignored_BHW[:, None]
    num_organs = predicted.shape[1]
    true = one_mask_per_organ(batch.label_BHW, num_organs)
    predicted_BK, true_BK = predicted.sum(dim=(2, 3)), true.sum(dim=(2, 3))
    unknown_BK = organs_unknown(true_BK > 0, ignored_BHW)
    free_BK = (true_BK == 0) & ~unknown_BK
    if output.organ_logits is None:
        has_classifier_BK = open_BK = closed_BK = torch.zeros_like(free_BK)
    else:
        has_classifier_BK = ~unknown_BK
        open_BK = organ_present(output.organ_logits)
        closed_BK = ~open_BK
    counts = [
        (predicted & true).sum(dim=(2, 3)),
        predicted_BK,
        true_BK,
        free_BK,
        free_BK & (predicted_BK >= min_false_positive_px),
        has_classifier_BK,
        (true_BK > 0) & open_BK,
        free_BK & closed_BK,
    ]
    return torch.stack(counts, dim=-1) * batch.annotated_BK[..., None]


def count_cases(
    predict: Callable[[Tensor], Output],
    batches: Iterable[Batch],
    num_cases: int,
    params: Params,
    device: torch.device,
) -> Tensor:
    """Sum `count_batch` over the slices of each case.

    The counts of several processes, each with some of the batches, may be added.

    Args:
        predict: the network: B x 3 x H x W in window units to `Output`.
        batches: slices of the cases.
        num_cases: V.
        params: all of params.yaml; gives organs, window, size of a pixel and thresholds.
        device: where to compute.

    Returns:
        int64, V x K x N, on `device`.
    """
    window_hu, settings = params.slice.window_hu, params.evaluate
    threshold = settings.threshold
    min_false_positive_px = settings.min_false_positive_mm2 / params.slice.pixel_mm**2
    shape = (num_cases, len(params.organs), NUM_COUNTS)
    counts_VKN = torch.zeros(shape, dtype=torch.int64, device=device)
    with torch.inference_mode():
        for batch in batches:
            here = batch.to(device)
            output = predict(normalise(here.image_BCHW, window_hu))
            counts_VKN.index_add_(
                0, here.case_B, count_batch(output, here, threshold, min_false_positive_px)
            )
    return counts_VKN


def metrics_of(counts_VKN: Tensor, organs: Sequence[str]) -> dict[str, float]:
    """Compute metrics from counts: mean 3D Dice over cases, rates pooled over slices.

    Keys are `val/dice`, the mean over cases and organs, and for each organ `val/dice/<organ>`,
    `val/slice_fpr/<organ>` and, for a network with a slice classifier (CGM),
    `val/classifier_accuracy/<organ>`, `val/classifier_sensitivity/<organ>` (share of organ slices
    that it opens) and `val/classifier_specificity/<organ>` (share of organ-free slices that it
    closes). A metric without any case or slice is NaN.
    """
    metrics: dict[str, float] = {}
    all_scores: list[float] = []
    for k, organ in enumerate(organs):
        rows = counts_VKN[:, k].tolist()
        scores = [dice_score(overlap, predicted, true) for overlap, predicted, true, *_ in rows]
        scores = [score for score in scores if not math.isnan(score)]
        all_scores += scores
        *_, free, false_positive, decided, opened, closed = counts_VKN[:, k].sum(dim=0).tolist()
        metrics[f"val/dice/{organ}"] = share(sum(scores), len(scores))
        metrics[f"val/slice_fpr/{organ}"] = share(false_positive, free)
        if decided:
            metrics[f"val/classifier_accuracy/{organ}"] = share(opened + closed, decided)
            metrics[f"val/classifier_sensitivity/{organ}"] = share(opened, decided - free)
            metrics[f"val/classifier_specificity/{organ}"] = share(closed, free)
    return {"val/dice": share(sum(all_scores), len(all_scores)), **metrics}


def warn_of_samples(
    annotated_SK: NDArray[np.bool_], present_SK: NDArray[np.bool_], organs: Sequence[str]
) -> str | None:
    """Return a warning if a slice classifier (CGM) sees too few slices without its organ.

    Args:
        annotated_SK: of the S slices of an epoch, True if the organ is annotated in the case.
        present_SK: True if the slice contains the organ.
        organs: the K organs.

    Returns:
        The warning, with a cure; None if every organ has enough of them.
    """
    num_annotated_K = annotated_SK.sum(axis=0).tolist()
    num_without_K = (annotated_SK & ~present_SK).sum(axis=0).tolist()
    lacking = [
        f"{organ} ({num_without} of {num_annotated})"
        for organ, num_annotated, num_without in zip(
            organs, num_annotated_K, num_without_K, strict=True
        )
        if num_without < MIN_SHARE_WITHOUT_ORGAN * num_annotated
    ]
    if not lacking:
        return None
    return (
        f"too few slices of an epoch are without {', '.join(lacking)} for the slice classifier "
        "(CGM) to learn when to close a slice; raise train.organ_free_share, add scans that reach "
        "beyond the organ, or set cgm: false in the network's recipe"
    )


def warn_of_classifier(metrics: Mapping[str, float], organs: Sequence[str]) -> str | None:
    """Return a warning if a slice classifier (CGM) leaves most slices without its organ open.

    Args:
        metrics: of the epoch that is kept, as `metrics_of` returns them.
        organs: to look at.

    Returns:
        The warning, with a cure; None if it closes at least half of them for every organ.
    """
    found = {organ: metrics.get(f"val/classifier_specificity/{organ}", 1) for organ in organs}
    lacking = [
        f"{organ} ({specificity:.0%})"
        for organ, specificity in found.items()
        if specificity < MIN_SPECIFICITY
    ]
    if not lacking:
        return None
    return (
        "the slice classifier (CGM) closes less than half of the validation slices without "
        f"{', '.join(lacking)}; raise train.organ_free_share or train.num_epochs, add scans that "
        "reach beyond the organ, or set cgm: false in the network's recipe"
    )
