"""The style of charts: legible on a phone, in grey, for the colour-blind and on dark pages.

Colours are those of Okabe and Ito (2008). No chart distinguishes series by colour alone: networks
also differ in marker, line and hatch.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Curve = tuple[list[float], list[float]]
"""Epochs and values."""

INK, GRID = "#1f2937", "#d4d8de"
DARK = {
    INK: "#e5e7eb",
    GRID: "#3a4150",
    "#0072b2": "#56b4e9",
    "#d55e00": "#ff8c42",
    "#009e73": "#2fc79b",
    "#a8527e": "#e59ac2",
}
"""Replacement of each colour of a chart for readers who prefer a dark page."""

CHART_IN = (4.2, 3.2)
PICTURE_DPI = 150
MAX_MARKED_EPOCHS = 40
"""Curves with more epochs have no markers."""


@dataclass(frozen=True)
class SeriesStyle:
    """The style of one series, in words of matplotlib."""

    colour: str
    marker: str
    line: str
    hatch: str


SERIES_STYLES = (
    SeriesStyle("#0072b2", "o", "-", ""),
    SeriesStyle("#d55e00", "s", "--", "///"),
    SeriesStyle("#009e73", "^", "-.", "..."),
    SeriesStyle("#a8527e", "D", ":", "xxx"),
)


@dataclass(frozen=True)
class Picture:
    """A picture embedded in the page.

    Attributes:
        uri: the file as a data: URI.
        alt: description for readers who cannot see the picture.
        caption: below the picture.
    """

    uri: str
    alt: str
    caption: str = ""


def assign_styles(names: Sequence[str]) -> dict[str, SeriesStyle]:
    """Return a style for each name; styles repeat after the fourth name."""
    return {name: SERIES_STYLES[place % len(SERIES_STYLES)] for place, name in enumerate(names)}


def new_chart(title: str, height_in: float = CHART_IN[1]) -> tuple[Figure, Axes]:
    """Return an empty chart with a transparent background."""
    figure = Figure(figsize=(CHART_IN[0], height_in), layout="constrained", facecolor="none")
    axes = figure.subplots()
    axes.set_facecolor("none")
    axes.set_title(title, fontsize=11.5, loc="left", color=INK)
    axes.tick_params(labelsize=10.5, colors=INK)
    axes.xaxis.label.set(color=INK, fontsize=10.5)
    axes.yaxis.label.set(color=INK, fontsize=10.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def add_legend(figure: Figure, num_columns: int) -> None:
    """Add the names of the series below the chart."""
    figure.legend(
        loc="outside lower center",
        ncols=num_columns,
        fontsize=10,
        frameon=False,
        labelcolor=INK,
        handlelength=2.6,
    )


def find_curve(rows: Sequence[Mapping[str, float]], key: str) -> Curve:
    """Return the epochs in which a metric is finite, and its values."""
    known = [row for row in rows if math.isfinite(row.get(key, math.nan))]
    return [row["epoch"] for row in known], [row[key] for row in known]


def draw_curve(axes: Axes, curve: Curve, label: str, **line: Any) -> None:
    """Draw a metric over epochs; few epochs are marked.

    Args:
        axes: receives the curve.
        curve: as `find_curve` returns it.
        label: name in the legend.
        line: properties of matplotlib's Line2D.
    """
    epochs, values = curve
    if len(epochs) > MAX_MARKED_EPOCHS:
        line["marker"] = ""
    axes.plot(epochs, values, label=label, **line)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def to_svg_uri(figure: Figure) -> str:
    """Return a chart as SVG with light colours for readers who prefer a dark page.

    The same chart gives the same bytes.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "fullscale"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    names = {colour: f"--c{place}" for place, colour in enumerate(DARK)}
    text = buffer.getvalue()
    for colour, name in names.items():
        text = text.replace(colour, f"var({name}, {colour})")
    dark = "".join(f"{names[colour]}:{light};" for colour, light in DARK.items())
    style = f"<style>@media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}</style>"
    head, start, rest = text.partition("<defs>")
    return _data_uri("image/svg+xml", f"{head}{style}{start}{rest}".encode())


def to_png_uri(figure: Figure) -> str:
    """Return a picture as PNG on white, for scans and for pages outside the report."""
    buffer = io.BytesIO()
    figure.savefig(
        buffer, format="png", dpi=PICTURE_DPI, facecolor="white", metadata={"Software": None}
    )
    return _data_uri("image/png", buffer.getvalue())


def from_data_uri(uri: str) -> tuple[str, bytes]:
    """Return suffix of the file, "svg" or "png", and bytes of a picture's URI."""
    kind, _, content = uri.removeprefix("data:image/").partition(";base64,")
    return kind.partition("+")[0], base64.b64decode(content)


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
