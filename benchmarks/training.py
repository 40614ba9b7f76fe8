"""Measure the loader against the training step, and the parts of an epoch's time.

    python -m benchmarks.training

Needs data/ and params.yaml, so run `dvc pull` first. The sample is sliced with the size of
params.yaml and with 320 px. For each size and network, in a separate process: slices a second of
the loader alone, of a plain loader (one file a slice, read one by one), of training, and of the
same training with a thread that augments the next batch meanwhile, as it is done beside a GPU;
the share of a large matrix product's rate that training reaches, a step being counted as three
forward passes with every head; the share of its time that is spent outside forward, backward and
optimiser; the peak of memory. Rates are medians over epochs or repeats.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.machine import describe_machine, measure_peak_tflops
from fullscale.params import Params, load_params
from fullscale.prediction.network_files import build, choose_neighbour_mm, describe_network
from fullscale.runtime.markdown import format_table
from fullscale.runtime.prefetch import prefetch
from fullscale.runtime.startup import keep_freed_memory
from fullscale.scans.slice_store import SliceStore
from fullscale.training.dataset import BatchSharding, SliceDataset, TrainingSlices, training_batches
from fullscale.training.fabric import make_fabric
from fullscale.training.loop import Training, TrainingHooks, TrainingTask
from model.networks import count_flop
from model.preprocessing import NUM_ADJACENT_SLICES
from tasks.slice import slice_cohort

NUM_VAL_CASES = 1
LARGE_PX = 320
MIB = 2**20


class FilePerSlice(Dataset[tuple[np.ndarray, np.ndarray]]):
    """The plain way: a file for each slice of image and label."""

    def __init__(self, slices: SliceDataset, folder: Path) -> None:
        folder.mkdir()
        self._folder, self._count = folder, len(slices)
        for index in range(len(slices)):
            batch = slices[index]
            np.savez(folder / f"{index}.npz", image=batch.image_BCHW[0], label=batch.label_BHW[0])

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        with np.load(self._folder / f"{index}.npz") as content:
            return content["image"], content["label"]


def rate_of(batches: Any, num_slices: int) -> float:
    """Slices a second of walking over batches."""
    start = time.perf_counter()
    for _ in batches:
        pass
    return num_slices / (time.perf_counter() - start)


class ThreadedTraining(Training):
    """Augments the next batch in a thread."""

    def _micro_batches(self, batches: Any) -> Any:
        return prefetch(super()._micro_batches(batches))


def time_epochs(task: TrainingTask, kind: type[Training]) -> list[dict[str, float]]:
    """Train; returns the seconds and rates of each epoch."""
    epochs: list[dict[str, float]] = []
    torch.manual_seed(0)
    fabric = make_fabric(task.params)
    fabric.launch()
    network = build(describe_network(task.name, task.params))
    hooks = TrainingHooks(on_epoch=lambda metrics, measured: epochs.append(measured))
    kind(fabric, network, task, hooks).run()
    return epochs


def median_of(epochs: list[dict[str, float]], key: str) -> float:
    """Return the median of a figure over the epochs after the first, which warms up."""
    return statistics.median(epoch[key] for epoch in epochs[1:] or epochs)


def measure(
    root: Path, params: Params, network: str, num_epochs: int, max_steps: int, repeats: int
) -> dict[str, Any]:
    """All figures of one network on one slice store."""
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    keep_freed_memory()
    store = SliceStore(root)
    cases = store.cases["case"].tolist()
    train = params.train.model_copy(update={"num_epochs": num_epochs})
    batch_size = int(train.batch_size)
    neighbour_mm = choose_neighbour_mm(
        params.slice.neighbour_mm, [store.load(case).grid for case in cases[NUM_VAL_CASES:]]
    )
    wanted = max_steps * batch_size
    slices = SliceDataset(store, cases[NUM_VAL_CASES:], neighbour_mm)
    if len(slices) > wanted:  # fewer cases, so that large slices take minutes, not hours
        share = wanted / len(slices)
        cases = cases[: NUM_VAL_CASES + max(1, round(share * (len(cases) - NUM_VAL_CASES)))]
        slices = SliceDataset(store, cases[NUM_VAL_CASES:], neighbour_mm)
    order = slices.make_order(train, 0)
    num_used = len(order) // batch_size * batch_size
    loader = [
        rate_of(
            training_batches(TrainingSlices(slices, order, BatchSharding(batch_size)), 1), num_used
        )
        for _ in range(repeats)
    ]
    with tempfile.TemporaryDirectory() as folder:
        plain = FilePerSlice(slices, Path(folder) / "files")
        plain_loader = [
            rate_of(DataLoader(plain, batch_size, shuffle=True, drop_last=True), num_used)
            for _ in range(repeats)
        ]
    params = params.model_copy(update={"train": train, "organs": store.label_ids})
    task = TrainingTask(
        network,
        0,
        params,
        slices,
        SliceDataset(store, cases[:NUM_VAL_CASES], neighbour_mm),
        batch_size,
    )
    threaded = time_epochs(task, ThreadedTraining)
    epochs = time_epochs(task, Training)

    with torch.device("meta"), torch.no_grad():
        network_alone = build(describe_network(network, params))
        x = torch.empty(1, NUM_ADJACENT_SLICES, store.size_px, store.size_px)
        tflop = 3 * count_flop(lambda: network_alone(x, all_heads=True)) / 1e12

    step = median_of(epochs, "time/training_slices_per_s")
    return {
        "size_px": store.size_px,
        "network": network,
        "loader": statistics.median(loader),
        "plain_loader": statistics.median(plain_loader),
        "step": step,
        "threaded_step": median_of(threaded, "time/training_slices_per_s"),
        "share_of_matrix_product": step
        * tflop
        / measure_peak_tflops(torch.device("cpu"), torch.float32),
        "outside_share": median_of(epochs, "time/outside_share"),
        "waiting_share": median_of(epochs, "time/waiting_share"),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB,
    }


def format_markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/benchmarks.md."""
    headings = (
        "slices", "network", "loader, slices/s", "plain loader", "loader / plain",
        "training, slices/s", "with a thread", "ratio", "of matrix rate", "loader / training",
        "time outside", "of it waiting", "peak, MiB",
    )  # fmt: skip
    cells = [
        (
            f"{row['size_px']} px",
            row["network"],
            f"{row['loader']:.0f}",
            f"{row['plain_loader']:.0f}",
            f"{row['loader'] / row['plain_loader']:.1f}",
            f"{row['step']:.1f}",
            f"{row['threaded_step']:.1f}",
            f"{row['step'] / row['threaded_step']:.2f}",
            f"{100 * row['share_of_matrix_product']:.0f} %",
            f"{row['loader'] / row['step']:.0f}",
            f"{100 * row['outside_share']:.1f} %",
            f"{100 * row['waiting_share']:.1f} %",
            f"{row['peak_mib']:.0f}",
        )
        for row in rows
    ]
    return "\n".join(format_table(headings, cells))


def main() -> None:
    """Print the table; with --json also write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3, help="the first warms up")
    parser.add_argument("--repeats", type=int, default=5, help="of the loaders")
    parser.add_argument("--steps", type=int, default=26, help="in an epoch, at most")
    parser.add_argument("--large-steps", type=int, default=5, help="the same at 320 px")
    parser.add_argument("--width", type=int, help="of the networks; default as in params.yaml")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    params = load_params(Path("params.yaml"))
    if arguments.width:
        train = params.train.model_copy(update={"width": arguments.width})
        params = params.model_copy(update={"train": train})
    print(json.dumps(describe_machine(torch.device("cpu"))), file=sys.stderr)
    context = multiprocessing.get_context("spawn")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size_px in sorted({params.slice.size_px, LARGE_PX}):
            sized = params.slice.model_copy(update={"size_px": size_px})
            sized_params = params.model_copy(update={"slice": sized})
            root = Path(folder) / str(size_px)
            slice_cohort(Path("data"), root, sized_params)
            for network in params.networks:
                with context.Pool(1) as pool:  # a process each, to measure its peak
                    steps = arguments.large_steps if size_px == LARGE_PX else arguments.steps
                    work = (root, sized_params, network, arguments.epochs, steps,
                            arguments.repeats)  # fmt: skip
                    rows.append(pool.apply(measure, work))
                print(format_markdown(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    print(format_markdown(rows))


if __name__ == "__main__":
    main()
