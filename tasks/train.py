"""Stage train: fit one network to the training cases; validation cases choose its epoch."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fullscale.params import Params
from fullscale.patient_split import cases_of, read_split, split_of_seed
from fullscale.prediction.network_files import (
    WEIGHTS_NAME,
    TrainedOn,
    build,
    choose_neighbour_mm,
    describe_network,
    save_trained,
)
from fullscale.runtime.checkpoints import Checkpoints
from fullscale.runtime.console import report_errors
from fullscale.runtime.cpu_kernels import fix_cpu_kernels
from fullscale.runtime.errors import StageError
from fullscale.runtime.files import file_sha256
from fullscale.runtime.locks import acquire_lock
from fullscale.runtime.processes import die_with_parent
from fullscale.runtime.progress import training_title
from fullscale.runtime.signals import StopRequest, stop_on_signal
from fullscale.runtime.startup import keep_freed_memory
from fullscale.scans.slice_store import SliceStore
from fullscale.tracking.run_record import RunDescription, RunRecord
from fullscale.tracking.runs import training_run
from fullscale.tracking.store import (
    COMMIT_TAG,
    DATA_VERSION_TAG,
    NETWORK_TAG,
    SEED_TAG,
    WEIGHTS_TAG,
    default_store,
)
from fullscale.training.batch_size import find_batch_size, out_of_memory_explained
from fullscale.training.dataset import SliceDataset
from fullscale.training.fabric import make_fabric
from fullscale.training.history import HISTORY_NAME, write_history
from fullscale.training.loop import Training, TrainingHooks, TrainingTask
from fullscale.training.validation import warn_of_classifier, warn_of_samples
from fullscale.versioning.provenance import (
    library_versions,
    read_provenance,
    stage_code,
)
from fullscale.workspace import parse_training_command
from model.segmentation import SegmentationNetwork

# Imported when used: lightning_fabric takes half a second.
if TYPE_CHECKING:
    import pandas as pd
    from lightning_fabric import Fabric

logger = logging.getLogger(__name__)

# Settings that change weights by rounding only, or not at all.
NOT_IDENTITY = {"devices", "num_nodes", "strategy", "num_picture_slices"}


@dataclass(frozen=True)
class TrainingSession:
    """The surroundings of one call of `train_network`.

    Attributes:
        run: tracks the training; None in all processes but the first.
        fabric: launched; None trains on one device.
        checkpoints: keep the state of the training; None keeps none.
        state: of a checkpoint, to resume from; only the first process needs it.
        stop: checked after every step.
    """

    run: RunRecord | None = None
    fabric: Fabric | None = None
    checkpoints: Checkpoints | None = None
    state: Mapping[str, Any] | None = None
    stop: StopRequest = field(default_factory=StopRequest)


def train_network(
    name: str,
    seed: int,
    params: Params,
    store: SliceStore,
    split: pd.DataFrame,
    folder: Path,
    session: TrainingSession,
) -> None:
    """Train network `name` with a seed and write its best epoch to `folder`.

    The best epoch has the highest mean 3D Dice of the validation cases. Test cases are never read.
    A slice classifier (CGM) that cannot learn, or did not, is a warning in the log.

    Args:
        name: one of params.networks.
        seed: of weights, order, augmentation and dropout, whatever params.seeds holds.
        params: all of params.yaml.
        store: slices of every case.
        split: columns case, patient, fold.
        folder: receives weights.safetensors, network.json and history.csv, at the end.
        session: run, devices and checkpoints.

    Raises:
        StageError: a fold is empty, memory runs out, or a loss is not finite.
        Interrupted: a signal asked to stop.
    """
    # The network's description has ids; only the slices know those of labels given by name.
    params = params.model_copy(update={"organs": store.label_ids})
    fabric, run = session.fabric, session.run
    if fabric is None:
        fabric = make_fabric(params)
        fabric.launch()
    grids = [store.load(case).grid for case in cases_of(split, "train")]
    neighbour_mm = choose_neighbour_mm(params.slice.neighbour_mm, grids)
    datasets = {
        fold: SliceDataset(store, cases_of(split, fold), neighbour_mm) for fold in ("train", "val")
    }
    torch.manual_seed(seed)
    network = build(describe_network(name, params))
    slices, organs = datasets["train"], tuple(params.organs)
    title = training_title(name, seed)
    order = slices.make_order(params.train, seed)
    warns = fabric.is_global_zero and network.classifier is not None
    if warns:
        first = order.of_epoch(0)
        warning = warn_of_samples(slices.annotated[first], slices.present[first], organs)
        _log_warning(title, warning)
    state = fabric.broadcast(session.state)
    if state is not None:
        batch_size = int(state["batch_size"])
    else:
        batch_size = _choose_batch_size(network, name, params, len(order), fabric)
    reporter = None
    if run is not None:
        from fullscale.reporting.training_pictures import Reporter

        reporter = Reporter(title, seed, params, datasets["val"], run)

    def on_epoch(metrics: dict[str, float], measured: dict[str, float]) -> None:
        if reporter is not None:
            reporter.log_epoch(metrics, measured)
            if (epoch := int(metrics["epoch"])) & (epoch - 1) == 0:
                reporter.log_prediction(epoch, training.evaluated)

    with out_of_memory_explained(batch_size, params.slice.size_px):
        training = Training(
            fabric,
            network,
            TrainingTask(name, seed, params, datasets["train"], datasets["val"], batch_size),
            TrainingHooks(on_epoch, session.checkpoints, session.stop),
        )
        if state is not None:
            training.restore(state)
        elif reporter is not None:
            reporter.log_augmented(datasets["train"])
        training.run()
    position = training.progress
    if not position.best_epoch:
        raise StageError(
            "no validation case has an organ, nor was any found in one: no epoch can be chosen; "
            "add scans, or change section split"
        )
    if warns:
        best = position.rows[position.best_epoch - 1]
        _log_warning(title, warn_of_classifier(best, organs))
    if fabric.is_global_zero:
        description = describe_network(name, params).model_copy(
            update={
                "epoch": position.best_epoch,
                "val_dice": position.best_dice,
                "trained_on": TrainedOn.of(grids),
                "slice": params.slice.model_copy(update={"neighbour_mm": neighbour_mm}),
            }
        )
        network.load_state_dict(training.best_weights)
        write_history(folder / HISTORY_NAME, position.rows)
        save_trained(folder, network, description)
    if reporter is not None:
        reporter.log_prediction(position.best_epoch, network)
        reporter.log_curves(position.rows)


def _log_warning(title: str, text: str | None) -> None:
    if text is not None:
        logger.warning(f"warning: {title}: {text}")


def identify(
    name: str,
    seed: int,
    params: Params,
    store: SliceStore,
    split: pd.DataFrame,
    code: Mapping[str, str],
) -> dict[str, str]:
    """Return what decides a network's weights, by name: settings, slices of each case, code."""
    settings = {
        "seed": seed,
        "organs": params.organs,
        "recipe": params.recipes[name].model_dump(),
        "slice": params.slice.model_dump(),
        "train": params.train.model_dump(exclude=NOT_IDENTITY),
        "evaluate": params.evaluate.model_dump(include={"threshold", "min_false_positive_mm2"}),
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
    """Flatten a nested mapping; keys are joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def _choose_batch_size(
    network: SegmentationNetwork,
    name: str,
    params: Params,
    num_slices: int,
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
            num_slices,
            fabric.device,
            fabric.world_size,
        )
    return int(fabric.broadcast(found))


@report_errors
def main() -> None:
    """Run the stage for one training: `python -m tasks.train NETWORK SEED`."""
    die_with_parent()
    keep_freed_memory()
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    workspace, params, name, seed = parse_training_command(sys.argv[1:])
    fix_cpu_kernels(params.train.cpu_kernels, params.train.num_threads)
    root = workspace.root
    store = SliceStore(workspace.slices)
    split = split_of_seed(read_split(workspace.split), params.split, seed)
    folder = workspace.trained(name, seed)
    with stop_on_signal() as stop:
        fabric = make_fabric(params)
        fabric.launch()
        if not fabric.is_global_zero:
            session = TrainingSession(fabric=fabric, stop=stop)
            train_network(name, seed, params, store, split, folder, session)
            return
        work = workspace.training_work(name, seed)
        # A dvc that was killed may have left a trainer that is about to end.
        with acquire_lock(work / "lock", on_wait=stop.raise_if_requested):
            identity = identify(name, seed, params, store, split, stage_code(root, "train"))
            checkpoints = Checkpoints(work / "checkpoints", identity)
            state = checkpoints.load()
            tracking_store = default_store(root)
            description = RunDescription(
                store_uri=tracking_store.uri,
                artifact_location=tracking_store.artifact_location,
                name=f"{workspace.profile} {training_title(name, seed)}".lstrip(),
                parameters=_parameters(name, seed, params),
                tags=_tags(name, seed, root),
                data_version=read_provenance(root).data_version,
            )
            with training_run(
                description, workspace.tracking(name, seed), resume=state is not None
            ) as run:
                session = TrainingSession(run, fabric, checkpoints, state, stop)
                train_network(name, seed, params, store, split, folder, session)
                run.log_files(folder, "trained")
                run.set_tag(WEIGHTS_TAG, file_sha256(folder / WEIGHTS_NAME))
            checkpoints.clear()


def _parameters(name: str, seed: int, params: Params) -> dict[str, Any]:
    dump = params.model_dump(by_alias=True, include={"organs", "slice", "split", "train"})
    return flatten({**dump, "seed": seed, "recipe": params.recipes[name].model_dump()})


def _tags(name: str, seed: int, root: Path) -> dict[str, str]:
    provenance = read_provenance(root)
    return {
        NETWORK_TAG: name,
        SEED_TAG: str(seed),
        COMMIT_TAG: provenance.git_commit,
        DATA_VERSION_TAG: provenance.data_version,
        **{f"fullscale.version.{library}": text for library, text in library_versions().items()},
    }


if __name__ == "__main__":
    main()
