"""The sections of the report: which tables and charts stand where, and what is said of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fullscale.evaluation.promotion_gate import VERDICT_WORDS
from fullscale.params import Params
from fullscale.reporting.charts import (
    Chart,
    Values,
    draw_bars,
    draw_boxes,
    draw_gains,
    draw_histories,
    draw_reliability,
)
from fullscale.reporting.numbers import Metric, percent
from fullscale.reporting.results import Results, Verdict
from fullscale.reporting.style import Picture, to_svg_uri
from fullscale.reporting.tables import (
    DICE,
    GATES,
    SLICE_FPR,
    Table,
    ablated_networks,
    ablation_table,
    calibration_table,
    clause_table,
    comparison_table,
    gate_table,
    score_table,
    surface_table,
    under_gate,
)

if TYPE_CHECKING:
    from fullscale.reporting.overlays import Gallery, Outline

OLDER = "These results do not hold it; a version that measures it wrote none of them."


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading.

    Attributes:
        key: its address in the page.
        title: its heading.
        text: paragraphs below the heading.
        legend: outlines in pictures of scans, each with what it stands for.
        tables, pictures, galleries: in this order.
        facts: names and values.
        listings: names, and lines as they stand in a file or a terminal.
        notes: what is missing, and what to do.
    """

    key: str
    title: str
    text: tuple[str, ...] = ()
    legend: tuple[tuple[Outline, str], ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    galleries: tuple[Gallery, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    listings: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


def score_section(results: Results, params: Params) -> Section:
    """Dice and false positives."""
    pair = (results.candidate, results.baseline)
    charts = [draw_boxes(results.scores, results.networks, organ, pair) for organ in results.organs]
    boxes = known_pictures(charts)
    return Section(
        "scores",
        "Scores",
        text=(
            "Scored in 3D on each scan's own grid. In brackets: the "
            f"{percent(params.register_.confidence)} bootstrap interval over patients, where the "
            "cases are enough and different enough to give one. Slice FPR: organ-free slices with "
            "a false positive, of all organ-free slices.",
            "Box plots: each mark is a case and each line joins a case's marks. A line is dashed "
            f"where {results.candidate} is worse than {results.baseline}. The thick bar is the "
            "median, the box holds the middle half of the cases.",
        ),
        tables=known_tables(score_table(results)),
        pictures=boxes + known_pictures([_fpr_chart(results)]),
        notes=() if boxes else ("No box plots: there is no table of cases with a Dice.",),
    )


def _fpr_chart(results: Results) -> Chart | None:
    limits = {
        clause["limit"]
        for clause in (results.verdict or {}).get("clauses", [])
        if clause["name"].startswith("slice_fpr/") and clause.get("limit") is not None
    }
    return draw_bars(
        "Slice FPR",
        "slice FPR",
        results.organs,
        {
            name: [_values(SLICE_FPR, results, name, organ) for organ in results.organs]
            for name in results.networks
        },
        SLICE_FPR.digits,
        limit=min(limits, default=None),
    )


def surface_section(results: Results) -> Section:
    """Distances in mm."""
    table = surface_table(results)
    return Section(
        "surfaces",
        "Surfaces",
        text=(
            "HD95 is the larger of the two directed 95th percentiles. A missed organ counts with "
            "the scan's diagonal.",
        ),
        tables=known_tables(table),
        notes=() if table else (f"No distances. {OLDER}",),
    )


def overlay_section(
    galleries: Sequence[Gallery], legend: Sequence[tuple[Outline, str]], missing: str | None
) -> Section:
    """Cases with outlines; `missing` says why there are none."""
    return Section(
        "cases",
        "Best, median and worst case",
        text=("Slices from the feet to the head, the patient's right on the left.",)
        if galleries
        else (),
        legend=tuple(legend) if galleries else (),
        galleries=tuple(galleries),
        notes=() if missing is None else (f"No pictures of cases: {missing}.",),
    )


def gate_section(results: Results) -> Section:
    """What the classifier closes and opens, and what other gates would have made of it."""
    ablation = ablation_table(results)
    errors = gate_table(results)
    charts = [
        draw_bars(
            f"{name}: {metric.title} by gate",
            metric.title,
            results.organs,
            {
                gate: [
                    _values(under_gate(metric, suffix), results, name, organ)
                    for organ in results.organs
                ]
                for suffix, gate in GATES.items()
            },
            metric.digits,
        )
        for name in ablated_networks(results)
        for metric in (DICE, SLICE_FPR)
    ]
    return Section(
        "gate",
        "Gate",
        text=(
            "A classifier closes slices in which it sees no organ. A false closing wipes out an "
            "organ that is there, a false opening leaves a slice without it to the decoder. A soft "
            "gate multiplies by the classifier's probability, the hard one cuts at one half.",
        ),
        tables=known_tables(errors, ablation),
        pictures=known_pictures(charts),
        notes=(
            *(() if errors else ("No network here has a classifier with counted errors.",)),
            *(() if ablation else (f"No comparison of gates. {OLDER}",)),
        ),
    )


def learning_section(results: Results) -> Section:
    """Learning curves of all networks."""
    charts = [
        draw_histories(results.histories, results.networks, "val/dice", "Validation Dice", "Dice"),
        draw_histories(results.histories, results.networks, "train/total", "Training loss", "loss"),
    ]
    pictures = known_pictures(charts)
    return Section(
        "learning",
        "Learning curves",
        text=("Losses of networks with other terms or more outputs differ in scale.",),
        pictures=pictures,
        notes=() if pictures else ("No learning curves: fetch them with `dvc checkout`.",),
    )


def calibration_section(results: Results) -> Section:
    """Reliability curves and expected calibration error."""
    charts = [
        draw_reliability(results.calibration, results.summaries, results.networks, organ)
        for organ in results.organs
    ]
    pictures = known_pictures(charts)
    table = calibration_table(results)
    return Section(
        "calibration",
        "Calibration",
        text=(
            "Of the voxels given probability 0.8, eight in ten should belong to the organ: the "
            "thin diagonal. Voxels in the box around the true organ are counted.",
        ),
        tables=known_tables(table),
        pictures=pictures,
        notes=() if pictures or table else (f"No calibration. {OLDER}",),
    )


def _values(metric: Metric, results: Results, network: str, organ: str) -> Values:
    low, high = (metric.read(results.summaries[network], organ, end) for end in ("_low", "_high"))
    return metric.read(results.summaries[network], organ), low, high


def known_pictures(charts: Iterable[Chart | None]) -> tuple[Picture, ...]:
    """The charts that there are, as they stand in the page."""
    return tuple(Picture(to_svg_uri(chart[0]), chart[1]) for chart in charts if chart is not None)


def known_tables(*tables: Table | None) -> tuple[Table, ...]:
    """The tables that there are."""
    return tuple(table for table in tables if table is not None)


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
