"""What a run left in reports/ and artifacts/, read for the report; nothing is computed here."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from fullscale.params import Params
from fullscale.runtime.errors import StageError
from fullscale.training.history import HISTORY_NAME, read_history

Content = TypeVar("Content")
Verdict = dict[str, Any]
Summary = dict[str, Any]
History = list[dict[str, float]]

VERDICT_KEYS = (
    "status", "candidate", "baseline", "clauses", "test_set", "data_version", "git_commit",
)  # fmt: skip


@dataclass(frozen=True)
class Results:
    """The files of a run, by network; what a run did not leave is not there.

    Attributes:
        candidate, baseline: the networks the verdict is about.
        organs: in the order of params.
        verdict: reports/gate.json; None where no verdict was given.
        summaries: reports/NETWORK/summary.json.
        scores: reports/NETWORK/cases.csv, a row for each case and organ.
        calibration: reports/NETWORK/calibration.csv, a row for each organ and bin.
        histories: artifacts/train/NETWORK/history.csv, a row for each epoch.
        notes: what is missing or does not fit, and what to do, for the reader.
    """

    candidate: str
    baseline: str
    organs: tuple[str, ...]
    verdict: Verdict | None
    summaries: dict[str, Summary]
    scores: dict[str, pd.DataFrame]
    calibration: dict[str, pd.DataFrame]
    histories: dict[str, History]
    notes: list[str]

    @property
    def networks(self) -> tuple[str, ...]:
        """Networks with a summary, in the order of params."""
        return tuple(self.summaries)


def read_results(root: Path, params: Params) -> Results:
    """Read what the stages of the project at `root` wrote.

    Raises:
        StageError: there is no summary of any network, or a file is damaged.
    """
    notes: list[str] = []

    def read_each(
        pattern: str, reader: Callable[[Path], Content], stage: str
    ) -> dict[str, Content]:
        found = {
            name: _read(root, pattern.format(name), reader, f"dvc repro {stage}@{name}", notes)
            for name in params.networks
        }
        return {name: content for name, content in found.items() if content is not None}

    verdict = _read(root, "reports/gate.json", _read_verdict, "dvc repro register", notes)
    results = Results(
        candidate=verdict["candidate"] if verdict else params.register_.candidate,
        baseline=verdict["baseline"] if verdict else params.register_.baseline,
        organs=tuple(params.organs),
        verdict=verdict,
        summaries=read_each("reports/{}/summary.json", _read_json, "evaluate"),
        scores=read_each("reports/{}/cases.csv", _read_scores, "evaluate"),
        calibration=read_each("reports/{}/calibration.csv", _read_calibration, "evaluate"),
        histories=read_each("artifacts/train/{}/" + HISTORY_NAME, _read_history, "train"),
        notes=notes,
    )
    if not results.summaries:
        raise StageError(
            f"{root / 'reports'} holds no summary.json of any of {', '.join(params.networks)}; "
            "run `make repro` first"
        )
    notes += _misfits(results)
    return results


def _read(
    root: Path, file: str, reader: Callable[[Path], Content], command: str, notes: list[str]
) -> Content | None:
    """The content; where there is no file, None and one note more that says how to make it."""
    try:
        return reader(root / file)
    except FileNotFoundError:
        notes.append(f"{file} is missing: run `{command}`.")
        return None
    except (ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise StageError(
            f"{root / file} cannot be read ({reason}); restore it with git or make it anew with "
            f"`{command}`"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"wanted an object, found {type(content).__name__}")
    return content


def _read_verdict(path: Path) -> Verdict:
    content = _read_json(path)
    _check_names(content, VERDICT_KEYS)
    return content


def _read_scores(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path, dtype={"case": str, "patient": str})
    _check_names(table, ("case", "organ"))
    return table


def _read_calibration(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path)
    _check_names(table, ("organ", "mean_probability", "fraction_true"))
    return table


def _check_names(found: Iterable[Hashable], wanted: Iterable[str]) -> None:
    if missing := sorted(set(wanted) - set(found)):
        raise ValueError(f"it lacks {', '.join(missing)}")


def _read_history(path: Path) -> History:
    return sorted(read_history(path), key=lambda row: row["epoch"])


def _misfits(found: Results) -> list[str]:
    """Scores and verdict must speak of the same test cases."""
    if found.verdict is None:
        return []
    wanted = found.verdict["test_set"]
    return [
        f"The scores of {name} are from test set {summary['test_set']}, the verdict is from test "
        f"set {wanted}: run `dvc repro`."
        for name, summary in found.summaries.items()
        if summary.get("test_set") != wanted
    ]
