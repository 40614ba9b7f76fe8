"""The paper's rows as a picture: published Dice beside what was measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from tasks.comparison import Row, Setting
from tasks.report_style import GRID, INK, LOOKS

ROW_IN = 0.34
PANEL_IN = 4.2


def draw_table(rows: Sequence[Row], setting: Setting) -> Figure:
    """One panel for each organ, a line for each row; rows that were not run say so.

    Published and measured differ in marker, not by colour alone.
    """
    organs = setting.organs
    figure = Figure(
        figsize=(2.6 + PANEL_IN * len(organs), 1.6 + ROW_IN * len(rows)), layout="constrained"
    )
    panels = figure.subplots(1, len(organs), sharey=True, squeeze=False)[0]
    places = np.arange(len(rows))
    here, paper = LOOKS[0], LOOKS[1]
    for axes, organ in zip(panels, organs, strict=True):
        published = [row.published[organ] for row in rows]
        found = np.array(
            [[row.measured(f"dice{end}", organ) for end in ("", "_low", "_high")] for row in rows]
        )
        axes.plot(
            published, places, paper.marker, color=paper.colour, mfc="none", label="published"
        )
        axes.hlines(places, found[:, 1], found[:, 2], color=here.colour, linewidth=2)
        axes.plot(
            found[:, 0],
            places,
            here.marker,
            color=here.colour,
            label=f"measured on {setting.cohort}, with its interval",
        )
        for place, row in enumerate(rows):
            if row.reason:
                axes.text(0.02, place, "not run", va="center", fontsize=9, color=INK)
        axes.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5), xlabel=f"Dice, {organ}")
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(places, [f"{row.title}, {row.encoder}" for row in rows], fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure
