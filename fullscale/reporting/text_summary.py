"""The end of a run in one table: scores of both networks, the verdict, and where the model is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fullscale.evaluation.promotion_gate import VERDICT_WORDS
from fullscale.params import Params
from fullscale.reporting.numbers import NOT_MEASURED
from fullscale.runtime.errors import StageError

if TYPE_CHECKING:
    from rich.table import Table

    from fullscale.tracking.store import Store


def read_report(path: Path) -> dict[str, Any]:
    """A JSON report of a stage.

    Raises:
        StageError: it is not there yet.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{path} is missing; run `make repro` first") from None
    return content


def score_rows(params: Params, root: Path) -> list[tuple[str, str, str, str, str]]:
    """Organ, network, Dice, slice false-positive rate and cases, as text, for every network."""
    rows = []
    for organ in params.organs:
        for network in params.networks:
            summary = read_report(root / "reports" / network / "summary.json")
            num_cases = summary[f"test/num_cases/{organ}"]
            dice, slice_fpr = (_number(summary, name, organ) for name in ("dice", "slice_fpr"))
            rows.append((organ, network, dice, slice_fpr, str(num_cases)))
    return rows


def make_table(params: Params, root: Path) -> Table:
    """The scores as a table for the terminal, with Dice's interval and the Hausdorff distance."""
    from rich.table import Table

    table = Table(title="Test set, scored in 3D on each scan's own grid")
    for heading in ("organ", "network"):
        table.add_column(heading)
    for heading in ("Dice", "slice FPR", "cases", "Dice interval", "HD95 mm"):
        table.add_column(heading, justify="right")
    for row in score_rows(params, root):
        organ, network, *_ = row
        summary = read_report(root / "reports" / network / "summary.json")
        low, high = (_number(summary, f"dice_{end}", organ, 3) for end in ("low", "high"))
        interval = low if low == NOT_MEASURED else f"{low} - {high}"
        table.add_row(*row, interval, _number(summary, "hd95_mm", organ, 1))
    return table


def _number(summary: dict[str, Any], metric: str, organ: str, digits: int = 4) -> str:
    value = summary.get(f"test/{metric}/{organ}")
    return NOT_MEASURED if value is None else f"{value:.{digits}f}"


def verdict_lines(verdict: dict[str, Any]) -> list[str]:
    """The verdict and its reasons, a line each."""
    return [
        f"Verdict: {VERDICT_WORDS[verdict['status']]}",
        *(
            f"  {'yes' if clause['passed'] else 'no '}  {clause['found']} "
            f"(wanted: {clause['wanted']})"
            for clause in verdict["clauses"]
        ),
    ]


def registry_line(params: Params, verdict: dict[str, Any], store: Store) -> str:
    """Which registered version the verdict stands for, or why there is none."""
    from fullscale.tracking.registry import find_version, list_aliases

    name = params.register_.model_name
    if verdict["status"] != "pass":
        return "Registered: nothing, because the gate did not pass"
    version = find_version(store, name, verdict["weights_sha256"])
    if version is None:
        return (
            "Registered: not in this tracking store; register it there with "
            "`dvc repro --force --single-item register`"
        )
    aliases = ", ".join(list_aliases(store, name, version)) or "none"
    return f"Registered: {name} version {version} (aliases: {aliases})"
