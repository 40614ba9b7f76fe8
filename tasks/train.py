"""Stage train: one network, learned from the training cases, chosen on the validation cases."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning import Trainer, seed_everything

from model.output import probabilities
from scans.files import file_sha256
from scans.store import SliceStore
from tasks.console import StageError, report_errors
from tasks.dataset import Batch, SliceDataset, load_batches, normalise, one_mask_per_organ
from tasks.history import HISTORY_NAME, write_history
from tasks.learner import OrganLearner
from tasks.params import Params, load_params
from tasks.pictures import draw_slices
from tasks.provenance import digest_test_set, library_versions, read_provenance
from tasks.tracking import WEIGHTS_TAG, TrainingRun, default_store, training_run
from tasks.trained import WEIGHTS_NAME, build, describe, save_trained


class Progress:
    """Keeps the best weights, the history and the tracked run up to date after each epoch."""

    def __init__(
        self, name: str, params: Params, validation: SliceDataset, folder: Path, run: TrainingRun
    ) -> None:
        self.network = build(describe(name, params))
        self._name = name
        self._params = params
        self._folder = folder
        self._run = run
        self._rows: list[dict[str, float]] = []
        self._best = -1.0
        self._picture_slices = _picture_slices(validation, params.train.num_picture_slices)

    def __call__(self, metrics: dict[str, float]) -> None:
        """Take in the metrics of an epoch."""
        self._rows.append(metrics)
        epoch, dice = int(metrics["epoch"]), metrics["val/dice"]
        improved = dice > self._best
        if improved:
            self._best = dice
            description = describe(self._name, self._params).model_copy(
                update={"epoch": epoch, "val_dice": dice}
            )
            save_trained(self._folder, self.network, description)
        write_history(self._folder / HISTORY_NAME, self._rows)
        self._run.log_metrics(
            {key: value for key, value in metrics.items() if key != "epoch"}, step=epoch
        )
        if self._picture_slices is not None:
            self._log_picture(epoch, self._picture_slices)
        mark = " (best)" if improved else ""
        print(
            f"{self._name} epoch {epoch}/{self._params.train.num_epochs}: "
            f"loss {metrics['train/total']:.4f}, val Dice {dice:.4f}{mark}",
            flush=True,
        )

    def _log_picture(self, epoch: int, batch: Batch) -> None:
        device = next(self.network.parameters()).device
        was_training = self.network.training
        self.network.eval()
        with torch.no_grad():
            image = normalise(batch.image_BCHW, self._params.slice.window_hu).to(device)
            predicted = probabilities(self.network(image)) >= self._params.evaluate.threshold
        self.network.train(was_training)
        masks = one_mask_per_organ(batch.label_BHW, len(self._params.organs))
        figure = draw_slices(
            batch.image_BCHW[:, 1].numpy(),
            masks.numpy(),
            predicted.cpu().numpy(),
            self._params.slice.window_hu,
            titles=[""] * len(masks),
            heading=f"{self._name}, epoch {epoch}, validation slices",
        )
        self._run.log_picture(figure, f"validation/epoch-{epoch:04d}.png")


def train_network(
    name: str,
    params: Params,
    store: SliceStore,
    split: pd.DataFrame,
    folder: Path,
    run: TrainingRun,
) -> None:
    """Train network `name` and leave its best epoch in `folder`.

    Best means the highest mean 3D Dice of the validation cases; test cases are never read.

    Args:
        name: one of params.networks.
        params: all of params.yaml.
        store: slices of every case.
        split: columns case, patient, fold.
        folder: receives weights.safetensors, network.json and history.csv.
        run: where the training is tracked.

    Raises:
        StageError: a fold is empty, or the loss stops being finite.
    """
    seed_everything(params.train.seed, workers=True, verbose=False)
    datasets = {}
    for fold in ("train", "val"):
        cases = split.loc[split["fold"] == fold, "case"].tolist()
        if not cases:
            raise StageError(f"the split holds no {fold} cases; add scans or change section split")
        datasets[fold] = SliceDataset(store, cases)
    batch_size = params.train.batch_size
    training = load_batches(datasets["train"], batch_size, shuffle=True)
    if not len(training):
        raise StageError(
            f"{len(datasets['train'])} training slices do not fill one batch of {batch_size}; "
            "lower train.batch_size or add scans"
        )
    validation = load_batches(datasets["val"], params.evaluate.batch_size, shuffle=False)
    progress = Progress(name, params, datasets["val"], folder, run)
    learner = OrganLearner(
        progress.network,
        tuple(params.organs),
        params.slice.window_hu,
        params.recipes[name].loss_terms,
        params.train,
        steps_per_epoch=len(training),
        num_val_cases=len(datasets["val"].cases),
        min_false_positive_px=params.evaluate.min_false_positive_px,
        threshold=params.evaluate.threshold,
        on_epoch=progress,
    )
    trainer = Trainer(
        max_epochs=params.train.num_epochs,
        accelerator="auto",
        devices=1,
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
        gradient_clip_val=params.train.gradient_clip_norm,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(learner, training, validation)
    if trainer.interrupted:
        raise KeyboardInterrupt


def flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping to one level, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def _picture_slices(dataset: SliceDataset, count: int) -> Batch | None:
    if count == 0:
        return None
    return dataset.__getitems__(
        np.linspace(0, len(dataset) - 1, count + 2).astype(int)[1:-1].tolist()
    )


@report_errors
def main() -> None:
    """Run the stage for one network: `python -m tasks.train NETWORK`."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for noise in (".*does not have many workers.*", ".*LeafSpec.*"):
        warnings.filterwarnings("ignore", noise)
    root = Path()
    params = load_params(root / "params.yaml")
    if len(sys.argv) != 2 or sys.argv[1] not in params.networks:
        raise StageError(
            f"usage: python -m tasks.train NETWORK, one of {', '.join(params.networks)}"
        )
    name = sys.argv[1]
    folder = root / "artifacts" / "train" / name
    split = pd.read_csv(root / "artifacts/split.csv", dtype=str)
    provenance = read_provenance(root)
    tags = {
        "fullscale.network": name,
        "fullscale.git_commit": provenance.git_commit,
        "fullscale.data_version": provenance.data_version,
        "fullscale.test_set": digest_test_set(split.loc[split["fold"] == "test", "case"]),
        **{f"fullscale.version.{library}": text for library, text in library_versions().items()},
    }
    dump = params.model_dump(by_alias=True, include={"organs", "slice", "split", "train"})
    parameters = flatten({**dump, "recipe": params.recipes[name].model_dump()})
    tracking = root / ".cache/train" / name / "tracking"
    with training_run(
        default_store(root), name, parameters, tags, provenance.data_version, tracking
    ) as run:
        train_network(name, params, SliceStore(root / "artifacts/slices"), split, folder, run)
        run.log_files(folder, "trained")
        run.set_tag(WEIGHTS_TAG, file_sha256(folder / WEIGHTS_NAME))


if __name__ == "__main__":
    main()
