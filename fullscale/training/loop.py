"""The training loop: steps, epochs, validation, checkpoints; on one device or on many processes.

Everything random is a function of seed and position, so a training that goes on from a checkpoint
ends with the weights of one that was never interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fullscale.params import Params
from fullscale.runtime.checkpoints import Checkpoints
from fullscale.runtime.errors import StageError
from fullscale.runtime.prefetch import ahead
from fullscale.runtime.progress import TrainingDisplay
from fullscale.runtime.signals import Interrupted, StopRequest
from fullscale.training.augmentation import Augment
from fullscale.training.dataset import Batch, Plan, SliceDataset, training_batches, whole_batches
from fullscale.training.epoch_order import EpochOrder
from fullscale.training.step import Learner, learning_rate, make_optimizer, seed_step
from fullscale.training.validation import count_cases, metrics_of
from model.output import Output
from model.segmentation import SegmentationNetwork
from model.synchronised import synchronise_norms

NUM_AUTO_WORKERS = 8
Part = tuple[Batch, Tensor, Tensor]
"""What a process computes at once: a batch, its augmented image B x C x H x W, its masks."""


@dataclass
class Position:
    """How far a training is.

    Attributes:
        epoch: counted from 0.
        step: optimiser steps done in it.
        sums: of each training metric over those steps.
        rows: metrics of the epochs that are over.
        best_epoch, best_dice: of the best one, counted from 1; 0 and -1 before the first.
    """

    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    best_dice: float = -1.0


@dataclass
class Clock:
    """Where the time of an epoch's steps goes, in seconds.

    Attributes:
        num_slices: trained on, over all processes.
        total: of the steps, and what lies between them.
        waiting: for slices from the loader, and for their augmentation.
        computing: forward, backward and optimiser.
    """

    num_slices: int = 0
    total: float = 0.0
    waiting: float = 0.0
    computing: float = 0.0


class Training:
    """One training, from wherever it stands to its end.

    Args:
        fabric: launched; knows device, precision and processes.
        name: the network's.
        params: all of params.yaml.
        network: in its initial state.
        slices: of the training cases.
        validation: slices of the validation cases.
        batch_size: slices in an optimiser step, over all processes.
        checkpoints: where its state is kept; None keeps none.
        stop: asked after every step.
        on_epoch: given the metrics of each epoch and measurements that no artefact holds; in the
            first process only.

    Raises:
        StageError: the slices do not fill a step, or a step cannot be dealt out evenly.
    """

    def __init__(
        self,
        fabric: Fabric,
        name: str,
        params: Params,
        network: SegmentationNetwork,
        slices: SliceDataset,
        validation: SliceDataset,
        batch_size: int,
        checkpoints: Checkpoints | None,
        stop: StopRequest,
        on_epoch: Callable[[dict[str, float], dict[str, float]], None],
    ) -> None:
        train = params.train
        self._fabric, self._name, self._params = fabric, name, params
        self._slices, self._validation = slices, validation
        self._checkpoints, self._stop, self._on_epoch = checkpoints, stop, on_epoch
        self._plan = Plan(batch_size, train.num_accumulated, fabric.world_size, fabric.global_rank)
        self._order = EpochOrder(slices.organ_free, train.organ_free_share, train.seed)
        self._num_steps = len(self._order) // batch_size
        if not self._num_steps:
            raise StageError(
                f"{len(self._order)} training slices do not fill one batch of {batch_size}; "
                "lower train.batch_size or add scans"
            )
        if fabric.world_size > 1:
            synchronise_norms(network)
        network = convert_conv2d_weight_memory_format(
            network.to(fabric.device), torch.channels_last
        )
        self._network = network
        self._average = (
            AveragedModel(
                network,
                multi_avg_fn=get_ema_multi_avg_fn(train.ema_decay),  # type: ignore[no-untyped-call]
            )
            if train.ema_decay
            else None
        )
        optimizer = make_optimizer(network, train)
        compiled = cast(nn.Module, torch.compile(network)) if train.compile else network
        self._model, self._optimizer = fabric.setup(compiled, optimizer)
        self._learner = Learner(
            self._model,
            len(params.organs),
            params.slice.window_hu,
            params.recipes[name].loss_terms,
            Augment(train.augment, params.slice.window_hu, train.seed),
        )
        self.position = Position()
        self.best_weights: dict[str, Tensor] = {}
        self._clock = Clock()
        self._last_kept = time.monotonic()

    @property
    def evaluated(self) -> SegmentationNetwork:
        """The network that is validated and kept: the averaged one, if there is one."""
        if self._average is None:
            return self._network
        return cast(SegmentationNetwork, self._average.module)

    def state(self) -> dict[str, Any]:
        """All that is needed to go on from here."""
        return {
            "network": self._network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "best_weights": self.best_weights,
            "position": asdict(self.position),
            "batch_size": self._plan.batch_size,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; from another number of processes, too."""
        self._network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        self.best_weights = state["best_weights"]
        self.position = Position(**state["position"])

    def run(self) -> None:
        """Train to the end.

        Raises:
            StageError: a loss or gradient is not finite; nothing has been learned from it.
            Interrupted: a signal asked to stop; the state has been kept.
        """
        train, position = self._params.train, self.position
        batches = training_batches(
            self._slices,
            self._order,
            self._plan,
            train.num_epochs,
            (position.epoch, position.step),
            num_workers=self._num_workers(),
            pin_memory=self._fabric.device.type == "cuda",
        )
        display = TrainingDisplay(
            self._name,
            train.num_epochs,
            self._num_steps,
            position.epoch * self._num_steps + position.step,
            is_shown=self._fabric.is_global_zero,
        )
        with display, closing(ahead(self._parts(batches))) as parts:
            try:
                while position.epoch < train.num_epochs:
                    self._train_epoch(parts, display)
                    self._close_epoch(display)
            except Interrupted:
                self._keep()
                if self._checkpoints is not None:
                    display.say(
                        f"{self._name}: stopped in epoch {position.epoch + 1} after step "
                        f"{position.step}; run again to go on from there"
                    )
                raise

    def _parts(self, batches: Iterator[Batch]) -> Iterator[Part]:
        """Each batch with its augmented image and masks, on the device."""
        for batch in batches:
            here = batch.to(self._fabric.device)
            yield here, *self._learner.prepare(here)

    def _train_epoch(self, parts: Iterator[Part], display: TrainingDisplay) -> None:
        """The steps of an epoch that are still to do."""
        position = self.position
        self._model.train()
        while position.step < self._num_steps:
            started = time.perf_counter()
            values, asked_to_stop = self._step(parts)
            for key, value in values.items():
                position.sums[key] = position.sums.get(key, 0.0) + value
            position.step += 1
            if asked_to_stop:
                self._stop.raise_if_asked()
                raise Interrupted(asked_to_stop)
            if time.monotonic() - self._last_kept >= self._params.compute.checkpoint_interval_s:
                self._keep()
            elapsed = time.perf_counter() - started
            self._clock.total += elapsed
            self._clock.num_slices += self._plan.batch_size
            display.step(
                position.epoch + 1, position.step, values["total"], self._plan.batch_size / elapsed
            )

    def _step(self, parts: Iterator[Part]) -> tuple[dict[str, float], int]:
        """One optimiser step; its metrics, and the signal that asked any process to stop, or 0."""
        train, position = self._params.train, self.position
        rate = learning_rate(
            train,
            position.epoch * self._num_steps + position.step,
            train.num_epochs * self._num_steps,
        )
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        used: list[Batch] = []
        sums: dict[str, Tensor] = {}
        for part in range(self._plan.num_accumulated):
            waited = time.perf_counter()
            batch, image_BCHW, mask_BKHW = next(parts)
            self._clock.waiting += time.perf_counter() - waited
            used.append(batch)
            seed_step(train.seed, position.epoch, position.step, part, self._fabric.global_rank)
            is_last = part == self._plan.num_accumulated - 1
            computed = time.perf_counter()
            with self._fabric.no_backward_sync(self._model, enabled=not is_last):
                loss, terms = self._learner.loss(image_BCHW, mask_BKHW, batch.annotated_BK)
                # Gradients are averaged over processes; a part weighs what it holds of the step.
                self._fabric.backward(loss * (batch.share * self._fabric.world_size))
            for key, value in terms.items():
                weighted = value * batch.share
                sums[key] = sums[key] + weighted if key in sums else weighted
            self._clock.computing += time.perf_counter() - computed
        computed = time.perf_counter()
        norm = self._fabric.clip_gradients(
            self._model,
            self._optimizer,
            max_norm=train.gradient_clip_norm,
            error_if_nonfinite=False,
        )
        values, asked_to_stop = self._agree(sums)
        self._refuse_not_finite(values["total"], float(cast(Tensor, norm)), used)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._average is not None:
            self._average.update_parameters(self._network)
        self._clock.computing += time.perf_counter() - computed
        return values, asked_to_stop

    def _agree(self, sums: Mapping[str, Tensor]) -> tuple[dict[str, float], int]:
        """Metrics summed over processes, and the largest signal that asked one of them to stop."""
        values = torch.stack(list(sums.values()))
        asked = self._stop.signal_number
        if self._fabric.world_size > 1:
            self._fabric.all_reduce(values, reduce_op="sum")
            signals = torch.tensor([asked], device=self._fabric.device)
            self._fabric.all_reduce(signals, reduce_op="max")
            asked = int(signals)
        return dict(zip(sums, values.tolist(), strict=True)), asked

    def _refuse_not_finite(self, loss: float, norm: float, batches: list[Batch]) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        names = {self._slices.cases[case] for batch in batches for case in batch.case_B.tolist()}
        if self._fabric.world_size > 1:
            gathered: list[set[str]] = [set()] * self._fabric.world_size
            torch.distributed.all_gather_object(gathered, names)
            names = set().union(*gathered)
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient's length is {norm}"
        raise StageError(
            f"the {what} in epoch {self.position.epoch + 1}, step {self.position.step + 1}, with "
            f"slices of {', '.join(sorted(names))}; nothing was learned from it: lower "
            "train.learning_rate, or look for broken scans"
        )

    def _close_epoch(self, display: TrainingDisplay) -> None:
        position, clock = self.position, self._clock
        started = time.perf_counter()
        scores = self._validate()
        validated = time.perf_counter()
        num_slices = self._num_steps * self._plan.batch_size
        used = self._order.of_epoch(position.epoch)[:num_slices]
        num_free = int(self._slices.organ_free[used].sum())
        metrics: dict[str, float] = {
            "epoch": position.epoch + 1,
            "learning_rate": self._optimizer.param_groups[0]["lr"],
            "slices/organ": num_slices - num_free,
            "slices/organ_free": num_free,
            **{f"train/{key}": total / self._num_steps for key, total in position.sums.items()},
            **scores,
        }
        improved = scores["val/dice"] > position.best_dice
        if improved:
            position.best_epoch, position.best_dice = position.epoch + 1, scores["val/dice"]
            self.best_weights = {
                key: value.detach().cpu().clone()
                for key, value in self.evaluated.state_dict().items()
            }
        position.rows.append(metrics)
        position.epoch, position.step, position.sums = position.epoch + 1, 0, {}
        self._clock = Clock()
        display.epoch(metrics, improved=improved)
        if self._fabric.is_global_zero:
            measured = {"time/validation_s": validated - started}
            if clock.total:
                measured |= {
                    "time/training_s": clock.total,
                    "time/training_slices_per_s": clock.num_slices / clock.total,
                    "time/waiting_share": clock.waiting / clock.total,
                    "time/outside_share": 1 - clock.computing / clock.total,
                }
            self._on_epoch(metrics, measured)

    def _validate(self) -> dict[str, float]:
        """Metrics over the validation cases, whose batches the processes share."""
        network, params = self.evaluated, self._params
        network.eval()
        batches = whole_batches(
            self._validation,
            params.evaluate.batch_size,
            rank=self._fabric.global_rank,
            num_processes=self._fabric.world_size,
        )

        def predict(image_BCHW: Tensor) -> Output:
            if self._fabric.world_size == 1:
                self._stop.raise_if_asked()
            with self._fabric.autocast():
                return cast(Output, network(image_BCHW))

        counts_VKN = count_cases(
            predict,
            batches,
            len(self._validation.cases),
            len(params.organs),
            params.slice.window_hu,
            self._fabric.device,
            threshold=params.evaluate.threshold,
            min_false_positive_px=params.evaluate.min_false_positive_px,
        )
        self._fabric.all_reduce(counts_VKN, reduce_op="sum")
        return metrics_of(counts_VKN, tuple(params.organs))

    def _keep(self) -> None:
        """Write a checkpoint, in the first process."""
        self._last_kept = time.monotonic()
        if self._checkpoints is not None and self._fabric.is_global_zero:
            self._checkpoints.save(self.state())

    def _num_workers(self) -> int:
        asked = self._params.compute.num_loader_workers
        if asked is not None:
            return asked
        return NUM_AUTO_WORKERS if self._fabric.device.type == "cuda" else 0
