"""Where the result of the report comes from, and what has changed since."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fullscale.params import Params
from fullscale.reporting.results import Results
from fullscale.reporting.sections import Section
from fullscale.versioning.provenance import Provenance, library_versions

DIRTY = "-dirty"


def provenance_section(
    root: Path, results: Results, params: Params, provenance: Provenance
) -> Section:
    """Versions, seeds and parameters, and how to make the result again.

    Args:
        root: the project, for params.yaml and dvc.lock as they stand.
        results: of its last run.
        params: read from params.yaml.
        provenance: of the project now.
    """
    verdict = results.verdict or {}
    commit = str(verdict.get("git_commit", provenance.git_commit))
    data_version = str(verdict.get("data_version", provenance.data_version))
    facts = (
        ("git commit", commit),
        ("data version", data_version),
        ("test set", str(verdict.get("test_set", "no verdict"))),
        ("weights of the candidate", str(verdict.get("weights_sha256", "no verdict"))),
        ("salt of the test set", params.split.salt),
        ("seed of the split", str(params.split.seed)),
        ("seed of training", str(params.train.seed)),
        ("seed of intervals", str(params.register_.seed)),
        ("page written at commit", provenance.git_commit),
        ("Python", platform.python_version()),
        *library_versions().items(),
    )
    commands = (
        *(() if commit == "none" else (f"git checkout {commit.removesuffix(DIRTY)}",)),
        "make setup",
        "make repro",
        "fullscale report",
    )
    return Section(
        "provenance",
        "Provenance",
        text=(
            "Commit, data, test set and weights are those of the verdict; versions of libraries "
            "are those that wrote this page.",
        ),
        facts=facts,
        listings=(
            ("How to reproduce", "\n".join(commands)),
            ("params.yaml", (root / "params.yaml").read_text(encoding="utf-8")),
        ),
    )


def find_changes(root: Path, results: Results, provenance: Provenance) -> list[str]:
    """What is no longer as it was when the stages ran, for the reader."""
    notes = [
        f"params.yaml has changed since stage {stage} ran: {', '.join(keys)}. Run `dvc repro`."
        for stage, keys in changed_parameters(root).items()
    ]
    if results.verdict is not None:
        data_version, commit = results.verdict["data_version"], results.verdict["git_commit"]
        if data_version != provenance.data_version:
            notes.append(
                f"The verdict is from data version {data_version}, the scans are now version "
                f"{provenance.data_version}. Run `dvc repro`."
            )
        if commit.endswith(DIRTY):
            notes.append("The verdict was made with code or parameters that no commit holds.")
    return notes


def changed_parameters(root: Path) -> dict[str, list[str]]:
    """Stage to its parameters whose values in params.yaml are not those in dvc.lock.

    Without dvc.lock nothing is known to have changed.
    """
    path = root / "dvc.lock"
    if not path.is_file():
        return {}
    now = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    stages = yaml.safe_load(path.read_text(encoding="utf-8"))["stages"]
    changed = {
        stage: [
            each
            for key, then in content.get("params", {}).get("params.yaml", {}).items()
            for each in _differences(key, then, _look_up(now, key))
        ]
        for stage, content in stages.items()
    }
    return {stage: keys for stage, keys in changed.items() if keys}


def _differences(key: str, then: Any, now: Any) -> list[str]:
    """Dotted keys at and below `key` whose values differ."""
    if not (isinstance(then, Mapping) and isinstance(now, Mapping)):
        return [] if then == now else [key]
    return [
        each
        for name in dict.fromkeys((*then, *now))
        for each in _differences(f"{key}.{name}", then.get(name), now.get(name))
    ]


def _look_up(content: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key; None where there is none."""
    found: Any = content
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
