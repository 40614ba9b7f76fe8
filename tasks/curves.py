"""Learning curves of one training."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MAX_COLUMNS = 3
PANEL_IN = (4.4, 2.9)
WHOLE = ("total", "mean")  # curves that sum up the others
WHOLE_COLOUR = "#1f2937"
COLOURS = (
    "#2563eb", "#e8590c", "#0f9d76", "#9333ea", "#d6336c", "#a16207", "#0891b2", "#64748b",
)  # fmt: skip
MAX_MARKED_EPOCHS = 40
SIDE = re.compile(r"train/(side\d+)/(.+)")

Curves = dict[str, tuple[list[float], list[float]]]


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: what it shows, with the unit.
        keys: metric key of each curve, by the curve's name.
        is_fraction: whether values lie between 0 and 1.
    """

    title: str
    keys: dict[str, str]
    is_fraction: bool = False


def draw_curves(rows: list[dict[str, float]], heading: str) -> Figure:
    """Losses, validation scores and learning rate over the epochs of one training.

    What no row has a finite number for is not drawn.

    Args:
        rows: one per epoch, with keys epoch, train/TERM, train/sideN/TERM, val/dice,
            val/dice/ORGAN, val/slice_fpr/ORGAN, val/gate_accuracy/ORGAN, learning_rate.
        heading: written over the whole picture.
    """
    rows = sorted(rows, key=lambda row: row["epoch"])
    drawn = []
    for panel in _panels(list(dict.fromkeys(key for row in rows for key in row))):
        curves = _curves(rows, panel)
        if curves:
            drawn.append((panel, curves))
    num_columns = 2 if len(drawn) == 4 else max(1, min(MAX_COLUMNS, len(drawn)))
    num_rows = max(1, -(-len(drawn) // num_columns))
    width_in, height_in = PANEL_IN
    figure = Figure(
        figsize=(width_in * num_columns, height_in * num_rows + 0.4), layout="constrained"
    )
    figure.suptitle(heading, fontsize=12)
    axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axis in axes[len(drawn) :]:
        axis.set_axis_off()
    for axis, (panel, curves) in zip(axes, drawn, strict=False):
        _draw_panel(axis, panel, curves)
    return figure


def _panels(keys: list[str]) -> list[Panel]:
    def below(prefix: str) -> dict[str, str]:
        found = {key.removeprefix(prefix): key for key in keys if key.startswith(prefix)}
        return {name: key for name, key in found.items() if "/" not in name}

    sides: dict[str, dict[str, str]] = {}
    for key in keys:
        if match := SIDE.fullmatch(key):
            sides.setdefault(match[2], {})[match[1]] = key
    mean = {"mean": "val/dice"} if "val/dice" in keys else {}
    return [
        Panel("Training loss", below("train/")),
        Panel("Validation Dice", below("val/dice/") | mean, is_fraction=True),
        Panel("Validation slice false-positive rate", below("val/slice_fpr/"), is_fraction=True),
        Panel("Validation accuracy of the gate", below("val/gate_accuracy/"), is_fraction=True),
        *(Panel(f"Training loss {term}, by side output", sides[term]) for term in sides),
        Panel("Learning rate", {"": "learning_rate"}),
    ]


def _curves(rows: list[dict[str, float]], panel: Panel) -> Curves:
    """Epochs and values of each curve that has any."""
    curves: Curves = {}
    for name, key in panel.keys.items():
        points = [row for row in rows if math.isfinite(row.get(key, math.nan))]
        if points:
            curves[name] = ([row["epoch"] for row in points], [row[key] for row in points])
    return curves


def _draw_panel(axis: Axes, panel: Panel, curves: Curves) -> None:
    colours = iter(COLOURS * (1 + len(curves) // len(COLOURS)))
    for name, (epochs, values) in curves.items():
        is_whole = name in WHOLE
        axis.plot(
            epochs,
            values,
            label=name,
            color=WHOLE_COLOUR if is_whole else next(colours),
            linewidth=2.0 if is_whole else 1.3,
            marker="o" if len(epochs) <= MAX_MARKED_EPOCHS else "",
            markersize=5 if len(epochs) == 1 else 3,
            zorder=3 if is_whole else 2,
        )
    axis.set_title(panel.title, fontsize=10, loc="left")
    axis.set_xlabel("epoch", fontsize=8)
    axis.tick_params(labelsize=8, which="both")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.grid(color="#e5e7eb", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    if panel.is_fraction:
        axis.set_ylim(-0.03, 1.03)
    if list(curves) != [""]:
        axis.legend(fontsize=7, frameon=False, ncols=1 + (len(curves) > 4))
