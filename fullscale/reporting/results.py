"""The results of a pipeline's stages, read once for all pages and tables."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fullscale.evaluation.score_files import (
    Summary,
    VerdictContent,
    read_calibration,
    read_deployed_scores,
    read_or_explain,
    read_summary,
    read_verdict,
)
from fullscale.params import Params
from fullscale.runtime.errors import StageError
from fullscale.runtime.files import file_sha256
from fullscale.training.history import HISTORY_NAME, read_history
from fullscale.workspace import Workspace

if TYPE_CHECKING:
    import pandas as pd

Content = TypeVar("Content")
History = list[dict[str, float]]


@dataclass(frozen=True)
class Results:
    """The files that stages left, by network; missing files have no entry.

    Attributes:
        workspace: the pipeline.
        candidate, baseline: the networks of the verdict; without one, those of params.
        organs: in the order of params.
        verdict: gate.json; None without a verdict.
        summaries: summary.json of each network.
        scores: of what is registered of each network, a row for each case and organ.
        calibration: calibration.csv of each network, a row for each organ and bin.
        histories: history.csv of each training of each network, by seed, a row for each epoch.
        notes: for the reader: files that are missing or contradict each other, and the remedy.
    """

    workspace: Workspace
    candidate: str
    baseline: str
    organs: tuple[str, ...]
    verdict: VerdictContent | None
    summaries: dict[str, Summary]
    scores: dict[str, pd.DataFrame]
    calibration: dict[str, pd.DataFrame]
    histories: dict[str, dict[int, History]]
    notes: list[str]

    @property
    def networks(self) -> tuple[str, ...]:
        """Networks with a summary, in the order of params."""
        return tuple(self.summaries)

    def require_verdict(self) -> VerdictContent:
        """Return the verdict.

        Raises:
            StageError: the verdict is missing.
        """
        return read_verdict(self.workspace) if self.verdict is None else self.verdict


def read_results(workspace: Workspace, params: Params) -> Results:
    """Read what the stages of a pipeline wrote.

    A missing file is a note. A profile has no stage register, so its missing verdict is none.

    Raises:
        StageError: no network has a summary, or a file is damaged.
    """
    notes: list[str] = []

    def read_known(path: Path, read: Callable[[], Content | None], command: str) -> Content | None:
        if path.is_file():
            return read()
        notes.append(f"{workspace.relative(path)} is missing: run `{command}`.")
        return None

    def read_each(
        find: Callable[[str], Path], read: Callable[[Workspace, str], Content | None], stage: str
    ) -> dict[str, Content]:
        found = {}
        for name in params.networks:
            content = read_known(
                find(name),
                lambda name=name: read(workspace, name),  # type: ignore[misc]
                workspace.command(stage, name),
            )
            if content is not None:
                found[name] = content
        return found

    summaries = read_each(workspace.summary, read_summary, "evaluate")

    def read_scores(workspace: Workspace, name: str) -> pd.DataFrame | None:
        # Only a summary says which scores are of what is registered; its own note says more.
        summary = summaries.get(name)
        return None if summary is None else read_deployed_scores(workspace, name, summary)

    verdict = None
    if not workspace.profile:
        verdict = read_known(
            workspace.verdict, lambda: read_verdict(workspace), workspace.command("register")
        )
    histories: dict[str, dict[int, History]] = {}
    for name, seed in itertools.product(params.networks, sorted(params.seeds)):
        path = workspace.trained(name, seed) / HISTORY_NAME
        command = workspace.command("train", name, seed)
        history = read_known(path, partial(_read_history, path, command), command)
        if history is not None:
            histories.setdefault(name, {})[seed] = history
    results = Results(
        workspace=workspace,
        candidate=verdict["candidate"] if verdict else params.register_.candidate,
        baseline=verdict["baseline"] if verdict else params.register_.baseline,
        organs=tuple(params.organs),
        verdict=verdict,
        summaries=summaries,
        scores=read_each(workspace.scores, read_scores, "evaluate"),
        calibration=read_each(workspace.calibration, read_calibration, "evaluate"),
        histories=histories,
        notes=notes,
    )
    if not results.summaries:
        command = f"make paper PROFILE={Path(workspace.profile).name}"
        raise StageError(
            f"{workspace.reports} holds no summary.json of any of {', '.join(params.networks)}; "
            f"run `{command if workspace.profile else 'make repro'}` first"
        )
    notes += doubts_about_verdict(results)
    return results


def _read_history(path: Path, command: str) -> History:
    def parse(path: Path) -> History:
        return sorted(read_history(path), key=lambda row: row["epoch"])

    return read_or_explain(path, parse, command)


def doubts_about_verdict(found: Results) -> list[str]:
    """Return a note for each network whose scores are not those that the verdict was made from.

    After a part of the pipeline was run again, they are newer than the verdict.
    """
    if found.verdict is None:
        return []
    wanted = found.verdict["test_set"]
    judged = found.verdict.get("scores_sha256", {})
    notes = []
    for name, summary in found.summaries.items():
        if summary.get("test_set") != wanted:
            notes.append(
                f"The scores of {name} are from test set {summary['test_set']}, the verdict is "
                f"from test set {wanted}: run `dvc repro`."
            )
        elif name in found.scores and _differs(found.workspace.scores(name), judged.get(name)):
            notes.append(
                f"The verdict was made from other scores of {name} than these: run `dvc repro`."
            )
    return notes


def _differs(path: Path, sha256: str | None) -> bool:
    """Return whether a file has another digest than this one; False if none is known."""
    return sha256 is not None and file_sha256(path) != sha256
