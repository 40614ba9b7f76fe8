"""The sections of the report: their tables, charts and texts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fullscale.evaluation.promotion_gate import VERDICT_WORDS
from fullscale.evaluation.score_files import VerdictContent
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
from fullscale.reporting.numbers import Metric, percent, seed_lines, verdict_notes
from fullscale.reporting.results import Results
from fullscale.reporting.style import Picture, to_svg_uri
from fullscale.reporting.tables import (
    COUNTS,
    DICE,
    OVERLAP,
    SLICE_FPR,
    SURFACE,
    Table,
    ablated_networks,
    ablation_table,
    calibration_table,
    case_table,
    classifier_table,
    comparison_table,
    criteria_table,
    false_slice_table,
    gates_of,
    metric_table,
    score_table,
    surface_table,
    under_variant,
)

if TYPE_CHECKING:
    import pandas as pd

    from fullscale.evaluation.score_files import Summary
    from fullscale.reporting.overlays import Gallery
    from fullscale.scans.slice_outlines import OutlineStyle

OLDER = "Not available: an older version wrote these results."


@dataclass(frozen=True)
class ReportSection:
    """A part of the page with a heading.

    Attributes:
        key: anchor in the page.
        title: heading.
        text: paragraphs below the heading.
        legend: outlines in pictures of scans, each with its meaning.
        tables, pictures, galleries: shown in this order.
        facts: names and values.
        listings: names, and the lines of a file or of commands.
        notes: what is missing, and the remedy.
    """

    key: str
    title: str
    text: tuple[str, ...] = ()
    legend: tuple[tuple[OutlineStyle, str], ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    galleries: tuple[Gallery, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    listings: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


def score_section(results: Results, params: Params) -> ReportSection:
    """Return the section on Dice and false positives."""
    pair = (results.candidate, results.baseline)
    charts = [draw_boxes(results.scores, results.networks, organ, pair) for organ in results.organs]
    boxes = known_pictures(charts)
    return ReportSection(
        "scores",
        "Scores",
        text=(
            "Scored in 3D on each scan's own grid. In brackets: the "
            f"{percent(params.register_.confidence)} bootstrap interval over patients, unless the "
            "cases are too few or too similar for one. Slice FPR: organ-free slices with "
            "a false positive, of all organ-free slices. Next to the organ, within 10 mm of a "
            "slice with it, its end is uncertain; elsewhere a false positive is a wrong finding.",
            "Box plots: each mark is a case and each line joins a case's marks. A line is dashed "
            f"where {results.candidate} is worse than {results.baseline}. The thick bar is the "
            "median, the box holds the middle half of the cases.",
            *(f"{line}." for line in seed_lines(results.summaries, results.organs)),
        ),
        tables=known_tables(score_table(results), false_slice_table(results)),
        pictures=boxes + known_pictures([_fpr_chart(results)]),
        notes=() if boxes else ("No box plots: no table of cases has a Dice.",),
    )


def _fpr_chart(results: Results) -> Chart | None:
    limits = {
        criterion["limit"]
        for criterion in (results.verdict or {}).get("criteria", [])
        if criterion["name"].startswith("slice_fpr/") and criterion.get("limit") is not None
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


def surface_section(results: Results) -> ReportSection:
    """Return the section on distances in mm."""
    table = surface_table(results)
    return ReportSection(
        "surfaces",
        "Surfaces",
        text=(
            "HD95 is the larger of the two directed 95th percentiles. A missed organ counts with "
            "the scan's diagonal. Surface Dice counts voxels of the surfaces, or weights them by "
            "their area.",
        ),
        tables=known_tables(table),
        notes=() if table else (f"Distances: {OLDER}",),
    )


def cohort_section(model: str, summary: Summary, scores: pd.DataFrame) -> ReportSection:
    """Return the section on the scores of one model on another cohort, over all and by case.

    Args:
        model: name of the model.
        summary: as `summarise` returns it.
        scores: as `score_cases` returns them.
    """
    organs, summaries = tuple(scores["organ"].unique()), {model: summary}
    tables = (
        metric_table(organs, summaries, "Scores of the cohort", OVERLAP, COUNTS),
        metric_table(organs, summaries, "Surfaces and volumes", SURFACE, ()),
        case_table(scores),
    )
    return ReportSection(
        "scores",
        "Scores",
        text=(
            "Scored in 3D on each scan's own grid, as the project's own test set is. In brackets: "
            "the bootstrap interval over patients, unless the cases are too few or too similar "
            "for one. HD95 is the larger of the two directed 95th percentiles.",
        ),
        tables=known_tables(*tables),
    )


def overlay_section(
    galleries: Sequence[Gallery], legend: Sequence[tuple[OutlineStyle, str]], missing: str | None
) -> ReportSection:
    """Return the section with pictures of cases; `missing` is the reason if there are none."""
    return ReportSection(
        "cases",
        "Best, median and worst case",
        text=("Slices from the feet to the head, the patient's right on the left.",)
        if galleries
        else (),
        legend=tuple(legend) if galleries else (),
        galleries=tuple(galleries),
        notes=() if missing is None else (f"No pictures of cases: {missing}.",),
    )


def classifier_section(results: Results) -> ReportSection:
    """Return the section on the slice classifier (CGM): its errors, and scores without it."""
    ablation = ablation_table(results)
    errors = classifier_table(results)
    charts = [
        draw_bars(
            f"{name}: {metric.title} by slice classifier",
            metric.title,
            results.organs,
            {
                use: [
                    _values(under_variant(metric, suffix), results, name, organ)
                    for organ in results.organs
                ]
                for suffix, use in gates_of(results, name).items()
            },
            metric.digits,
        )
        for name in ablated_networks(results)
        for metric in (DICE, SLICE_FPR)
    ]
    return ReportSection(
        "classifier",
        "Slice classifier (CGM)",
        text=(
            "The slice classifier closes slices in which it sees no organ. A false closing removes "
            "an organ from a slice that has it; a false opening leaves a slice without the organ "
            "to the decoder. The gate hard closes a slice at a probability of 0.5 and below, slab "
            "only if it would close the neighbours too, soft multiplies the decoder's "
            "probabilities by the classifier's.",
        ),
        tables=known_tables(errors, ablation),
        pictures=known_pictures(charts),
        notes=(
            *(() if errors else ("No network here has a slice classifier with counted errors.",)),
            *(() if ablation else (_no_ablation(results),)),
        ),
    )


def _no_ablation(results: Results) -> str:
    subject = "Comparison with and without the slice classifier"
    if any(len(summary.get("members", [])) > 1 for summary in results.summaries.values()):
        return (
            f"{subject}: none for an ensemble, whose members each have their own. Columns "
            "dice_no_classifier and dice_soft_classifier of cases.csv have it for each training."
        )
    return f"{subject}: {OLDER}"


def learning_section(results: Results) -> ReportSection:
    """Return the section with the learning curves of all networks."""
    charts = [
        draw_histories(results.histories, results.networks, "val/dice", "Validation Dice", "Dice"),
        draw_histories(results.histories, results.networks, "train/total", "Training loss", "loss"),
    ]
    pictures = known_pictures(charts)
    return ReportSection(
        "learning",
        "Learning curves",
        text=("Losses of networks with other terms or more outputs differ in scale.",),
        pictures=pictures,
        notes=() if pictures else ("No learning curves: fetch them with `dvc checkout`.",),
    )


def calibration_section(results: Results) -> ReportSection:
    """Return the section with reliability curves and expected calibration error."""
    charts = [
        draw_reliability(results.calibration, results.summaries, results.networks, organ)
        for organ in results.organs
    ]
    pictures = known_pictures(charts)
    table = calibration_table(results)
    return ReportSection(
        "calibration",
        "Calibration",
        text=(
            "Of the voxels given probability 0.8, eight in ten should belong to the organ: the "
            "thin diagonal. Voxels in the box around the true organ are counted. Most of them are "
            "certain, so the error is also given for those between 0.1 and 0.9 alone.",
        ),
        tables=known_tables(table),
        pictures=pictures,
        notes=() if pictures or table else (f"Calibration: {OLDER}",),
    )


def _values(metric: Metric, results: Results, network: str, organ: str) -> Values:
    low, high = (metric.read(results.summaries[network], organ, end) for end in ("_low", "_high"))
    return metric.read(results.summaries[network], organ), low, high


def known_pictures(charts: Iterable[Chart | None]) -> tuple[Picture, ...]:
    """Return the charts that exist as pictures of the page."""
    return tuple(Picture(to_svg_uri(chart[0]), chart[1]) for chart in charts if chart is not None)


def known_tables(*tables: Table | None) -> tuple[Table, ...]:
    """Return the tables that exist."""
    return tuple(table for table in tables if table is not None)


def verdict_words(results: Results) -> str:
    """Return the verdict in one line."""
    if results.verdict is None:
        if results.workspace.profile:
            return "NO VERDICT: this pipeline has no promotion gate"
        return "NO VERDICT: reports/gate.json is missing"
    status = results.verdict["status"]
    return VERDICT_WORDS.get(status, f"UNKNOWN VERDICT: {status}")


def verdict_section(results: Results, params: Params) -> ReportSection:
    """Return the section on the promotion gate: its criteria and the paired differences."""
    if results.verdict is None:
        note = (
            "This pipeline has no stage register."
            if results.workspace.profile
            else "There is none: run `dvc repro register`."
        )
        return ReportSection("verdict", "Verdict", notes=(note,))
    comparisons = comparison_table(results)
    return ReportSection(
        "verdict",
        "Verdict",
        text=(
            "The candidate passes if it meets every condition.",
            *verdict_notes(results.verdict),
            "Paired differences are means over patients, with the "
            f"{percent(params.register_.confidence)} interval and the two-sided p of the sign-flip "
            "test over patients; p is also corrected for the number of tests (Holm).",
        ),
        tables=known_tables(criteria_table(results), comparisons),
        pictures=known_pictures(gain_charts(results.verdict)),
        notes=() if comparisons else (f"Paired differences by organ: {OLDER}",),
    )


def gain_charts(verdict: VerdictContent) -> list[Chart]:
    """Return a chart of differences in Dice for each pair of networks, candidate - baseline first.

    A verdict of an older version has no comparisons, and gives no charts.
    """
    limits = {criterion["name"]: criterion.get("limit") for criterion in verdict["criteria"]}
    judged = (verdict["candidate"], verdict["baseline"])
    pairs = itertools.groupby(
        verdict.get("comparisons", []), key=lambda each: (each["first"], each["second"])
    )
    return [
        draw_gains(list(group), limits.get("dice_gain") if pair == judged else None)
        for pair, group in pairs
    ]
