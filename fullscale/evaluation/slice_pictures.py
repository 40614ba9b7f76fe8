"""Pictures of slices with the outlines of truth and prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fullscale.scans.slice_outlines import OutlineStyle, draw_outlined_slice

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_PICTURE_SLICES = 6
MAX_COLUMNS = 6
CELL_IN = 2.6
TRUTH, PREDICTION = OutlineStyle("#22d3a6"), OutlineStyle("#ff5a5f")


def draw_slices(
    images_NHW: np.ndarray,
    truths_NKHW: np.ndarray,
    predictions_NKHW: np.ndarray,
    window_hu: tuple[float, float],
    titles: Sequence[str],
    heading: str = "",
) -> Figure:
    """Draw slices side by side, truth outlined in green and prediction in red.

    Args:
        images_NHW: HU, in radiological view (patient's right on the left).
        truths_NKHW: boolean masks, one for each organ.
        predictions_NKHW: boolean masks of the same shape.
        window_hu: HU of black and of white.
        titles: one for each slice.
        heading: title of the whole picture.
    """
    from matplotlib.figure import Figure

    columns = min(len(images_NHW), MAX_COLUMNS)
    rows = -(-len(images_NHW) // columns)
    height, width = images_NHW.shape[1:]
    figure = Figure(
        figsize=(CELL_IN * columns, (CELL_IN * height / width + 0.3) * rows + 0.4),
        layout="constrained",
    )
    cells = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in cells:
        axes.set_axis_off()
    for axes, image_HW, truths_KHW, predictions_KHW, title in zip(
        cells, images_NHW, truths_NKHW, predictions_NKHW, titles, strict=False
    ):
        outlines = [(mask_HW, TRUTH) for mask_HW in truths_KHW]
        outlines += [(mask_HW, PREDICTION) for mask_HW in predictions_KHW]
        draw_outlined_slice(axes, image_HW, outlines, window_hu, interpolation="auto")
        axes.set_title(title, fontsize=8)
    figure.suptitle(f"{heading}  (green: truth, red: prediction)".strip(), fontsize=9)
    return figure


def choose_slices(masks: Sequence[NDArray[np.bool_]]) -> list[int]:
    """Return indices of slices spread evenly over the slices in which any mask is set.

    A mask that none of these slices shows adds the slice in which it is largest, so that the
    picture of a small finding is not empty.

    Args:
        masks: boolean (K, Z, Y, X), of truth and networks.
    """
    areas_Z = [np.count_nonzero(mask_KZYX, axis=(0, 2, 3)) for mask_KZYX in masks]
    with_organ = np.flatnonzero(np.sum(areas_Z, axis=0))
    low, high = (with_organ[0], with_organ[-1]) if len(with_organ) else (0, len(areas_Z[0]) - 1)
    chosen = np.unique(np.linspace(low, high, NUM_PICTURE_SLICES).round().astype(int))
    unseen = [area_Z for area_Z in areas_Z if area_Z.any() and not area_Z[chosen].any()]
    return sorted({*chosen.tolist(), *(int(area_Z.argmax()) for area_Z in unseen)})
