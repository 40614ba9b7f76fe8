"""Stage train: one network, learned from the training cases, chosen on the validation cases."""

from __future__ import annotations

import copy
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock, Timeout
from lightning_fabric import Fabric

from fullscale.params import Params
from fullscale.prediction.network_files import (
    WEIGHTS_NAME,
    TrainedOn,
    build,
    describe,
    save_trained,
)
from fullscale.reporting.training_pictures import Reporter
from fullscale.runtime.checkpoints import Checkpoints
from fullscale.runtime.console import report_errors
from fullscale.runtime.errors import StageError
from fullscale.runtime.files import file_sha256
from fullscale.runtime.processes import die_with_parent
from fullscale.runtime.signals import StopRequest, stop_on_signal
from fullscale.scans.slice_store import SliceStore
from fullscale.tracking.runs import TrainingRun, training_run
from fullscale.tracking.store import WEIGHTS_TAG, default_store
from fullscale.training.batch_size import find_batch_size, out_of_memory_explained, uses_bf16
from fullscale.training.dataset import SliceDataset
from fullscale.training.history import HISTORY_NAME, write_history
from fullscale.training.loop import Training
from fullscale.versioning.provenance import (
    digest_test_set,
    library_versions,
    read_provenance,
    stage_code,
)
from fullscale.workspace import parse_network_command
from model.segmentation import SegmentationNetwork

# Where work is done and how it is shared changes weights by rounding only.
NOT_IDENTITY = {"devices", "num_nodes", "strategy", "num_picture_slices"}


def make_fabric(params: Params) -> Fabric:
    """Devices, processes and precision as params ask; still to be launched."""
    train = params.train
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(mode=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Fabric(
        accelerator="auto",
        devices=train.devices,
        num_nodes=train.num_nodes,
        strategy=train.strategy,
        precision="bf16-mixed" if uses_bf16(params, device) else "32-true",
    )


def train_network(
    name: str,
    params: Params,
    store: SliceStore,
    split: pd.DataFrame,
    folder: Path,
    run: TrainingRun | None,
    *,
    fabric: Fabric | None = None,
    checkpoints: Checkpoints | None = None,
    state: Mapping[str, Any] | None = None,
    stop: StopRequest | None = None,
) -> None:
    """Train network `name` and leave its best epoch in `folder`.

    Best means the highest mean 3D Dice of the validation cases; test cases are never read.

    Args:
        name: one of params.networks.
        params: all of params.yaml.
        store: slices of every case.
        split: columns case, patient, fold.
        folder: receives weights.safetensors, network.json and history.csv, at the end.
        run: where the training is tracked; None in all processes but the first.
        fabric: launched; None trains on one device.
        checkpoints: where its state is kept; None keeps none.
        state: of a checkpoint, to go on from; only the first process needs it.
        stop: asked after every step.

    Raises:
        StageError: a fold is empty, memory runs out, or a loss is not finite.
        Interrupted: a signal asked to stop.
    """
    if fabric is None:
        fabric = make_fabric(params)
        fabric.launch()
    datasets = {fold: SliceDataset(store, cases_of(split, fold)) for fold in ("train", "val")}
    torch.manual_seed(params.train.seed)
    network = build(describe(name, params))
    state = fabric.broadcast(state)
    if state is not None:
        batch_size = int(state["batch_size"])
    else:
        batch_size = _choose_batch_size(network, name, params, datasets["train"], fabric)
    reporter = None if run is None else Reporter(name, params, datasets["val"], run)

    def on_epoch(metrics: dict[str, float], measured: dict[str, float]) -> None:
        if reporter is not None:
            reporter.log_epoch(metrics, measured)
            if (epoch := int(metrics["epoch"])) & (epoch - 1) == 0:
                reporter.log_prediction(epoch, training.evaluated)

    with out_of_memory_explained(batch_size, params.slice.size_px):
        training = Training(
            fabric,
            name,
            params,
            network,
            datasets["train"],
            datasets["val"],
            batch_size,
            checkpoints,
            stop or StopRequest(),
            on_epoch,
        )
        if state is not None:
            training.restore(state)
        elif reporter is not None:
            reporter.log_augmented(datasets["train"])
        training.run()
    position = training.position
    if not position.best_epoch:
        raise StageError(
            "no validation case has an organ, nor was any found in one: no epoch can be chosen; "
            "add scans, or change section split"
        )
    if fabric.is_global_zero:
        grids = [store.load(case).grid for case in cases_of(split, "train")]
        description = describe(name, params).model_copy(
            update={
                "epoch": position.best_epoch,
                "val_dice": position.best_dice,
                "trained_on": TrainedOn.of(grids),
            }
        )
        network.load_state_dict(training.best_weights)
        write_history(folder / HISTORY_NAME, position.rows)
        save_trained(folder, network, description)
    if reporter is not None:
        reporter.log_prediction(position.best_epoch, network)
        reporter.log_curves(position.rows)


def cases_of(split: pd.DataFrame, fold: str) -> list[str]:
    """The cases of a fold.

    Raises:
        StageError: there is none.
    """
    cases: list[str] = split.loc[split["fold"] == fold, "case"].tolist()
    if not cases:
        raise StageError(f"the split holds no {fold} cases; add scans or change section split")
    return cases


def identify(
    name: str, params: Params, store: SliceStore, split: pd.DataFrame, code: Mapping[str, str]
) -> dict[str, str]:
    """All that decides a network's weights, by name: settings, slices of each case, code."""
    settings = {
        "organs": params.organs,
        "recipe": params.recipes[name].model_dump(),
        "slice": params.slice.model_dump(),
        "train": params.train.model_dump(exclude=NOT_IDENTITY),
        "evaluate": params.evaluate.model_dump(include={"threshold", "min_false_positive_px"}),
    }
    cases = {
        f"slices of {fold} case {case}": file_sha256(store.root / case / "case.json")[:12]
        for fold in ("train", "val")
        for case in cases_of(split, fold)
    }
    return {
        **{key: str(value) for key, value in flatten(settings).items()},
        **cases,
        **{f"code {path}": digest for path, digest in code.items()},
    }


def flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping to one level, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


@contextmanager
def only_trainer(folder: Path, stop: StopRequest) -> Iterator[None]:
    """Within, no other process trains in `folder`; one that is about to end is waited for."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    told = False
    while True:
        try:
            lock.acquire(timeout=1)
            break
        except Timeout:
            stop.raise_if_asked()
            if not told:
                print(f"train: waiting for another training in {folder}", flush=True)
                told = True
    try:
        yield
    finally:
        lock.release()


def _choose_batch_size(
    network: SegmentationNetwork,
    name: str,
    params: Params,
    slices: SliceDataset,
    fabric: Fabric,
) -> int:
    asked = params.train.batch_size
    if asked != "auto":
        return asked
    found = 0
    if fabric.is_global_zero:
        found = find_batch_size(
            copy.deepcopy(network).to(fabric.device),
            params,
            params.recipes[name].loss_terms,
            len(slices),
            fabric.device,
            fabric.world_size,
        )
    return int(fabric.broadcast(found))


@report_errors
def main() -> None:
    """Run the stage for one network: `python -m tasks.train NETWORK`."""
    die_with_parent()
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    workspace, params, name = parse_network_command("train", sys.argv[1:])
    root = workspace.root
    store = SliceStore(workspace.slices)
    split = pd.read_csv(workspace.split, dtype=str)
    folder = workspace.trained(name)
    with stop_on_signal() as stop:
        fabric = make_fabric(params)
        fabric.launch()
        if not fabric.is_global_zero:
            train_network(name, params, store, split, folder, None, fabric=fabric, stop=stop)
            return
        work = workspace.work / name
        with only_trainer(work, stop):
            identity = identify(name, params, store, split, stage_code(root, "train"))
            checkpoints = Checkpoints(work / "checkpoints", identity)
            state = checkpoints.load()
            with training_run(
                default_store(root),
                f"{workspace.profile} {name}".lstrip(),
                _parameters(name, params),
                _tags(name, split, root),
                read_provenance(root).data_version,
                workspace.tracking(name),
                resume=state is not None,
            ) as run:
                train_network(
                    name,
                    params,
                    store,
                    split,
                    folder,
                    run,
                    fabric=fabric,
                    checkpoints=checkpoints,
                    state=state,
                    stop=stop,
                )
                run.log_files(folder, "trained")
                run.set_tag(WEIGHTS_TAG, file_sha256(folder / WEIGHTS_NAME))
            checkpoints.clear()


def _parameters(name: str, params: Params) -> dict[str, Any]:
    dump = params.model_dump(by_alias=True, include={"organs", "slice", "split", "train"})
    return flatten({**dump, "recipe": params.recipes[name].model_dump()})


def _tags(name: str, split: pd.DataFrame, root: Path) -> dict[str, str]:
    provenance = read_provenance(root)
    return {
        "fullscale.network": name,
        "fullscale.git_commit": provenance.git_commit,
        "fullscale.data_version": provenance.data_version,
        "fullscale.test_set": digest_test_set(split.loc[split["fold"] == "test", "case"]),
        **{f"fullscale.version.{library}": text for library, text in library_versions().items()},
    }


if __name__ == "__main__":
    main()
