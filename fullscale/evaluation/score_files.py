"""The files of scores that the stages evaluate and register leave.

<reports>/NETWORK/cases.csv         scores, a row for each training, test case and organ; the column
                                    `seed` has the training's seed, or `ensemble` for the scores of
                                    all trainings segmenting together; with cross-validation the
                                    column `fold` tells test cases (test) from those that the
                                    training validated on (val)
<reports>/NETWORK/calibration.csv   reliability curves, a row for each organ and bin
<reports>/NETWORK/summary.json      means, rates and intervals under keys such as test/dice/liver,
                                    of what a pass registers: the trainings in `members`
<reports>/gate.json                 the verdict of the promotion gate

Only this module reads and writes these files. Files of older versions are read under today's
names: see `_OLDER_PARTS` and `_OLDER_VERDICT_KEYS`. Their scores are of one training, without a
column `seed`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fullscale.evaluation.paired import SEED
from fullscale.runtime.errors import StageError, shorten
from fullscale.runtime.files import write_atomically
from fullscale.workspace import Workspace

if TYPE_CHECKING:
    import pandas as pd

Content = TypeVar("Content")
Summary = dict[str, Any]
"""The content of a summary.json: test_set, seeds, members, numbers under `test/METRIC/ORGAN`."""
VerdictContent = dict[str, Any]
"""The content of gate.json: `Verdict` as plain values, and what the verdict was made from."""

VERDICT_KEYS = (
    "status", "candidate", "baseline", "criteria", "test_set", "data_version",
)  # fmt: skip

_FOLD = "fold"
_ENSEMBLE = "ensemble"
"""In the column `seed`: scores of all trainings segmenting together."""

# Older versions called the slice classifier a gate, in columns and keys.
_OLDER_PARTS = {
    "_no_gate": "_no_classifier",
    "_soft_gate": "_soft_classifier",
    "gate_sensitivity": "classifier_sensitivity",
    "gate_specificity": "classifier_specificity",
}
_OLDER_VERDICT_KEYS = {"clauses": "criteria"}


def write_scores(
    workspace: Workspace,
    network: str,
    trainings: Mapping[int, pd.DataFrame],
    ensemble: pd.DataFrame | None = None,
    out_of_fold: Mapping[int, pd.DataFrame] | None = None,
) -> None:
    """Write cases.csv, numbers with 6 digits after the point.

    Args:
        workspace: the pipeline.
        network: the network that was scored.
        trainings: seed to the scores of that training, as `score_cases` returns them.
        ensemble: scores of all trainings segmenting together; None with one training.
        out_of_fold: seed to the scores of the cases that this training validated on; None or empty
            without cross-validation.
    """
    import pandas as pd

    tables = {str(seed): scores for seed, scores in trainings.items()}
    if ensemble is not None:
        tables[_ENSEMBLE] = ensemble
    table = _join_by_seed(tables)
    if out_of_fold:
        rows = _join_by_seed({str(seed): scores for seed, scores in out_of_fold.items()})
        table = pd.concat([table.assign(**{_FOLD: "test"}), rows.assign(**{_FOLD: "val"})])
    _write_table(workspace.scores(network), table)


def read_scores(workspace: Workspace, network: str) -> pd.DataFrame:
    """Return the test scores of a network's trainings, told apart by the column `seed`.

    The rows are as `score_cases` makes them.

    Raises:
        StageError: the file is missing or damaged.
    """
    table = _read_table(workspace, network)
    if SEED not in table:
        return table
    return _number_seeds(table[table[SEED] != _ENSEMBLE])


def read_out_of_fold(workspace: Workspace, network: str) -> pd.DataFrame:
    """Return the scores of cases outside the test set, each of the training that validated on it.

    The rows are as `score_cases` makes them, with the column `seed`; none without cross-validation.

    Raises:
        StageError: the file is missing or damaged.
    """
    table = _read_file(workspace, network)
    if _FOLD not in table:
        return table.iloc[:0]
    return _number_seeds(table[table[_FOLD] == "val"].drop(columns=_FOLD))


def read_deployed_scores(workspace: Workspace, network: str, summary: Summary) -> pd.DataFrame:
    """Return the scores of what a pass registers, as `score_cases` makes them, without a seed.

    Args:
        workspace: the pipeline.
        network: the network.
        summary: of the network; its `members` are the trainings that are registered.

    Raises:
        StageError: the file is missing or damaged, or lacks these scores.
    """
    table = _read_table(workspace, network)
    if SEED not in table:
        return table
    members = summary.get("members", [])
    wanted = str(members[0]) if len(members) == 1 else _ENSEMBLE
    rows = table[table[SEED] == wanted]
    if rows.empty:
        raise StageError(
            f"{workspace.scores(network)} has no scores of {SEED} {wanted}, which "
            f"{workspace.summary(network)} is about; run `{workspace.command('evaluate', network)}`"
        )
    return rows.drop(columns=SEED).reset_index(drop=True)


def _join_by_seed(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return tables one below the other, each with its key in the first column, `seed`."""
    import pandas as pd

    return pd.concat(tables, names=[SEED]).reset_index(level=SEED)


def _number_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Return rows of trainings with their seeds as numbers."""
    return table.assign(**{SEED: table[SEED].astype(int)}).reset_index(drop=True)


def _read_table(workspace: Workspace, network: str) -> pd.DataFrame:
    """Return the scores of test cases."""
    table = _read_file(workspace, network)
    return table if _FOLD not in table else table[table[_FOLD] == "test"].drop(columns=_FOLD)


def _read_file(workspace: Workspace, network: str) -> pd.DataFrame:
    return read_or_explain(
        workspace.scores(network), _parse_scores, workspace.command("evaluate", network)
    )


def write_calibration(workspace: Workspace, network: str, curves: pd.DataFrame) -> None:
    """Write calibration.csv, numbers with 6 digits after the point."""
    _write_table(workspace.calibration(network), curves)


def read_calibration(workspace: Workspace, network: str) -> pd.DataFrame:
    """Return a network's reliability curves, as `tabulate_calibration` makes them.

    Raises:
        StageError: the file is missing or damaged.
    """
    return read_or_explain(
        workspace.calibration(network), _parse_calibration, workspace.command("evaluate", network)
    )


def write_summary(
    workspace: Workspace,
    network: str,
    test_set: str,
    metrics: Mapping[str, float],
    seeds: Sequence[int],
    members: Sequence[int],
) -> Summary:
    """Write summary.json and return its content.

    Args:
        workspace: the pipeline.
        network: the network that was scored.
        test_set: digest of the test cases.
        metrics: as `summarise` returns them; rounded to 6 digits after the point.
        seeds: of all trainings.
        members: seeds of the trainings that `metrics` are of, which a pass registers.
    """
    summary = {
        "test_set": test_set,
        "seeds": list(seeds),
        "members": list(members),
        **{key: round(value, 6) for key, value in metrics.items()},
    }
    write_atomically(workspace.summary(network), json.dumps(summary, indent=2) + "\n")
    return summary


def read_summary(workspace: Workspace, network: str) -> Summary:
    """Return the content of a network's summary.json.

    Raises:
        StageError: the file is missing or damaged.
    """
    return read_or_explain(
        workspace.summary(network), _parse_summary, workspace.command("evaluate", network)
    )


def write_verdict(workspace: Workspace, content: Mapping[str, Any]) -> VerdictContent:
    """Write gate.json and return its content as written.

    Numbers are rounded to 6 digits after the point; NaN and infinity, which JSON lacks, become
    null.

    Args:
        workspace: the pipeline.
        content: at least `VERDICT_KEYS`; plain values, lists and mappings.
    """
    plain: VerdictContent = _plain(dict(content))
    write_atomically(workspace.verdict, json.dumps(plain, indent=2) + "\n")
    return plain


def read_verdict(workspace: Workspace) -> VerdictContent:
    """Return the content of gate.json.

    Raises:
        StageError: the file is missing or damaged.
    """
    return read_or_explain(workspace.verdict, _parse_verdict, workspace.command("register"))


def read_or_explain(path: Path, parse: Callable[[Path], Content], command: str) -> Content:
    """Read a file that a stage makes.

    Args:
        path: the file.
        parse: reads it; ValueError, KeyError and TypeError mean that the file is damaged.
        command: makes the file; named in errors.

    Raises:
        StageError: the file is missing or damaged.
    """
    try:
        return parse(path)
    except FileNotFoundError:
        raise StageError(f"{path} is missing; run `{command}`") from None
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(
            f"{path} cannot be read ({shorten(error)}); restore it with git or make it anew with "
            f"`{command}`"
        ) from None


def _write_table(path: Path, table: pd.DataFrame) -> None:
    write_atomically(path, table.to_csv(index=False, float_format="%.6f"))


def _parse_scores(path: Path) -> pd.DataFrame:
    import pandas as pd

    texts = {"case": str, "patient": str, SEED: str}
    table = pd.read_csv(path, dtype=texts).rename(columns=_rename)
    _check_names(table, ("case", "organ"))
    return table


def _parse_calibration(path: Path) -> pd.DataFrame:
    import pandas as pd

    table = pd.read_csv(path)
    _check_names(table, ("organ", "mean_probability", "fraction_true"))
    return table


def _parse_summary(path: Path) -> Summary:
    return {_rename(key): value for key, value in _parse_object(path).items()}


def _parse_verdict(path: Path) -> VerdictContent:
    content = {
        _OLDER_VERDICT_KEYS.get(key, key): value for key, value in _parse_object(path).items()
    }
    _check_names(content, VERDICT_KEYS)
    return content


def _parse_object(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"wanted an object, found {type(content).__name__}")
    return content


def _check_names(found: Iterable[Hashable], wanted: Iterable[str]) -> None:
    if missing := sorted(set(wanted) - set(found)):
        raise ValueError(f"it lacks {', '.join(missing)}")


def _rename(name: str) -> str:
    """Return today's name of a column or key."""
    for older, newer in _OLDER_PARTS.items():
        name = name.replace(older, newer)
    return name


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
