"""A picture of what was found in a scan: slices with outlines, and one view from the front."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from fullscale.evaluation.slice_pictures import choose_slices
from fullscale.scans.slice_outlines import OutlineStyle, draw_outlined_slice
from fullscale.scans.volume import Volume

COLOURS = ("#ffb000", "#4cc9ff", "#ff5a8f", "#7ee081", "#c792ea", "#f78c6c")
"""Of organs in order; apart on grey, and again from the first where there are more."""

CELL_IN = 2.4
_STRIDE = 4
"""Voxels in plane that slices are chosen by; each organ is larger in its largest slice."""

Labels = NDArray[np.uint8]


def draw_preview(
    scan: Volume,
    label_ZYX: Labels,
    organs: Mapping[str, int],
    window_hu: tuple[float, float],
    heading: str,
) -> Figure:
    """Slices spread over what was found, and the coronal plane that shows most of it.

    Slices are seen from the feet, the coronal plane from the front: the patient's right is on the
    left. Proportions are true.

    Args:
        scan: HU, canonical orientation.
        label_ZYX: label ids on the same grid.
        organs: organ to its label id.
        window_hu: grey-scale window.
        heading: over the picture; names no patient.
    """
    dz, dy, dx = scan.spacing_mm
    coarse_ZYX = label_ZYX[:, ::_STRIDE, ::_STRIDE]
    chosen = choose_slices([(coarse_ZYX == label_id)[None] for label_id in organs.values()])
    y = int(np.count_nonzero(label_ZYX, axis=(0, 2)).argmax())
    if not label_ZYX.any():
        y = label_ZYX.shape[1] // 2
    depth, height, width = label_ZYX.shape
    rows = -(-len(chosen) // 3)
    axial_in, coronal_in = CELL_IN * height * dy / (width * dx), CELL_IN * rows
    figure = Figure(
        figsize=(CELL_IN * 3 + coronal_in * 1.1, (axial_in + 0.25) * rows + 0.5),
        layout="constrained",
    )
    left, right = np.ravel(
        figure.subfigures(1, 2, width_ratios=(CELL_IN * 3, coronal_in * 1.1), squeeze=False)
    )
    cells = np.ravel(left.subplots(rows, 3, squeeze=False))
    for axes in cells:
        axes.set_axis_off()
    for axes, z in zip(cells, chosen, strict=False):
        _draw(axes, scan.values_ZYX[z], label_ZYX[z], organs, window_hu, dy / dx)
        axes.set_title(f"slice {z} of {depth}", fontsize=8)
    axes = right.subplots()
    axes.set_axis_off()
    _draw(axes, scan.values_ZYX[::-1, y], label_ZYX[::-1, y], organs, window_hu, dz / dx)
    axes.set_title(f"coronal, row {y} of {height}", fontsize=8)
    handles = [
        Line2D([], [], color=_colour(number), label=organ) for number, organ in enumerate(organs)
    ]
    right.legend(handles=handles, loc="lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(heading, fontsize=9)
    return figure


def _draw(
    axes: Axes,
    image: NDArray[np.generic],
    labels: Labels,
    organs: Mapping[str, int],
    window_hu: tuple[float, float],
    aspect: float,
) -> None:
    outlines = [
        (labels == label_id, OutlineStyle(_colour(number), width=1.1))
        for number, label_id in enumerate(organs.values())
    ]
    draw_outlined_slice(axes, image, outlines, window_hu, aspect)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
