"""How the report's charts look: legible on a phone, in grey, to the colour-blind and in the dark.

Colours are those of Okabe and Ito (2008). No chart tells things apart by colour alone: networks
differ in marker, line and hatch, too.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, GRID = "#1f2937", "#d4d8de"
DARK = {
    INK: "#e5e7eb",
    GRID: "#3a4150",
    "#0072b2": "#56b4e9",
    "#d55e00": "#ff8c42",
    "#009e73": "#2fc79b",
    "#a8527e": "#e59ac2",
}
"""What each colour of a chart becomes where the reader prefers a dark page."""

CHART_IN = (4.2, 3.2)
PICTURE_DPI = 150


@dataclass(frozen=True)
class Look:
    """How one series is drawn."""

    colour: str
    marker: str
    line: str
    hatch: str


LOOKS = (
    Look("#0072b2", "o", "-", ""),
    Look("#d55e00", "s", "--", "///"),
    Look("#009e73", "^", "-.", "..."),
    Look("#a8527e", "D", ":", "xxx"),
)


@dataclass(frozen=True)
class Picture:
    """A picture that stands in the page itself.

    Attributes:
        uri: its bytes as a data: URI.
        alt: what it shows, for who cannot see it.
        caption: written below it.
    """

    uri: str
    alt: str
    caption: str = ""


def looks(names: Sequence[str]) -> dict[str, Look]:
    """A look for each name; they repeat after the fourth."""
    return {name: LOOKS[place % len(LOOKS)] for place, name in enumerate(names)}


def new_chart(title: str, height_in: float = CHART_IN[1]) -> tuple[Figure, Axes]:
    """An empty chart without a background, in ink."""
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
    """Names of the series below the chart, in ink."""
    figure.legend(
        loc="outside lower center",
        ncols=num_columns,
        fontsize=10,
        frameon=False,
        labelcolor=INK,
        handlelength=2.6,
    )


def to_svg_uri(figure: Figure) -> str:
    """A chart as SVG that turns light where the reader prefers a dark page.

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
    """A picture as PNG, for scans, and for readers with a page of their own."""
    buffer = io.BytesIO()
    figure.savefig(
        buffer, format="png", dpi=PICTURE_DPI, facecolor="white", metadata={"Software": None}
    )
    return _data_uri("image/png", buffer.getvalue())


def from_data_uri(uri: str) -> tuple[str, bytes]:
    """What a picture's URI holds: the ending of its file's name, "svg" or "png", and its bytes."""
    kind, _, content = uri.removeprefix("data:image/").partition(";base64,")
    return kind.partition("+")[0], base64.b64decode(content)


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
