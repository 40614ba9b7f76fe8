"""Compare the results of this checkout with those that are committed in git."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import yaml

from fullscale.evaluation.score_files import read_summary
from fullscale.runtime.errors import StageError
from fullscale.versioning.git import git
from fullscale.workspace import Workspace

Stages = dict[str, Any]
_DICE = "test/dice/"


def compare_with_published(workspace: Workspace, networks: Sequence[str]) -> list[str]:
    """Return what is equal to the committed result, and what is not, as lines for a terminal.

    The outputs of stages train and evaluate are compared by the checksums in dvc.lock; where they
    differ, the mean Dice of each organ shows how much.

    Args:
        workspace: the main pipeline, after a run.
        networks: the networks to compare.

    Raises:
        StageError: a summary.json is damaged.
    """
    try:
        published = _stages(git(workspace.root, "show", "HEAD:./dvc.lock"))
        present = _stages(workspace.lock.read_text(encoding="utf-8"))
    except (StageError, FileNotFoundError, yaml.YAMLError, KeyError, TypeError):
        return ["Published result: none is committed here, so there is nothing to compare with"]
    differing = [name for name in networks if _outputs(present, name) != _outputs(published, name)]
    if not differing:
        return ["Published result: the same weights and scores, bit for bit"]
    lines = ["Published result: not the same as committed"]
    for network in differing:
        lines += _describe_difference(workspace, network)
    return lines


def _stages(lock: str) -> Stages:
    stages: Stages = yaml.safe_load(lock)["stages"]
    return stages


def _outputs(stages: Stages, network: str) -> dict[str, str]:
    """Return the checksum of each output of a network's stages, by path."""
    folders = (f"artifacts/train/{network}/", f"reports/{network}/")
    return {
        out["path"]: out["md5"]
        for stage in stages.values()
        for out in stage.get("outs", [])
        if out["path"].startswith(folders)
    }


def _describe_difference(workspace: Workspace, network: str) -> list[str]:
    relative = workspace.relative(workspace.summary(network))
    try:
        published = json.loads(git(workspace.root, "show", f"HEAD:./{relative}"))
    except (StageError, ValueError):
        return [f"  {network}: {relative} is not committed"]
    present = read_summary(workspace, network)
    lines = []
    for key in (key for key in present if key.startswith(_DICE)):
        found, wanted = present[key], published.get(key)
        text = f"  {network}, {key.removeprefix(_DICE)}: Dice {_format(found)}, published "
        text += _format(wanted)
        if found is not None and wanted is not None:
            text += f" ({found - wanted:+.4f})"
        lines.append(text)
    return lines


def _format(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
