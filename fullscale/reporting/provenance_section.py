"""The origin of the report's results, and changes since then."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fullscale.params import Params
from fullscale.reporting.numbers import deployed_title
from fullscale.reporting.results import Results
from fullscale.reporting.sections import ReportSection
from fullscale.versioning.provenance import Provenance, library_versions
from fullscale.workspace import Workspace

DIRTY = "-dirty"


def provenance_section(results: Results, params: Params, provenance: Provenance) -> ReportSection:
    """Return the section with versions, seeds, parameters and the commands of the pipeline.

    Args:
        results: of the last run.
        params: the present parameters.
        provenance: the present versions of code and data.
    """
    verdict = results.verdict or {}
    commit = provenance.git_commit
    data_version = str(verdict.get("data_version", provenance.data_version))
    facts = (
        ("git commit", commit),
        ("data version", data_version),
        ("test set", str(verdict.get("test_set", "no verdict"))),
        ("weights of the candidate", str(verdict.get("weights_sha256", "no verdict"))),
        ("salt of the split", params.split.salt),
        ("validation fold", _validation_folds(params)),
        ("what is registered", deployed_title(verdict) or "no verdict"),
        ("seeds of training", ", ".join(str(seed) for seed in sorted(params.seeds))),
        ("seed of intervals", str(params.register_.seed)),
        ("Python", platform.python_version()),
        *library_versions().items(),
    )
    commands = (
        *(() if commit == "none" else (f"git checkout {commit.removesuffix(DIRTY)}",)),
        "make setup",
        *_run_commands(results.workspace),
    )
    return ReportSection(
        "provenance",
        "Provenance",
        text=(
            "Data, test set and weights are those of the verdict; commit and versions of libraries "
            "are those that wrote this page.",
        ),
        facts=facts,
        listings=(
            ("How to reproduce", "\n".join(commands)),
            *(
                (results.workspace.relative(path), path.read_text(encoding="utf-8"))
                for path in results.workspace.params_files
            ),
        ),
    )


def _run_commands(workspace: Workspace) -> tuple[str, str]:
    if not workspace.profile:
        return "make repro", "fullscale report"
    name = Path(workspace.profile).name
    return f"make paper PROFILE={name}", f"fullscale report --profile {workspace.profile}"


def find_changes(results: Results, provenance: Provenance) -> list[str]:
    """Return a note for each change of parameters, code or data since the stages ran."""
    notes = [
        f"{file} has changed since stage {stage} ran: {', '.join(keys)}. Run `dvc repro`."
        for (stage, file), keys in changed_parameters(results.workspace).items()
    ]
    if results.verdict is not None:
        data_version = results.verdict["data_version"]
        if data_version != provenance.data_version:
            notes.append(
                f"The verdict is from data version {data_version}, the scans are now version "
                f"{provenance.data_version}. Run `dvc repro`."
            )
    if provenance.git_commit.endswith(DIRTY):
        notes.append("Code or parameters were not committed when this page was written.")
    return notes


def changed_parameters(workspace: Workspace) -> dict[tuple[str, str], list[str]]:
    """Compare the present parameters with those in dvc.lock, with which the stages ran.

    Stages that read parameters of another profile are left out, and so are those of networks and
    seeds that the parameters do not name any more: DVC never removes them from dvc.lock. Without
    dvc.lock there is nothing to compare.

    Returns:
        Stage and parameter file to the dotted keys whose values differ.
    """
    if not workspace.lock.is_file():
        return {}
    stages = yaml.safe_load(workspace.lock.read_text(encoding="utf-8"))["stages"]
    known = _stages_of_networks(workspace)
    now = {
        workspace.relative(path): yaml.safe_load(path.read_text(encoding="utf-8"))
        for path in workspace.params_files
    }
    changed = {
        (stage, file): [
            each
            for key, then in values.items()
            for each in _differences(key, then, _look_up(now[file], key))
        ]
        for stage, content in stages.items()
        if (stage in known or not stage.startswith(("train@", "evaluate@")))
        and set(content.get("params", {})) <= set(now)
        for file, values in content.get("params", {}).items()
    }
    return {place: keys for place, keys in changed.items() if keys}


def _stages_of_networks(workspace: Workspace) -> set[str]:
    """Return the names of the stages that train and evaluate the networks of the parameters."""
    params = workspace.load_params()
    prefix = f"{Path(workspace.profile).name}-" if workspace.profile else ""
    return {f"evaluate@{prefix}{network}" for network in params.networks} | {
        f"train@{prefix}{network}-{seed}" for network in params.networks for seed in params.seeds
    }


def _differences(key: str, then: Any, now: Any) -> list[str]:
    """Return the dotted keys at and below `key` whose values differ."""
    if not (isinstance(then, Mapping) and isinstance(now, Mapping)):
        return [] if then == now else [key]
    return [
        each
        for name in dict.fromkeys((*then, *now))
        for each in _differences(f"{key}.{name}", then.get(name), now.get(name))
    ]


def _look_up(content: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key; None if it is missing."""
    found: Any = content
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _validation_folds(params: Params) -> str:
    if params.split.rotate:
        return f"{params.split.val_fold} + seed, counted round {params.split.folds} folds"
    return f"{params.split.val_fold} of 0 to {params.split.folds - 1}"
