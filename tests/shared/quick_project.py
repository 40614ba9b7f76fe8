"""A clone of the project whose pipeline takes seconds a stage: few small scans, one epoch."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml
from cohorts import write_nnunet
from project import Project, clone_project

from fullscale.ingestion.ingest import ingest

NUM_CASES = 7
# Puts two of the seven patients into the test set and leaves as many as a split needs for the rest.
SALT = "seven"
REMOTE = "remote"
OTHER_PIPELINES = ("btcv", "paper")
"""Left out: each command of DVC would take a third longer, to read what it does not run."""


def favour_unet3plus(project: Project, num_bootstrap: int) -> None:
    """Give UNet a loss that teaches it little in a short time, and promotion a low bar."""
    project.change_params("recipes", unet={"architecture": "unet", "loss_terms": ["focal"]})
    project.change_params(
        "register",
        num_bootstrap=num_bootstrap,
        confidence=0.3,  # 35 %, one-sided: two test patients reach 25 %
        max_slice_fpr=1.0,
        max_organ_dice_loss=1.0,
        min_patients=1,
        failure_dice=0.0,
        min_organ_dice=0.0,
        champion_margin=1.0,
    )


def set_seeds(project: Project, seeds: Sequence[int]) -> None:
    """Set the seeds with which each network is trained."""
    path = project.root / "params.yaml"
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(content | {"seeds": list(seeds)}, sort_keys=False))


def make_quick_project(folder: Path) -> Project:
    """Make a project in `folder`/project and a DVC remote next to it; run nothing."""
    project = clone_project(folder / "project", with_sample=False)
    for name in OTHER_PIPELINES:
        shutil.rmtree(project.root / name)
    project.change_params("slice", size_px=32, pixel_mm=12)
    project.change_params("split", salt=SALT)
    set_seeds(project, [0])
    project.change_params(
        "train",
        width=4,
        num_epochs=1,
        batch_size=4,
        learning_rate=0.01,
        num_picture_slices=0,
        num_threads=1,  # tests run side by side, one to a core
    )
    favour_unet3plus(project, num_bootstrap=200)
    ingest(write_nnunet(folder / "cohort", NUM_CASES), project.root / "data")
    project.run("dvc", "add", "--quiet", "data")
    project.run("git", "commit", "--all", "--quiet", "--message", "Fewer and smaller scans")
    remote = str(folder / REMOTE)
    project.run("dvc", "remote", "add", "--local", "--default", "team", remote)
    return project
