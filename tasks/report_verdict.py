"""The top of the report: the verdict, its conditions, and the differences behind it."""

from __future__ import annotations

import itertools

from tasks.params import Params
from tasks.report_figures import Chart, draw_gains
from tasks.report_format import percent
from tasks.report_sections import OLDER, Section, known_pictures, known_tables
from tasks.report_tables import clause_table, comparison_table
from tasks.results import Results, Verdict
from tasks.summary import VERDICT_WORDS


def verdict_words(results: Results) -> str:
    """The verdict in one line."""
    if results.verdict is None:
        return "NO VERDICT: reports/gate.json is missing"
    status = results.verdict["status"]
    return VERDICT_WORDS.get(status, f"UNKNOWN VERDICT: {status}")


def verdict_section(results: Results, params: Params) -> Section:
    """The conditions of the gate, and the paired differences behind them."""
    if results.verdict is None:
        return Section("verdict", "Verdict", notes=("There is none: run `dvc repro register`.",))
    comparisons = comparison_table(results)
    return Section(
        "verdict",
        "Verdict",
        text=(
            "The candidate passes if every condition holds. Differences are means over patients, "
            f"with the {percent(params.register_.confidence)} bootstrap interval over patients and "
            "p of Wilcoxon's signed-rank test, as it is and corrected for the number of tests.",
        ),
        tables=known_tables(clause_table(results), comparisons),
        pictures=known_pictures(gain_charts(results.verdict)),
        notes=() if comparisons else (f"No paired differences by organ. {OLDER}",),
    )


def gain_charts(verdict: Verdict) -> list[Chart]:
    """A chart of differences in Dice for each two networks compared, candidate and baseline first.

    None for a verdict of an older version, which tells of no comparisons.
    """
    limits = {clause["name"]: clause.get("limit") for clause in verdict["clauses"]}
    judged = (verdict["candidate"], verdict["baseline"])
    pairs = itertools.groupby(
        verdict.get("comparisons", []), key=lambda each: (each["first"], each["second"])
    )
    return [
        draw_gains(list(group), limits.get("dice_gain") if pair == judged else None)
        for pair, group in pairs
    ]
