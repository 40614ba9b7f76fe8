"""Pictures of slices with the outlines of truth and prediction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

NUM_PICTURE_SLICES = 6
TRUTH_COLOUR, PREDICTION_COLOUR = "#22d3a6", "#ff5a5f"


def draw_slices(
    images_NHW: np.ndarray,
    truths_NKHW: np.ndarray,
    predictions_NKHW: np.ndarray,
    window_hu: tuple[float, float],
    titles: Sequence[str],
    heading: str = "",
) -> Figure:
    """Slices side by side, truth outlined in green and prediction in red.

    Args:
        images_NHW: HU, in radiological view (patient's right on the left).
        truths_NKHW: boolean masks, one per organ.
        predictions_NKHW: boolean masks of the same shape.
        window_hu: grey-scale window.
        titles: one per slice.
        heading: written over the whole picture.
    """
    columns = min(len(images_NHW), 6)
    rows = -(-len(images_NHW) // columns)
    height, width = images_NHW.shape[1:]
    cell_in = 2.6
    figure = Figure(
        figsize=(cell_in * columns, (cell_in * height / width + 0.3) * rows + 0.4),
        layout="constrained",
    )
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, image, truths, predictions, title in zip(
        axes, images_NHW, truths_NKHW, predictions_NKHW, titles, strict=False
    ):
        axis.imshow(image, cmap="gray", vmin=window_hu[0], vmax=window_hu[1])
        for masks, colour in ((truths, TRUTH_COLOUR), (predictions, PREDICTION_COLOUR)):
            for mask in masks:
                if mask.any():
                    axis.contour(mask, levels=[0.5], colors=[colour], linewidths=1.0)
        axis.set_title(title, fontsize=8)
    figure.suptitle(f"{heading}  (green: truth, red: prediction)".strip(), fontsize=9)
    return figure


def choose_slices(masks: Sequence[NDArray[np.bool_]]) -> list[int]:
    """Indices of slices spread evenly over those in which anything is outlined.

    A mask that none of these shows adds the slice in which it is largest, so that what was found
    is not drawn as nothing.

    Args:
        masks: boolean (K, Z, Y, X), of truth and networks.
    """
    areas_Z = [np.count_nonzero(mask_KZYX, axis=(0, 2, 3)) for mask_KZYX in masks]
    with_organ = np.flatnonzero(np.sum(areas_Z, axis=0))
    low, high = (with_organ[0], with_organ[-1]) if len(with_organ) else (0, len(areas_Z[0]) - 1)
    chosen = np.unique(np.linspace(low, high, NUM_PICTURE_SLICES).round().astype(int))
    unseen = [area_Z for area_Z in areas_Z if area_Z.any() and not area_Z[chosen].any()]
    return sorted({*chosen.tolist(), *(int(area_Z.argmax()) for area_Z in unseen)})
