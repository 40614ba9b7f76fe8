"""The charts of scores. Each function returns a figure and its description (alt text).

B bars.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fullscale.reporting.numbers import number, with_interval
from fullscale.reporting.style import (
    GRID,
    INK,
    add_legend,
    assign_styles,
    draw_curve,
    find_curve,
    new_chart,
)
from fullscale.runtime.progress import training_title

if TYPE_CHECKING:
    import pandas as pd

    from fullscale.evaluation.score_files import Summary
    from fullscale.reporting.results import History

MAX_LEVEL_NAMES = 3
"""More names below a chart are written upright."""

Chart = tuple[Figure, str]
Values = tuple[float, float, float]
"""A value and the ends of its interval; NaN for unknown."""


def draw_boxes(
    scores: Mapping[str, pd.DataFrame],
    networks: Sequence[str],
    organ: str,
    pair: tuple[str, str],
) -> Chart | None:
    """Draw Dice of every case and network for one organ; lines join the values of a case.

    Args:
        scores: network to its rows, with columns case, organ and dice.
        networks: every network of the report, so that each keeps its style.
        organ: rows of this organ are drawn.
        pair: candidate and baseline; a line is dashed where the candidate is worse.

    Returns:
        None if no case has a Dice.
    """
    import pandas as pd

    dice = pd.DataFrame(
        {
            name: table.loc[table["organ"] == organ].set_index("case")["dice"]
            for name, table in ((name, scores[name]) for name in networks if name in scores)
            if "dice" in table
        }
    ).dropna(how="all")
    if dice.empty:
        return None
    names = [str(name) for name in dice]
    figure, axes = new_chart(f"Dice, {organ}")
    columns = [dice[name].dropna().to_numpy() for name in names]
    ink = {"color": INK, "linewidth": 1.2}
    axes.boxplot(
        columns,
        widths=0.45,
        showfliers=False,
        boxprops=ink,
        whiskerprops=ink,
        capprops=ink,
        medianprops={"color": INK, "linewidth": 3},
    )
    candidate, baseline = pair
    both = dice[[candidate, baseline]].dropna() if {*pair} <= {*names} else dice.iloc[:0]
    worse = both.index[both[candidate] < both[baseline]] if len(both) else both.index
    for case in dice.index:
        known = dice.loc[case].dropna()
        is_worse = case in worse
        axes.plot(
            [names.index(name) + 1 for name in known.index],
            known.to_numpy(),
            color=INK,
            alpha=0.9 if is_worse else 0.45,
            linestyle="--" if is_worse else "-",
            linewidth=1.4 if is_worse else 0.9,
        )
    for place, (name, column) in enumerate(zip(names, columns, strict=True), 1):
        style = assign_styles(networks)[name]
        axes.scatter(
            [place] * len(column), column, s=26, color=style.colour, marker=style.marker, zorder=3
        )
    axes.set_xticks(range(1, len(names) + 1), labels=names)
    if len(names) > MAX_LEVEL_NAMES:
        axes.tick_params(axis="x", labelrotation=90)
    axes.set_ylabel("Dice")
    medians = ", ".join(
        f"{name} median {number(float(dice[name].median()), 3)} of {dice[name].count()} cases"
        for name in names
    )
    won = int((both[candidate] > both[baseline]).sum()) if len(both) else 0
    ends = f"; {candidate} is higher in {won} of {len(both)} pairs" if len(both) else ""
    return figure, f"Box plots of Dice, {organ}: {medians}{ends}."


def draw_bars(
    title: str,
    unit: str,
    groups: Sequence[str],
    series: Mapping[str, Sequence[Values]],
    digits: int,
    *,
    limit: float | None = None,
) -> Chart | None:
    """Draw bars side by side in groups, with intervals and numbers.

    Args:
        title: above the chart.
        unit: along the axis.
        groups: names below the bars.
        series: name to a value for each group.
        digits: of the numbers on the bars.
        limit: the largest value allowed, drawn as a line.

    Returns:
        None if nothing was measured.
    """
    figure, axes = new_chart(title)
    width = 0.8 / max(1, len(series))
    tops_B = [0.0 if limit is None else limit]
    facts = []
    for place, (name, style) in enumerate(assign_styles(tuple(series)).items()):
        for group, (value, low, high) in enumerate(series[name]):
            if not math.isfinite(value):
                continue
            x = group + (place - (len(series) - 1) / 2) * width
            axes.bar(
                x,
                value,
                width * 0.9,
                label=name if name not in axes.get_legend_handles_labels()[1] else None,
                facecolor="none" if style.hatch else (style.colour, 0.6),
                edgecolor=style.colour,
                hatch=style.hatch,
            )
            top = value
            if math.isfinite(low) and math.isfinite(high):
                axes.errorbar(
                    x, value, [[value - low], [high - value]], color=INK, linewidth=1.4, capsize=4
                )
                top = high
            axes.annotate(
                number(value, digits),
                (x, top),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
                color=INK,
            )
            tops_B.append(top)
            facts.append(f"{groups[group]} {name} {with_interval(value, low, high, digits)}")
    if not facts:
        return None
    axes.set_ylim(0, 1.15 * max(tops_B) or 0.01)
    axes.set_xticks(range(len(groups)), labels=groups)
    axes.set_ylabel(unit)
    if limit is not None:
        axes.axhline(limit, color=INK, linestyle=(0, (6, 3)), linewidth=1.2, label="allowed")
    add_legend(figure, 3)
    return figure, f"Bars of {unit}, {title}: {', '.join(facts)}."


def draw_gains(comparisons: Sequence[Mapping[str, Any]], wanted: float | None) -> Chart:
    """Draw differences in Dice between two networks with intervals, all organs first.

    Args:
        comparisons: of gate.json, all of the same two networks.
        wanted: limit that the interval over all organs must exceed, drawn as a line.
    """
    first, second = comparisons[0]["first"], comparisons[0]["second"]
    figure, axes = new_chart(f"{first} - {second}", height_in=1.5 + 0.4 * len(comparisons))
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    facts = []
    for place, each in enumerate(comparisons):
        gain = {key: math.nan if value is None else value for key, value in each["gain"].items()}
        axes.plot([gain["low"], gain["high"]], [place, place], color=INK, linewidth=2)
        axes.plot(gain["mean"], place, "o", color=INK, markersize=8 if place == 0 else 6)
        facts.append(
            f"{each['organ']} "
            f"{with_interval(gain['mean'], gain['low'], gain['high'], 4, sign=True)}"
        )
    axes.axvline(0, color=INK, linewidth=1)
    if wanted:
        axes.axvline(wanted, color=INK, linestyle=(0, (6, 3)), linewidth=1.2, label="wanted")
        add_legend(figure, 1)
    axes.set_yticks(range(len(comparisons)), labels=[each["organ"] for each in comparisons])
    axes.set_ylim(len(comparisons) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("difference in Dice")
    return figure, f"Difference in Dice, {first} - {second}: {'; '.join(facts)}."


def draw_histories(
    histories: Mapping[str, Mapping[int, History]],
    names: Sequence[str],
    key: str,
    title: str,
    unit: str,
) -> Chart | None:
    """Draw one metric of every training over its epochs; those of a network look alike.

    Args:
        histories: network to the epochs of each of its trainings, by seed.
        names: every network of the report, so that each keeps its style.
        key: of the metric.
        title: above the chart.
        unit: along the axis.

    Returns:
        None if no training has the metric.
    """
    figure, axes = new_chart(title)
    facts = []
    for name, style in assign_styles(names).items():
        label = name
        for seed, history in histories.get(name, {}).items():
            curve = find_curve(history, key)
            if not (values := curve[1]):
                continue
            draw_curve(
                axes, curve, label, color=style.colour, linestyle=style.line, marker=style.marker,
                markersize=4, linewidth=1.8,
            )  # fmt: skip
            label = "_nolegend_"  # one entry for all trainings of a network
            facts.append(
                f"{training_title(name, seed)} from {number(values[0], 3)} to "
                f"{number(values[-1], 3)} in {len(values)} epochs"
            )
    if not facts:
        return None
    axes.set_ylabel(unit)
    add_legend(figure, 3)
    return figure, f"{title} over the epochs: {'; '.join(facts)}."


def draw_reliability(
    calibration: Mapping[str, pd.DataFrame],
    summaries: Mapping[str, Summary],
    names: Sequence[str],
    organ: str,
) -> Chart | None:
    """Draw share of true voxels over probability; a calibrated network lies on the diagonal.

    Args:
        calibration: network to its table, as `tabulate_calibration` makes it.
        summaries: network to its summary, for the expected calibration error.
        names: every network of the report, so that each keeps its style.
        organ: rows of this organ are drawn.

    Returns:
        None if no network has a curve of this organ.
    """
    figure, axes = new_chart(f"Reliability, {organ}")
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1, alpha=0.6)
    facts = []
    for name, style in assign_styles(names).items():
        table = calibration.get(name)
        if table is None or not (rows := table[table["organ"] == organ]).size:
            continue
        error = number(summaries.get(name, {}).get(f"test/ece/{organ}"), 4)
        axes.plot(
            rows["mean_probability"].to_numpy(),
            rows["fraction_true"].to_numpy(),
            label=f"{name}, ECE {error}",
            color=style.colour,
            linestyle=style.line,
            marker=style.marker,
            markersize=5,
            linewidth=1.6,
        )
        facts.append(f"{name} in {len(rows)} bins, expected calibration error {error}")
    if not facts:
        return None
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("mean probability")
    axes.set_ylabel("share of true voxels")
    add_legend(figure, 1)
    return figure, f"Reliability curves, {organ}: {'; '.join(facts)}."
