"""How good a network is on the validation cases, during training.

B batch, K organs, V validation cases, N counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fullscale.training.dataset import Batch
from model.output import Output, organ_open, probabilities
from model.overlap import dice_score, share
from model.preprocessing import normalise, one_mask_per_organ

NUM_COUNTS = 7


def count_batch(
    output: Output, batch: Batch, threshold: float, min_false_positive_px: int
) -> Tensor:
    """What the metrics are made of, for each slice and organ; zeros where it is not annotated.

    Args:
        output: of the network.
        batch: what it was given.
        threshold: probability from which a pixel belongs to an organ.
        min_false_positive_px: predicted pixels that make an organ-free slice a false positive.

    Returns:
        int64, B x K x N: pixels in both masks, predicted, true; organ-free slices, those with a
        false positive; slices whose gate is right, slices with a gate.
    """
    predicted = probabilities(output) >= threshold
    num_organs = predicted.shape[1]
    true = one_mask_per_organ(batch.label_BHW, num_organs)
    predicted_BK, true_BK = predicted.sum(dim=(2, 3)), true.sum(dim=(2, 3))
    free_BK = true_BK == 0
    if output.organ_logits is None:
        right_BK = has_gate_BK = torch.zeros_like(free_BK)
    else:
        right_BK = organ_open(output.organ_logits) != free_BK
        has_gate_BK = torch.ones_like(free_BK)
    counts = [
        (predicted & true).sum(dim=(2, 3)),
        predicted_BK,
        true_BK,
        free_BK,
        free_BK & (predicted_BK >= min_false_positive_px),
        right_BK,
        has_gate_BK,
    ]
    return torch.stack(counts, dim=-1) * batch.annotated_BK[..., None]


def count_cases(
    predict: Callable[[Tensor], Output],
    batches: Iterable[Batch],
    num_cases: int,
    num_organs: int,
    window_hu: tuple[float, float],
    device: torch.device,
    *,
    threshold: float,
    min_false_positive_px: int,
) -> Tensor:
    """Sum `count_batch` over the slices of each case.

    Counts of several processes that each saw some of the batches may be added.

    Returns:
        int64, V x K x N, on `device`.
    """
    counts_VKN = torch.zeros(num_cases, num_organs, NUM_COUNTS, dtype=torch.int64, device=device)
    with torch.inference_mode():
        for batch in batches:
            here = batch.to(device)
            output = predict(normalise(here.image_BCHW, window_hu))
            counts_VKN.index_add_(
                0, here.case_B, count_batch(output, here, threshold, min_false_positive_px)
            )
    return counts_VKN


def metrics_of(counts_VKN: Tensor, organs: Sequence[str]) -> dict[str, float]:
    """Metrics from counts: mean 3D Dice over cases, rates pooled over slices.

    Keys are `val/dice`, the mean over cases and organs, and for each organ `val/dice/<organ>`,
    `val/slice_fpr/<organ>` and, for a network with a gate, `val/gate_accuracy/<organ>`. What
    cannot be measured is NaN.
    """
    metrics: dict[str, float] = {}
    all_scores: list[float] = []
    for k, organ in enumerate(organs):
        rows = counts_VKN[:, k].tolist()
        scores = [dice_score(overlap, predicted, true) for overlap, predicted, true, *_ in rows]
        scores = [score for score in scores if not math.isnan(score)]
        all_scores += scores
        *_, free, false_positive, right, with_gate = counts_VKN[:, k].sum(dim=0).tolist()
        metrics[f"val/dice/{organ}"] = share(sum(scores), len(scores))
        metrics[f"val/slice_fpr/{organ}"] = share(false_positive, free)
        if with_gate:
            metrics[f"val/gate_accuracy/{organ}"] = share(right, with_gate)
    return {"val/dice": share(sum(all_scores), len(all_scores)), **metrics}
