"""The tables of the report; every cell is text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fullscale.evaluation.case_scores import VARIANTS
from fullscale.reporting.numbers import (
    Metric,
    count,
    number,
    p_value,
    part_of,
    result_word,
    with_interval,
)
from fullscale.reporting.results import Results

if TYPE_CHECKING:
    import pandas as pd

    from fullscale.evaluation.score_files import Summary

DICE = Metric("dice", "Dice", 3)
SLICE_FPR = Metric("slice_fpr", "slice FPR", 4)
OVERLAP = (DICE, Metric("iou", "IoU", 3), SLICE_FPR, Metric("voxel_fpr", "voxel FPR", 5))
FALSE_SLICES = (
    Metric("near_slice_fpr", "slice FPR next to the organ", 4),
    Metric("remote_slice_fpr", "slice FPR elsewhere", 4),
)
SURFACE = (
    Metric("hd95_mm", "HD95, mm", 1),
    Metric("mean_surface_distance_mm", "mean surface distance, mm", 2),
    Metric("surface_dice_1mm", "surface Dice at 1 mm", 3),
    Metric("surface_dice_3mm", "surface Dice at 3 mm", 3),
    Metric("area_surface_dice_1mm", "at 1 mm, by area", 3),
    Metric("area_surface_dice_3mm", "at 3 mm, by area", 3),
    Metric("volume_difference_ml", "volume difference, ml", 1),
)
COUNTS = (
    Metric("num_cases", "cases", 0),
    Metric("num_organ_free", "organ-free cases", 0),
    Metric("num_missed", "missed", 0),
    Metric("num_free_slices", "organ-free slices", 0),
)
CASE_METRICS = (DICE, SURFACE[0], SURFACE[3], SURFACE[6])
ERRORS = (
    Metric("ece", "expected calibration error", 4),
    Metric("uncertain_ece", "of voxels between 0.1 and 0.9", 4),
)


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        caption: above the table.
        headings: of the columns.
        rows: a text for each column.
        num_names: number of columns on the left that name the row.
        notes: below the table: what is missing, and why.
    """

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_names: int = 2
    notes: tuple[str, ...] = ()


def criteria_table(results: Results) -> Table:
    """Return the conditions of the promotion gate; no rows without a verdict."""
    criteria = results.verdict["criteria"] if results.verdict else ()
    rows = tuple(
        (result_word(criterion), criterion["found"], criterion["wanted"]) for criterion in criteria
    )
    return Table(
        "Conditions of the promotion gate", ("result", "found", "wanted"), rows, num_names=3
    )


def comparison_table(results: Results) -> Table | None:
    """Return paired differences in Dice; None if the verdict has none."""
    rows = []
    for each in (results.verdict or {}).get("comparisons", []):
        gain = each["gain"]
        rows.append(
            (
                f"{each['first']} - {each['second']}",
                each["organ"],
                with_interval(gain["mean"], gain["low"], gain["high"], 4, sign=True),
                p_value(gain["p_value"]),
                p_value(each["p_holm"]),
                count(gain["num_patients"]),
                count(gain["num_pairs"]),
            )
        )
    headings = ("networks", "organ", "difference in Dice", "p", "p (Holm)", "patients", "pairs")
    caption = "Paired differences in Dice"
    return Table(caption, headings, tuple(rows)) if rows else None


def score_table(results: Results) -> Table | None:
    """Return overlap and false positives of every organ and network."""
    return metric_table(
        results.organs, results.summaries, "Scores of the test set", OVERLAP, COUNTS
    )


def false_slice_table(results: Results) -> Table | None:
    """Return the slice FPR next to the organ and elsewhere; None if not measured."""
    counts = (
        Metric("num_near_free_slices", "organ-free slices next to it", 0),
        Metric("num_remote_free_slices", "organ-free slices elsewhere", 0),
    )
    caption = "False positive slices within 10 mm of a slice with the organ, and elsewhere"
    return metric_table(results.organs, results.summaries, caption, FALSE_SLICES, counts)


def surface_table(results: Results) -> Table | None:
    """Return distances and volumes of every organ and network; None if not measured."""
    counts = (Metric("num_cases", "cases", 0),)
    return metric_table(results.organs, results.summaries, "Surfaces and volumes", SURFACE, counts)


def calibration_table(results: Results) -> Table | None:
    """Return the expected calibration errors; None if not measured."""
    counts = (
        Metric("num_calibration_voxels", "voxels", 0),
        Metric("num_uncertain_voxels", "voxels between 0.1 and 0.9", 0),
    )
    caption = "Expected calibration error"
    return metric_table(results.organs, results.summaries, caption, ERRORS, counts)


def metric_table(
    organs: Sequence[str],
    summaries: Mapping[str, Summary],
    caption: str,
    metrics: Sequence[Metric],
    counts: Sequence[Metric],
) -> Table | None:
    """Return metrics with intervals, then counts, for every organ and network.

    A metric that no summary has is left out and named in a note.

    Returns:
        None if no summary has any of the metrics.
    """
    pairs = [(organ, name) for organ in organs for name in summaries]

    def is_known(metric: Metric) -> bool:
        return any(f"test/{metric.key}/{organ}" in summaries[name] for organ, name in pairs)

    known, numbers = ([each for each in group if is_known(each)] for group in (metrics, counts))
    if not known:
        return None
    rows = [
        (
            organ,
            name,
            *(metric.write(summaries[name], organ) for metric in known),
            *(count(metric.read(summaries[name], organ)) for metric in numbers),
        )
        for organ, name in pairs
    ]
    headings = ("organ", "network", *(metric.title for metric in (*known, *numbers)))
    lost = [metric.title for metric in (*metrics, *counts) if not is_known(metric)]
    notes = (f"Not in these results: {', '.join(lost)}.",) if lost else ()
    return Table(caption, headings, tuple(rows), notes=notes)


def case_table(scores: pd.DataFrame) -> Table:
    """Return the main scores of every case and organ.

    Args:
        scores: as `score_cases` returns them.
    """
    columns = (*CASE_METRICS, Metric("num_false_positive_slices", "false positive slices", 0))
    rows = tuple(
        (row["case"], row["organ"], *(number(row[each.key], each.digits) for each in columns))
        for row in scores.to_dict("records")
    )
    headings = ("case", "organ", *(each.title for each in columns))
    return Table("Scores of each case", headings, rows)


def classifier_table(results: Results) -> Table | None:
    """Return the errors of the slice classifiers (CGM); None if no network has one."""
    rows = []
    for organ in results.organs:
        for name, scores in results.scores.items():
            if "num_false_closings" not in scores:
                continue
            sums = scores.loc[scores["organ"] == organ].sum(numeric_only=True)
            rows.append(
                (
                    organ,
                    name,
                    _share(sums, "num_false_closings", "num_organ_slices"),
                    _share(sums, "num_closed_voxels", "num_true_voxels"),
                    _share(sums, "num_false_openings", "num_free_slices"),
                )
            )
    headings = (
        "organ",
        "network",
        "false closings, of organ slices",
        "voxels lost by them, of the organ",
        "false openings, of organ-free slices",
    )
    return (
        Table(
            "Slices wrongly closed and opened by the slice classifier (CGM)", headings, tuple(rows)
        )
        if rows
        else None
    )


def _share(sums: pd.Series[float], part: str, whole: str) -> str:
    if part not in sums or whole not in sums:
        return number(None, 4)
    return part_of(float(sums[part]), float(sums[whole]))


def ablated_networks(results: Results) -> tuple[str, ...]:
    """Return the networks that were also scored without the slice classifier."""
    return tuple(
        name
        for name, summary in results.summaries.items()
        if any(
            f"test/dice{suffix}/{organ}" in summary
            for organ in results.organs
            for suffix in VARIANTS.values()
        )
    )


def gates_of(results: Results, name: str) -> dict[str, str]:
    """Return the gates of the slice classifier that a network was scored with.

    Returns:
        Suffix of the scores' names to the gate. The gate that is used has no suffix and comes last;
        it is the one whose suffix is missing. Older results lack slab, and were made with hard.
    """
    summary = results.summaries[name]
    others = {
        suffix: gate
        for gate, suffix in VARIANTS.items()
        if any(f"test/dice{suffix}/{organ}" in summary for organ in results.organs)
    }
    used = next(gate for gate in reversed(VARIANTS) if gate not in others.values())
    return {**others, "": used}


def under_variant(metric: Metric, suffix: str) -> Metric:
    """Return the metric with another use of the slice classifier."""
    return Metric(f"{metric.key}{suffix}", metric.title, metric.digits)


def ablation_table(results: Results) -> Table | None:
    """Return Dice and slice FPR with each gate of the slice classifier; None if not measured."""
    rows = [
        (
            organ,
            name,
            use,
            *(
                under_variant(metric, suffix).write(results.summaries[name], organ)
                for metric in (DICE, SLICE_FPR)
            ),
        )
        for organ in results.organs
        for name in ablated_networks(results)
        for suffix, use in gates_of(results, name).items()
    ]
    headings = ("organ", "network", "slice classifier", DICE.title, SLICE_FPR.title)
    caption = "The same predictions with each gate of the slice classifier (CGM), the used one last"
    return Table(caption, headings, tuple(rows), num_names=3) if rows else None
