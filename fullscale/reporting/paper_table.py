"""The paper's rows as picture, CSV and Markdown: published and measured Dice."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fullscale.reporting.numbers import number, p_value, with_interval
from fullscale.reporting.paper_rows import Claim, PaperRow, Setting
from fullscale.reporting.style import GRID, INK, SERIES_STYLES
from fullscale.runtime.markdown import format_table

ROW_IN = 0.34
PANEL_IN = 4.2


def draw_table(rows: Sequence[PaperRow], setting: Setting) -> Figure:
    """Draw one panel for each organ, with a line for each row; rows that were not run are marked.

    Published and measured values differ in marker, not by colour alone.
    """
    organs = setting.organs
    figure = Figure(
        figsize=(2.6 + PANEL_IN * len(organs), 1.6 + ROW_IN * len(rows)), layout="constrained"
    )
    panels = figure.subplots(1, len(organs), sharey=True, squeeze=False)[0]
    places = np.arange(len(rows))
    here, paper = SERIES_STYLES[0], SERIES_STYLES[1]
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


def tabulate_rows(rows: Sequence[PaperRow], setting: Setting) -> pd.DataFrame:
    """Return a line for each row and organ; values not published or not measured are empty."""
    return pd.DataFrame(
        {
            "network": row.network,
            "title": row.title,
            "encoder": row.encoder,
            "organ": organ,
            "published_dice": row.published[organ],
            "dice": row.measured("dice", organ),
            "dice_low": row.measured("dice_low", organ),
            "dice_high": row.measured("dice_high", organ),
            "num_cases": row.measured("num_cases", organ),
            "slice_fpr": row.measured("slice_fpr", organ),
            "voxel_fpr": row.measured("voxel_fpr", organ),
            "false_closings": row.measured("false_closings", organ),
            "closed_volume": row.measured("closed_volume", organ),
            "parameters": row.parameters or math.nan,
            "published_parameters_m": row.published_parameters_m,
            "gmac": row.gmac,
            "seconds_per_scan": row.seconds_per_scan,
            "cohort": setting.cohort,
            "on_lits": "measured" if setting.is_lits and not row.reason else "not run",
            "not_run_because": row.reason,
        }
        for row in rows
        for organ in setting.organs
    )


def write_markdown(rows: Sequence[PaperRow], claims: Sequence[Claim], setting: Setting) -> str:
    """Return the tables as Markdown: Dice of each organ, the paper's claims, costs of networks."""
    train, size_px = setting.params.train, setting.params.slice.size_px
    listed = sorted(setting.params.seeds)
    seeds = f"{'seeds' if len(listed) > 1 else 'seed'} {', '.join(str(seed) for seed in listed)}"
    confidence = setting.params.register_.confidence
    dice_px = "Dice on LiTS" if setting.is_lits else "Dice here"
    lines = [
        "# The paper's rows",
        "",
        f"Cohort: {setting.cohort}, {setting.num_cases} test cases. Slices of {size_px} px, width "
        f"{train.width} (the paper: 320 px, 64), {train.num_epochs} epochs, {train.optimizer}, "
        f"{seeds}. Commit {setting.provenance.git_commit}, data version "
        f"{setting.provenance.data_version}.",
        ""
        if setting.is_lits
        else "Not run on LiTS: figures here and published ones are of different scans, and not to "
        "be compared.",
    ]
    for organ in setting.organs:
        lines += ["", f"## {organ}", ""]
        lines += format_table(
            (
                "network", "encoder", "published Dice", f"{dice_px} ({confidence:.0%} interval)",
                "n", "slice FPR", "voxel FPR", "false closings", "Dice on LiTS",
            ),
            (_organ_cells(row, organ, setting) for row in rows),
        )  # fmt: skip
    lines += ["", "## What the paper says is better", ""]
    lines += format_table(
        (
            "what", "first", "second", f"gain in Dice ({confidence:.0%} interval)",
            "p", "Holm p", "patients",
        ),
        (
            (
                claim.title, claim.better, claim.worse,
                with_interval(claim.gain.mean, claim.gain.low, claim.gain.high, 4, sign=True),
                p_value(claim.gain.p_value), p_value(claim.p_holm), str(claim.gain.num_patients),
            )
            for claim in claims
        ),
    )  # fmt: skip
    lines += ["", "## What they cost", ""]
    lines += format_table(
        (
            "network",
            "encoder",
            "parameters here (M)",
            "published (M)",
            "GMAC a slice",
            "seconds a scan",
        ),
        (_cost_cells(row) for row in rows),
    )
    lines += [
        "",
        f"Seconds: median of segmenting one scan of {setting.timed_slices} slices, on the machine "
        "that wrote this table; they differ from run to run. Published parameters are of width 64.",
    ]
    if absent := [row for row in rows if row.reason]:
        lines += ["", "## Not run", ""]
        lines += [f"- {row.title} ({row.encoder}): {row.reason}." for row in absent]
    return "\n".join(lines) + "\n"


def _organ_cells(row: PaperRow, organ: str, setting: Setting) -> tuple[str, ...]:
    published = row.published[organ]
    named = (row.title, row.encoder, "none" if math.isnan(published) else f"{published:.4f}")
    if row.reason:
        return (*named, *["not run"] * 6)
    dice, low, high = (row.measured(f"dice{end}", organ) for end in ("", "_low", "_high"))
    closings = row.measured("false_closings", organ)
    return (
        *named,
        with_interval(dice, low, high, 4),
        number(row.measured("num_cases", organ), 0),
        number(row.measured("slice_fpr", organ), 4),
        number(row.measured("voxel_fpr", organ), 5),
        "no classifier" if math.isnan(closings) else number(closings, 4),
        number(dice, 4) if setting.is_lits else "not run",
    )


def _cost_cells(row: PaperRow) -> tuple[str, ...]:
    published_m = row.published_parameters_m
    published = "none" if math.isnan(published_m) else f"{published_m:.2f}"
    if row.reason:
        return (row.title, row.encoder, "not run", published, "not run", "not run")
    return (
        row.title,
        row.encoder,
        f"{row.parameters / 1e6:.2f}",
        published,
        f"{row.gmac:.2f}",
        f"{row.seconds_per_scan:.2f}",
    )
