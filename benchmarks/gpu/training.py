"""Measure trainings: loader, batch size, memory that runs out, resuming, determinism, DDP."""

from __future__ import annotations

import copy
import io
import logging
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.settings import Report, Settings
from benchmarks.training import rate_of
from fullscale.params import Params, load_params
from fullscale.prediction.network_files import build, describe_network
from fullscale.runtime.checkpoints import Checkpoints
from fullscale.runtime.errors import StageError
from fullscale.runtime.files import file_sha256
from fullscale.runtime.signals import Interrupted, StopRequest
from fullscale.scans.cohort import Case
from fullscale.scans.slice_store import SliceStore
from fullscale.scans.slice_writer import SliceRecipe, write_case, write_tables
from fullscale.scans.volume import write_volume
from fullscale.training.batch_size import find_batch_size, out_of_memory_explained
from fullscale.training.dataset import BatchSharding, SliceDataset, TrainingSlices, training_batches
from fullscale.training.fabric import make_fabric
from fullscale.training.loop import NUM_AUTO_WORKERS, Training, TrainingHooks, TrainingTask
from tests.shared.bodies import lps_affine, make_body

NETWORK = "unet3plus"
FIELD_MM = 512.0
SCAN_ZYX, SPACING_MM = (16, 128, 160), (10.0, 2.5, 2.5)
NUM_EPOCHS = 2
TOO_MANY_BYTES = 2**50


@dataclass
class Trainings:
    """Trainings on a small simulated cohort, at the size of the settings.

    Attributes:
        settings: sizes.
        params: of params.yaml, with these sizes.
        slices: of all cases.
    """

    settings: Settings
    params: Params
    slices: SliceDataset

    @cached_property
    def first(self) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        """A training as params.yaml has it."""
        return self.train()

    @cached_property
    def deterministic(self) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        """A training with `train.deterministic`."""
        return self.train(deterministic=True)

    def train(
        self,
        checkpoints: Checkpoints | None = None,
        state: Mapping[str, Any] | None = None,
        stop_after: int = 0,
        **changes: object,
    ) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        """Train a network anew, or from a checkpoint.

        Args:
            checkpoints: receives the state when the training is stopped.
            state: to resume from.
            stop_after: epoch after which the next step is the last; 0: trains to the end.
            changes: keys of section train.

        Returns:
            The weights of the last step, and loss and measured times of each epoch.
        """
        train = self.params.train.model_copy(update=changes)
        params = self.params.model_copy(update={"train": train})
        stop, epochs = StopRequest(), []

        def on_epoch(metrics: dict[str, float], measured: dict[str, float]) -> None:
            epochs.append({**measured, "loss": metrics["train/total"]})
            if len(epochs) == stop_after:
                stop.signal_number = signal.SIGTERM

        torch.manual_seed(0)
        network = build(describe_network(NETWORK, params))
        fabric = make_fabric(params)
        fabric.launch()
        task = TrainingTask(NETWORK, 0, params, self.slices, self.slices, self.settings.batch_size)
        training = Training(fabric, network, task, TrainingHooks(on_epoch, checkpoints, stop))
        if state is not None:
            training.restore(state)
        with redirect_stderr(io.StringIO()), suppress(Interrupted):
            training.run()
        weights = training.state()["network"]
        return {key: value.detach().cpu().clone() for key, value in weights.items()}, epochs


@contextmanager
def small_trainings(settings: Settings) -> Iterator[Trainings]:
    """Yield trainings on simulated scans, which are temporary."""
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    params = load_params(Path("params.yaml"))
    organs = {organ: (number,) for number, organ in enumerate(params.organs, start=1)}
    sizes = {"size_px": settings.side_px, "pixel_mm": FIELD_MM / settings.side_px}
    lengths = {
        "width": settings.width,
        "num_epochs": NUM_EPOCHS,
        "slices_per_epoch": settings.num_steps * settings.batch_size,
    }
    params = params.model_copy(
        update={
            "organs": organs,
            "slice": params.slice.model_copy(update=sizes),
            "train": params.train.model_copy(update=lengths),
        }
    )
    recipe = SliceRecipe(
        organs,
        settings.side_px,
        params.slice.pixel_mm,
        params.slice.window_hu,
        params.slice.body_threshold_hu,
    )
    names = ["body_0", "body_1"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number, name in enumerate(names):
            image, label = (folder / f"{name}_{kind}.nii.gz" for kind in ("image", "label"))
            affine = lps_affine(SCAN_ZYX, SPACING_MM)
            for path, values_ZYX in zip(
                (image, label), make_body(SCAN_ZYX, SPACING_MM, seed=number), strict=True
            ):
                write_volume(path, values_ZYX.transpose(2, 1, 0), affine)
            case = Case(
                name, name, tuple(organs), "benchmark", image, label,
                file_sha256(image), file_sha256(label),
            )  # fmt: skip
            write_case(folder / "slices", case, tuple(organs), recipe)
        write_tables(folder / "slices", names, recipe, set())
        slices = SliceDataset(SliceStore(folder / "slices"), names, SPACING_MM[0])
        yield Trainings(settings, params, slices)


def run(settings: Settings, report: Report) -> None:
    """Measure."""
    with small_trainings(settings) as trainings:
        report.measure("loader against step", lambda: compare_loader(trainings))
        report.measure("train.batch_size auto", lambda: choose_batch_size(trainings))
        report.measure("out of memory", lambda: run_out_of_memory(settings))
        report.measure("one process with ddp", lambda: compare_ddp(trainings))
        # Last: determinism stays on in this process.
        report.measure("determinism", lambda: compare_runs(trainings))
        report.measure("resumed in the middle of an epoch", lambda: compare_resumed(trainings))


def compare_loader(trainings: Trainings) -> dict[str, float]:
    """Return slices a second of the loader alone and of training, and the time spent waiting."""
    settings, slices = trainings.settings, trainings.slices
    order = slices.make_order(trainings.params.train, 0)
    on_gpu = settings.device == "cuda"
    batches = training_batches(
        TrainingSlices(slices, order, BatchSharding(settings.batch_size)),
        NUM_EPOCHS,
        num_workers=NUM_AUTO_WORKERS if on_gpu else 0,
        pin_memory=on_gpu,
    )
    loader = rate_of(batches, NUM_EPOCHS * settings.num_steps * settings.batch_size)
    epochs = trainings.first[1][1:]  # the first one prepares kernels
    step, waiting, outside = (
        statistics.median(epoch[f"time/{key}"] for epoch in epochs)
        for key in ("training_slices_per_s", "waiting_share", "outside_share")
    )
    return {
        "loader_per_s": loader,
        "training_per_s": step,
        "loader / training": loader / step,
        "waiting_share": waiting,
        "outside_share": outside,
    }


def choose_batch_size(trainings: Trainings) -> dict[str, float]:
    """Return what `train.batch_size: auto` finds, and the seconds it takes."""
    params, device = trainings.params, torch.device(trainings.settings.device)
    network = build(describe_network(NETWORK, params)).to(device)
    started = time.perf_counter()
    found = find_batch_size(
        copy.deepcopy(network),
        params,
        params.recipes[NETWORK].loss_terms,
        8 * trainings.settings.largest_batch,
        device,
        1,
    )
    return {"batch_size": found, "seconds": time.perf_counter() - started}


def run_out_of_memory(settings: Settings) -> str:
    """Return the message of a step for which memory does not suffice.

    Raises:
        RuntimeError: there is so much memory.
    """
    try:
        with out_of_memory_explained(settings.batch_size, settings.side_px):
            torch.empty(TOO_MANY_BYTES, dtype=torch.uint8, device=settings.device)
    except StageError as error:
        return str(error)
    raise RuntimeError(f"{TOO_MANY_BYTES} bytes were given")


def compare_ddp(trainings: Trainings) -> dict[str, Any]:
    """Return how far the loss of one process under DDP is from that without it.

    Weights are not compared: AdamW makes steps of full length out of gradients that are rounding
    alone, such as those of biases before a batch norm.
    """
    alone, found = trainings.first[1], trainings.train(strategy="ddp")[1]
    backend = torch.distributed.get_backend()
    torch.distributed.destroy_process_group()
    return {
        "backend": backend,
        "relative difference of the loss": abs(found[-1]["loss"] / alone[-1]["loss"] - 1),
        "slices_per_s": found[-1]["time/training_slices_per_s"],
    }


def compare_runs(trainings: Trainings) -> dict[str, float]:
    """Return by how much two equal trainings differ, and what determinism costs."""
    found: dict[str, float] = {}
    for name, first, changes in (
        ("free", trainings.first, {}),
        ("deterministic", trainings.deterministic, {"deterministic": True}),
    ):
        weights, epochs = trainings.train(**changes)
        found[f"{name}: largest difference"] = largest_difference(first[0], weights)
        found[f"{name}: slices_per_s"] = epochs[-1]["time/training_slices_per_s"]
    return found


def compare_resumed(trainings: Trainings) -> dict[str, float]:
    """Return how far a training that was stopped and resumed is from one that was not."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), {})
        trainings.train(checkpoints, stop_after=1, deterministic=True)
        state = checkpoints.load()
        if state is None or not state["position"]["step"]:
            raise RuntimeError("the training was not stopped in the middle of an epoch")
        resumed, _ = trainings.train(checkpoints, state, deterministic=True)
    return {"largest difference": largest_difference(trainings.deterministic[0], resumed)}


def largest_difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Return the largest difference between two sets of weights; 0 if they are the same bits."""
    return max(float((first[key].double() - second[key].double()).abs().max()) for key in first)
