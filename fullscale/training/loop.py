"""The training loop: steps, epochs, validation, checkpoints; on one device or many processes.

All randomness derives from seed, epoch, step and rank; no RNG state is saved. A training that is
resumed from a checkpoint therefore ends with the same weights as one that was never interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fullscale.params import Params
from fullscale.runtime.checkpoints import Checkpoints
from fullscale.runtime.errors import StageError
from fullscale.runtime.prefetch import prefetch
from fullscale.runtime.progress import TrainingDisplay, training_title
from fullscale.runtime.signals import Interrupted, StopRequest
from fullscale.runtime.startup import compiler_left_out
from fullscale.training.augmentation import Augment
from fullscale.training.dataset import (
    Batch,
    BatchSharding,
    SliceDataset,
    TrainingSlices,
    training_batches,
    whole_batches,
)
from fullscale.training.step import SegmentationObjective, learning_rate, make_optimizer, seed_step
from fullscale.training.validation import count_cases, metrics_of
from model.output import Output
from model.segmentation import SegmentationNetwork
from model.synchronised import synchronise_norms

if TYPE_CHECKING:
    from lightning_fabric import Fabric

NUM_AUTO_WORKERS = 8
MicroBatch = tuple[Batch, Tensor, Tensor, Tensor | None]
"""A process's share of one forward and backward pass, on the device: the batch, and what
`SegmentationObjective.prepare` makes of it."""


@dataclass
class TrainingState:
    """Progress of a training.

    Attributes:
        epoch: current epoch, counted from 0.
        step: optimiser steps done in it.
        sums: sum of each training metric over those steps.
        rows: metrics of the finished epochs.
        best_epoch, best_dice: epoch with the highest validation Dice, counted from 1, and that
            Dice; 0 and -1 before the first epoch ends.
    """

    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    best_dice: float = -1.0


@dataclass
class EpochTimer:
    """Time spent in the steps of an epoch, in seconds.

    Attributes:
        num_slices: slices trained on, over all processes.
        total: whole time of the steps.
        waiting: waiting for slices from the loader and their augmentation.
        computing: forward pass, backward pass and optimiser.
    """

    num_slices: int = 0
    total: float = 0.0
    waiting: float = 0.0
    computing: float = 0.0


@dataclass(frozen=True)
class TrainingTask:
    """A network's name, seed and settings, and the slices to train it on.

    Attributes:
        name: of the network in params.yaml.
        seed: of order, augmentation and dropout; the network's weights were drawn with it.
        params: all of params.yaml.
        slices: of the training cases.
        validation: slices of the validation cases.
        batch_size: slices in an optimiser step, over all processes.
    """

    name: str
    seed: int
    params: Params
    slices: SliceDataset
    validation: SliceDataset
    batch_size: int


@dataclass(frozen=True)
class TrainingHooks:
    """Callbacks and checkpoints of a training.

    Attributes:
        on_epoch: called after each epoch, in the first process only, with its metrics and with
            measured times, which depend on the machine and are in no artefact.
        checkpoints: receives the state of the training; None saves no checkpoint.
        stop: checked after every step.
    """

    on_epoch: Callable[[dict[str, float], dict[str, float]], None]
    checkpoints: Checkpoints | None = None
    stop: StopRequest = field(default_factory=StopRequest)


class Training:
    """One training, from its start or from a checkpoint to its end.

    Args:
        fabric: launched; gives device, precision and processes.
        network: with its initial weights.
        task: what to train.
        hooks: reports, checkpoints and stop request.

    Raises:
        StageError: the slices do not fill a step, or a step cannot be divided evenly.
    """

    def __init__(
        self,
        fabric: Fabric,
        network: SegmentationNetwork,
        task: TrainingTask,
        hooks: TrainingHooks,
    ) -> None:
        params, slices, batch_size = task.params, task.slices, task.batch_size
        train = params.train
        self._fabric, self._params = fabric, params
        self._seed, self._title = task.seed, training_title(task.name, task.seed)
        self._slices, self._validation = slices, task.validation
        self._checkpoints, self._stop, self._on_epoch = (
            hooks.checkpoints,
            hooks.stop,
            hooks.on_epoch,
        )
        self._sharding = BatchSharding(
            batch_size, train.num_accumulated, fabric.world_size, fabric.global_rank
        )
        self._order = slices.make_order(train, task.seed)
        self._num_steps = len(self._order) // batch_size
        if not self._num_steps:
            raise StageError(
                f"{len(self._order)} training slices do not fill one batch of {batch_size}; "
                "lower train.batch_size, raise train.slices_per_epoch or add scans"
            )
        if fabric.world_size > 1:
            synchronise_norms(network)
        # Channels last is the fastest layout for convolutions; inputs are converted to it, too.
        network = convert_conv2d_weight_memory_format(
            network.to(fabric.device), torch.channels_last
        )
        self._network = network
        self._average = (
            AveragedModel(
                network,
                multi_avg_fn=get_ema_multi_avg_fn(train.ema_decay),  # type: ignore[no-untyped-call]
                # The means and variances of batch norms belong to the weights they are used with.
                use_buffers=True,
            )
            if train.ema_decay
            else None
        )
        optimizer = make_optimizer(network, train)
        compiled = cast(nn.Module, torch.compile(network)) if train.compile else network
        self._model, self._optimizer = fabric.setup(compiled, optimizer)
        self._objective = SegmentationObjective(
            self._model,
            len(params.organs),
            params.slice.window_hu,
            params.recipes[task.name].loss_terms,
            Augment(train.augment, params.slice.window_hu, task.seed),
            train.side_weights,
        )
        self.progress = TrainingState()
        self.best_weights: dict[str, Tensor] = {}
        self._timer = EpochTimer()
        self._last_saved = time.monotonic()

    @property
    def evaluated(self) -> SegmentationNetwork:
        """Return the network to validate and to save: the averaged one if weights are averaged."""
        if self._average is None:
            return self._network
        return cast(SegmentationNetwork, self._average.module)

    def state(self) -> dict[str, Any]:
        """Return everything needed to resume from here."""
        with compiler_left_out():
            optimizer = self._optimizer.state_dict()
        return {
            "network": self._network.state_dict(),
            "optimizer": optimizer,
            "average": None if self._average is None else self._average.state_dict(),
            "best_weights": self.best_weights,
            "position": asdict(self.progress),
            "batch_size": self._sharding.batch_size,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume from a state; the number of processes may have changed."""
        self._network.load_state_dict(state["network"])
        with compiler_left_out():
            self._optimizer.load_state_dict(state["optimizer"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        self.best_weights = state["best_weights"]
        self.progress = TrainingState(**state["position"])

    def run(self) -> None:
        """Train to the end.

        Raises:
            StageError: a loss or gradient is not finite; the weights were not updated with it.
            Interrupted: a signal asked to stop; a checkpoint has been saved.
        """
        train, progress = self._params.train, self.progress
        batches = training_batches(
            TrainingSlices(self._slices, self._order, self._sharding),
            train.num_epochs,
            (progress.epoch, progress.step),
            num_workers=self._num_workers(),
            pin_memory=self._fabric.device.type == "cuda",
        )
        display = TrainingDisplay(
            self._title,
            train.num_epochs,
            self._num_steps,
            progress.epoch * self._num_steps + progress.step,
            is_shown=self._fabric.is_global_zero,
        )
        parts = self._micro_batches(batches)
        if self._fabric.device.type != "cpu":
            # A thread augments the next batch while the device computes this one. On a CPU it would
            # only be in the way of the threads that compute: steps would take 1.4 times as long.
            parts = prefetch(parts)
        with display, closing(parts):
            try:
                while progress.epoch < train.num_epochs:
                    self._train_epoch(parts, display)
                    self._close_epoch(display)
            except Interrupted:
                self._save_checkpoint()
                if self._checkpoints is not None:
                    display.log(
                        f"{self._title}: stopped in epoch {progress.epoch + 1} after step "
                        f"{progress.step}; run again to resume from there"
                    )
                raise

    def _micro_batches(self, batches: Iterator[Batch]) -> Generator[MicroBatch]:
        """Yield each batch with its augmented image, masks and ignored pixels, on the device."""
        for batch in batches:
            here = batch.to(self._fabric.device)
            yield here, *self._objective.prepare(here)

    def _train_epoch(self, parts: Iterator[MicroBatch], display: TrainingDisplay) -> None:
        """Do the remaining steps of the current epoch."""
        progress = self.progress
        self._model.train()
        while progress.step < self._num_steps:
            started = time.perf_counter()
            values, stop_signal = self._step(parts)
            for key, value in values.items():
                progress.sums[key] = progress.sums.get(key, 0.0) + value
            progress.step += 1
            if stop_signal:
                # The signal may have reached another process; all of them stop after this step.
                self._stop.raise_if_requested()
                raise Interrupted(stop_signal)
            if time.monotonic() - self._last_saved >= self._params.compute.checkpoint_interval_s:
                self._save_checkpoint()
            elapsed = time.perf_counter() - started
            self._timer.total += elapsed
            self._timer.num_slices += self._sharding.batch_size
            display.show_step(
                progress.epoch + 1,
                progress.step,
                values["total"],
                self._sharding.batch_size / elapsed,
            )

    def _step(self, parts: Iterator[MicroBatch]) -> tuple[dict[str, float], int]:
        """Do one optimiser step.

        Returns:
            Its metrics, and the number of the signal that asked any process to stop, or 0.
        """
        train, progress = self._params.train, self.progress
        rate = learning_rate(
            train,
            progress.epoch * self._num_steps + progress.step,
            train.num_epochs * self._num_steps,
        )
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        used: list[Batch] = []
        sums: dict[str, Tensor] = {}
        for part in range(self._sharding.num_accumulated):
            waited = time.perf_counter()
            batch, image_BCHW, mask_BKHW, ignored_BHW = next(parts)
            self._timer.waiting += time.perf_counter() - waited
            used.append(batch)
            # Dropout draws the same numbers here whether or not the training was interrupted.
            seed_step(self._seed, progress.epoch, progress.step, part, self._fabric.global_rank)
            is_last = part == self._sharding.num_accumulated - 1
            computed = time.perf_counter()
            with self._fabric.no_backward_sync(self._model, enabled=not is_last):
                loss, terms = self._objective.loss(
                    image_BCHW, mask_BKHW, ignored_BHW, batch.annotated_BK
                )
                # DDP averages gradients over processes: undo it, and weight each part by its
                # share of the step's annotated (slice, organ) pairs. The gradient is then that of
                # the mean over the whole step, however it was divided.
                self._fabric.backward(loss * (batch.share * self._fabric.world_size))
            for key, value in terms.items():
                weighted = value * batch.share
                sums[key] = sums[key] + weighted if key in sums else weighted
            self._timer.computing += time.perf_counter() - computed
        computed = time.perf_counter()
        norm = self._fabric.clip_gradients(
            self._model,
            self._optimizer,
            max_norm=train.gradient_clip_norm,
            error_if_nonfinite=False,
        )
        # Reads values from the device: the first wait for it in this step.
        values, stop_signal = self._reduce_metrics(sums)
        self._refuse_not_finite(values["total"], float(cast(Tensor, norm)), used)
        with compiler_left_out():
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        if self._average is not None:
            self._average.update_parameters(self._network)
        self._timer.computing += time.perf_counter() - computed
        return values, stop_signal

    def _reduce_metrics(self, sums: Mapping[str, Tensor]) -> tuple[dict[str, float], int]:
        """Sum metrics over processes; also return the largest signal that any of them received."""
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
            f"the {what} in epoch {self.progress.epoch + 1}, step {self.progress.step + 1}, with "
            f"slices of {', '.join(sorted(names))}; nothing was learned from it: lower "
            "train.learning_rate, or look for broken scans"
        )

    def _close_epoch(self, display: TrainingDisplay) -> None:
        """Validate, record the epoch's metrics, and keep its weights if it is the best so far."""
        progress, timer = self.progress, self._timer
        started = time.perf_counter()
        scores = self._validate()
        validated = time.perf_counter()
        num_slices = self._num_steps * self._sharding.batch_size
        used = self._order.of_epoch(progress.epoch)[:num_slices]
        num_free = int(self._slices.organ_free[used].sum())
        metrics: dict[str, float] = {
            "epoch": progress.epoch + 1,
            "learning_rate": self._optimizer.param_groups[0]["lr"],
            "slices/organ": num_slices - num_free,
            "slices/organ_free": num_free,
            **{f"train/{key}": total / self._num_steps for key, total in progress.sums.items()},
            **scores,
        }
        improved = scores["val/dice"] > progress.best_dice
        if improved:
            progress.best_epoch, progress.best_dice = progress.epoch + 1, scores["val/dice"]
            self.best_weights = {
                key: value.detach().cpu().clone()
                for key, value in self.evaluated.state_dict().items()
            }
        progress.rows.append(metrics)
        progress.epoch, progress.step, progress.sums = progress.epoch + 1, 0, {}
        self._timer = EpochTimer()
        display.show_epoch(metrics, improved=improved)
        if self._fabric.is_global_zero:
            measured = {"time/validation_s": validated - started}
            if timer.total:
                measured |= {
                    "time/training_s": timer.total,
                    "time/training_slices_per_s": timer.num_slices / timer.total,
                    "time/waiting_share": timer.waiting / timer.total,
                    "time/outside_share": 1 - timer.computing / timer.total,
                }
            self._on_epoch(metrics, measured)

    def _validate(self) -> dict[str, float]:
        """Return metrics over the validation cases; each process computes some of the batches."""
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
                self._stop.raise_if_requested()
            with self._fabric.autocast():
                return cast(Output, network(image_BCHW))

        num_cases = len(self._validation.cases)
        counts_VKN = count_cases(predict, batches, num_cases, params, self._fabric.device)
        # Counts are integers, so the metrics do not depend on the number of processes.
        self._fabric.all_reduce(counts_VKN, reduce_op="sum")
        return metrics_of(counts_VKN, tuple(params.organs))

    def _save_checkpoint(self) -> None:
        """Save a checkpoint; the first process does."""
        self._last_saved = time.monotonic()
        if self._checkpoints is not None and self._fabric.is_global_zero:
            self._checkpoints.save(self.state())

    def _num_workers(self) -> int:
        """Return the number of loader processes; 0 reads in this one, which suffices for a CPU."""
        asked = self._params.compute.num_loader_workers
        if asked is not None:
            return asked
        return NUM_AUTO_WORKERS if self._fabric.device.type == "cuda" else 0
