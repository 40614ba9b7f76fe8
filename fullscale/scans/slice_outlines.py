"""Draw a slice of a scan in grey with the outlines of masks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HALO_COLOUR = "#00000090"


@dataclass(frozen=True)
class OutlineStyle:
    """The line around a mask.

    Attributes:
        colour: as #rrggbb.
        line: a word of both matplotlib and CSS.
        width: in points.
        halo_width: width of the dark border on both sides of the line, in points, together; 0: no
            border.
    """

    colour: str
    line: Literal["solid", "dashed", "dotted"] = "solid"
    width: float = 1.0
    halo_width: float = 0.0


def draw_outlined_slice(
    axes: Axes,
    image_HW: NDArray[np.generic],
    outlines: Iterable[tuple[NDArray[np.bool_], OutlineStyle]],
    window_hu: tuple[float, float],
    aspect: float | Literal["equal", "auto"] = "equal",
    interpolation: Literal["auto", "nearest"] = "nearest",
) -> None:
    """Draw one slice and the outlines of masks on it.

    Args:
        axes: receives the drawing.
        image_HW: HU.
        outlines: boolean masks H x W, each with its style; empty masks are skipped.
        window_hu: HU of black and of white.
        aspect: height of a pixel / its width; or a word of matplotlib.
        interpolation: of pixels on the screen, as in matplotlib's imshow.
    """
    low_hu, high_hu = window_hu
    axes.imshow(
        image_HW, cmap="gray", vmin=low_hu, vmax=high_hu, aspect=aspect,
        interpolation=interpolation,
    )  # fmt: skip
    for mask_HW, style in outlines:
        if not mask_HW.any():
            continue
        contour = axes.contour(
            mask_HW, levels=[0.5], colors=[style.colour], linestyles=[style.line],
            linewidths=style.width,
        )  # fmt: skip
        if style.halo_width:
            from matplotlib.patheffects import withStroke

            width = style.width + style.halo_width
            contour.set_path_effects([withStroke(linewidth=width, foreground=HALO_COLOUR)])
