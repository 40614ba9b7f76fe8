"""Parts of a training step: loss of a batch, optimiser, learning rate, random seed.

B batch, K organs, S side outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from fullscale.params import TrainParams
from fullscale.runtime.startup import compiler_left_out
from fullscale.training.augmentation import Augment
from fullscale.training.dataset import Batch
from model.losses import SideWeights, total_loss
from model.output import Output
from model.preprocessing import IGNORED_LABEL, normalise, one_mask_per_organ

POLY_POWER = 0.9


class SegmentationObjective:
    """Augmentation and loss of a batch, for any network and any set of organs.

    Args:
        network: maps B x 3 x H x W in 0..1 to `Output`.
        num_organs: K.
        window_hu: intensities that become 0 and 1.
        loss_terms: terms of the segmentation loss.
        augment: random augmentation of training slices.
        side_weights: of the side outputs, as `model.losses.total_loss` takes it.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Output],
        num_organs: int,
        window_hu: tuple[float, float],
        loss_terms: tuple[str, ...],
        augment: Augment,
        side_weights: SideWeights = "equal",
    ) -> None:
        self._network = network
        self._num_organs = num_organs
        self._window_hu = window_hu
        self._loss_terms = loss_terms
        self._augment = augment
        self._side_weights: SideWeights = side_weights

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return augmented image, B x 3 x H x W in 0..1, masks, B x K x H x W, and ignored pixels.

        The last are B x H x W, bool; None if the batch has none.
        """
        image_BCHW, label_BHW = self._augment(
            normalise(batch.image_BCHW, self._window_hu),
            batch.label_BHW,
            batch.epoch,
            batch.position_B,
        )
        ignored_BHW = label_BHW == IGNORED_LABEL if batch.has_ignored else None
        return image_BCHW, one_mask_per_organ(label_BHW, self._num_organs), ignored_BHW

    def loss(
        self,
        image_BCHW: Tensor,
        mask_BKHW: Tensor,
        ignored_BHW: Tensor | None,
        annotated_BK: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and its terms by name, detached: `total`, `focal`, `side1/focal`..."""
        output = self._network(image_BCHW)
        terms = total_loss(
            output,
            mask_BKHW,
            annotated_BK,
            ignored_BHW,
            terms=self._loss_terms,
            side_weights=self._side_weights,
        )
        named = {name: value.detach() for name, value in terms._asdict().items() if name != "sides"}
        for term, values_S in terms.sides.items():
            for number, value in enumerate(values_S, start=1):
                named[f"side{number}/{term}"] = value
        return terms.total, named


def make_optimizer(network: nn.Module, params: TrainParams) -> Optimizer:
    """Return the optimiser of `params` over all weights of a network."""
    rate, decay = params.learning_rate, params.weight_decay
    weights = network.parameters()
    with compiler_left_out():
        if params.optimizer == "adamw":
            # fused: one pass over all weights instead of a dozen, many of them tiny
            return AdamW(weights, lr=rate, weight_decay=decay, fused=True)
        return SGD(weights, lr=rate, weight_decay=decay, momentum=0.9, nesterov=True)


def learning_rate(params: TrainParams, step: int, num_steps: int) -> float:
    """Return the learning rate of a step, counted from 0, of a training of `num_steps`.

    "poly" is (1 - step / num_steps)^0.9 (DeepLab, Chen et al., 2017).
    """
    done = min(step / num_steps, 1.0)
    factors: dict[str, float] = {
        "constant": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "poly": (1 - done) ** POLY_POWER,
    }
    return params.learning_rate * factors[params.schedule]


def seed_step(seed: int, *key: int) -> None:
    """Seed torch's global generator as a function of seed and key (epoch, step, part, rank).

    A resumed training thus draws the same numbers, and no RNG state is saved.
    """
    # Mixed, because consecutive seeds are not independent; >> 1, because seeds are signed.
    torch.manual_seed(
        int(np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)[0] >> 1)
    )
