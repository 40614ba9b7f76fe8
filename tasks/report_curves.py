"""The report's charts of curves: learning and reliability, every network in each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.ticker import MaxNLocator

from tasks.report_figures import Chart
from tasks.report_format import number
from tasks.report_style import INK, add_legend, looks, new_chart
from tasks.results import History, Summary

MAX_MARKED_EPOCHS = 40


def draw_histories(
    histories: Mapping[str, History], names: Sequence[str], key: str, title: str, unit: str
) -> Chart | None:
    """One metric of every training over its epochs.

    Args:
        histories: network to its epochs.
        names: every network of the report, for looks that stay the same.
        key: of the metric.
        title: over the chart.
        unit: along the axis.

    Returns:
        None where no training has the metric.
    """
    figure, axes = new_chart(title)
    told = []
    for name, look in looks(names).items():
        rows = [row for row in histories.get(name, []) if math.isfinite(row.get(key, math.nan))]
        if not rows:
            continue
        axes.plot(
            [row["epoch"] for row in rows],
            [row[key] for row in rows],
            label=name,
            color=look.colour,
            linestyle=look.line,
            marker=look.marker if len(rows) <= MAX_MARKED_EPOCHS else "",
            markersize=4,
            linewidth=1.8,
        )
        told.append(
            f"{name} from {number(rows[0][key], 3)} to {number(rows[-1][key], 3)} in "
            f"{len(rows)} epochs"
        )
    if not told:
        return None
    axes.set_xlabel("epoch")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    add_legend(figure, 3)
    return figure, f"{title} over the epochs: {'; '.join(told)}."


def draw_reliability(
    calibration: Mapping[str, pd.DataFrame],
    summaries: Mapping[str, Summary],
    names: Sequence[str],
    organ: str,
) -> Chart | None:
    """Share of true voxels against their probability; a calibrated network lies on the diagonal.

    Args:
        calibration: network to its table, as `tasks.evaluate.tabulate` makes it.
        summaries: network to its summary, for the expected calibration error.
        names: every network of the report, for looks that stay the same.
        organ: which rows to draw.

    Returns:
        None where no network has a curve of this organ.
    """
    figure, axes = new_chart(f"Reliability, {organ}")
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1, alpha=0.6)
    told = []
    for name, look in looks(names).items():
        table = calibration.get(name)
        if table is None or not (rows := table[table["organ"] == organ]).size:
            continue
        error = number(summaries.get(name, {}).get(f"test/ece/{organ}"), 4)
        axes.plot(
            rows["mean_probability"].to_numpy(),
            rows["fraction_true"].to_numpy(),
            label=f"{name}, ECE {error}",
            color=look.colour,
            linestyle=look.line,
            marker=look.marker,
            markersize=5,
            linewidth=1.6,
        )
        told.append(f"{name} in {len(rows)} bins, expected calibration error {error}")
    if not told:
        return None
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("mean probability")
    axes.set_ylabel("share of true voxels")
    add_legend(figure, 1)
    return figure, f"Reliability curves, {organ}: {'; '.join(told)}."
