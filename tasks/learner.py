"""How a network learns: one optimisation step, one validation pass, the schedule.

B batch, K organs, H W pixels.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from model.losses import total_loss
from model.metrics import dice_score
from model.output import probabilities
from tasks.augment import Augment
from tasks.console import StageError
from tasks.dataset import Batch, normalise, one_mask_per_organ
from tasks.params import TrainParams


class OrganLearner(LightningModule):
    """Trains any network of the family on any set of organs.

    After each epoch `on_epoch` is given its metrics: epoch (from 1), loss terms averaged over
    the training steps, 3D Dice and slice false-positive rate over the validation cases on the
    slices' grid.

    Args:
        network: maps B x 3 x H x W in 0..1 to `Output`.
        organs: names, in channel order.
        window_hu: the window that becomes 0..1.
        loss_terms: the terms of the segmentation loss.
        params: the section `train` of params.yaml.
        steps_per_epoch: optimiser steps in an epoch, for the schedule.
        num_val_cases: cases of the validation data set.
        min_false_positive_px: predicted pixels that make an organ-free slice a false positive.
        threshold: probability from which a pixel belongs to an organ.
        on_epoch: called with the metrics of each epoch.
    """

    def __init__(
        self,
        network: nn.Module,
        organs: tuple[str, ...],
        window_hu: tuple[float, float],
        loss_terms: tuple[str, ...],
        params: TrainParams,
        steps_per_epoch: int,
        num_val_cases: int,
        min_false_positive_px: int,
        threshold: float,
        on_epoch: Callable[[dict[str, float]], None],
    ) -> None:
        super().__init__()
        self.network = network
        self.organs = organs
        self.window_hu = window_hu
        self.loss_terms = loss_terms
        self.params = params
        self.steps_per_epoch = steps_per_epoch
        self.num_val_cases = num_val_cases
        self.min_false_positive_px = min_false_positive_px
        self.threshold = threshold
        self.augment = Augment(params.augment, window_hu, params.seed)
        self.on_epoch = on_epoch
        self._terms: dict[str, list[Tensor]] = defaultdict(list)
        self._counts: Tensor | None = None

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Move a batch; Lightning does not know the type."""
        return batch.to(device)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """One loss.

        Raises:
            StageError: the loss is not finite; weights are then those of the step before.
        """
        image_BCHW = normalise(batch.image_BCHW, self.window_hu)
        size = len(image_BCHW)
        image_BCHW, label_BHW = self.augment(
            image_BCHW,
            batch.label_BHW,
            self.current_epoch,
            torch.arange(batch_index * size, (batch_index + 1) * size),
        )
        target_BKHW = one_mask_per_organ(label_BHW, len(self.organs))
        terms = total_loss(
            self.network(image_BCHW), target_BKHW, batch.annotated_BK, terms=self.loss_terms
        )
        if not torch.isfinite(terms.total):
            raise StageError(
                f"the loss is {terms.total.item()} in epoch {self.current_epoch + 1}, step "
                f"{batch_index + 1}; lower train.learning_rate, or look for broken scans"
            )
        for name, value in terms._asdict().items():
            self._terms[name].append(value.detach())
        return terms.total

    def on_validation_epoch_start(self) -> None:
        """Forget the counts of the epoch before."""
        self._counts = None

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Add a batch of slices to the counts of their cases."""
        image_BCHW = normalise(batch.image_BCHW, self.window_hu)
        predicted = probabilities(self.network(image_BCHW)) >= self.threshold
        true = one_mask_per_organ(batch.label_BHW, len(self.organs))
        predicted_BK, true_BK = predicted.sum(dim=(2, 3)), true.sum(dim=(2, 3))
        free_BK = true_BK == 0
        counts_BKN = (
            torch.stack(
                [
                    (predicted & true).sum(dim=(2, 3)),
                    predicted_BK,
                    true_BK,
                    free_BK,
                    free_BK & (predicted_BK >= self.min_false_positive_px),
                ],
                dim=-1,
            )
            * batch.annotated_BK[..., None]
        )
        if self._counts is None:
            self._counts = counts_BKN.new_zeros(self.num_val_cases, *counts_BKN.shape[1:])
        self._counts.index_add_(0, batch.case_B, counts_BKN)

    def on_train_epoch_end(self) -> None:
        """Close the epoch: the validation pass is over by now."""
        metrics: dict[str, float] = {"epoch": self.current_epoch + 1}
        metrics["learning_rate"] = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        for name, values in self._terms.items():
            metrics[f"train/{name}"] = float(torch.stack(values).float().mean())
        self._terms.clear()
        metrics |= self._validation_metrics()
        self.on_epoch(metrics)

    def _validation_metrics(self) -> dict[str, float]:
        assert self._counts is not None  # noqa: S101 - a loader without slices is refused before
        metrics: dict[str, float] = {}
        all_scores: list[float] = []
        for k, organ in enumerate(self.organs):
            rows = self._counts[:, k].tolist()
            scores = [dice_score(overlap, predicted, true) for overlap, predicted, true, *_ in rows]
            scores = [score for score in scores if not math.isnan(score)]
            all_scores += scores
            free = sum(row[3] for row in rows)
            metrics[f"val/dice/{organ}"] = _mean(scores)
            metrics[f"val/slice_fpr/{organ}"] = sum(row[4] for row in rows) / (free or math.nan)
        return {"val/dice": _mean(all_scores), **metrics}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Optimiser and per-step schedule as params.yaml names them."""
        num_steps = self.steps_per_epoch * self.params.num_epochs

        def factor(step: int) -> float:
            if self.params.schedule == "constant":
                return 1.0
            return 0.5 * (1 + math.cos(math.pi * min(step / num_steps, 1.0)))

        optimizer = self._optimizer()
        scheduler = LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _optimizer(self) -> Optimizer:
        rate, decay = self.params.learning_rate, self.params.weight_decay
        if self.params.optimizer == "adamw":
            return AdamW(self.network.parameters(), lr=rate, weight_decay=decay)
        return SGD(
            self.network.parameters(), lr=rate, weight_decay=decay, momentum=0.9, nesterov=True
        )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
