"""The end of a run in one table: scores of both networks, the verdict, and where the model is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.console import StageError
from tasks.params import Params

if TYPE_CHECKING:
    from rich.table import Table

    from tasks.tracking import Store

VERDICT_WORDS = {
    "pass": "PASS: the candidate may be promoted",
    "fail": "FAIL: the candidate does not beat the baseline as params ask",
    "undecided": "UNDECIDED: too few test cases for a verdict",
}


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

            def number(metric: str, summary: dict[str, Any] = summary, organ: str = organ) -> str:
                value = summary.get(f"test/{metric}/{organ}")
                return "not measured" if value is None else f"{value:.4f}"

            num_cases = summary[f"test/num_cases/{organ}"]
            rows.append((organ, network, number("dice"), number("slice_fpr"), str(num_cases)))
    return rows


def make_table(params: Params, root: Path) -> Table:
    """The scores as a table for the terminal."""
    from rich.table import Table

    table = Table(title="Test set, scored in 3D on each scan's own grid")
    for heading in ("organ", "network"):
        table.add_column(heading)
    for heading in ("Dice", "slice FPR", "cases"):
        table.add_column(heading, justify="right")
    for row in score_rows(params, root):
        table.add_row(*row)
    return table


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
    from tasks.registry import find_version, list_aliases

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
