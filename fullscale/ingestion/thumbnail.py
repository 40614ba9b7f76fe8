"""A small picture of a case: the slice with most of the labels, and their outlines."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fullscale.scans.volume import Volume

SIZE_PX = 224
WINDOW_HU = (-160.0, 240.0)
COLOURS = np.array(
    [
        (230, 75, 53),
        (77, 187, 213),
        (0, 160, 135),
        (243, 155, 127),
        (132, 145, 180),
        (255, 220, 80),
        (180, 110, 220),
    ],
    dtype=np.uint8,
)


def draw_thumbnail(scan: Volume, labels: Volume) -> bytes:
    """Draw the axial slice with most labelled voxels, or the middle one if there are none.

    Args:
        scan: HU, canonical orientation.
        labels: label ids on the same grid.

    Returns:
        PNG, the longer side `SIZE_PX` pixels, true proportions.
    """
    counts = [int(np.count_nonzero(plane)) for plane in labels.values_ZYX]
    z = int(np.argmax(counts)) if any(counts) else len(counts) // 2
    low, high = WINDOW_HU
    grey = (scan.values_ZYX[z].astype(np.float32).clip(low, high) - low) / (high - low) * 255
    height, width = _size_px(scan)
    picture = Image.fromarray(grey.astype(np.uint8)).resize(
        (width, height), Image.Resampling.BILINEAR
    )
    ids = Image.fromarray(np.ascontiguousarray(labels.values_ZYX[z])).resize(
        (width, height), Image.Resampling.NEAREST
    )
    pixels = np.repeat(np.asarray(picture)[..., None], 3, axis=2)
    outline = _outline(np.asarray(ids))
    drawn = outline > 0
    pixels[drawn] = COLOURS[(outline[drawn] - 1) % len(COLOURS)]
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _size_px(scan: Volume) -> tuple[int, int]:
    extent_mm = np.array(scan.values_ZYX.shape[1:]) * scan.spacing_mm[1:]
    height, width = np.maximum(1, np.rint(extent_mm * SIZE_PX / extent_mm.max())).astype(int)
    return int(height), int(width)


def _outline(ids: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The ids of pixels that have a neighbour of another id."""
    padded = np.pad(ids, 1, mode="edge")
    neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    inner = np.logical_and.reduce([ids == neighbour for neighbour in neighbours])
    return np.where(inner, 0, ids).astype(np.uint8)
