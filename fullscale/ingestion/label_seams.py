"""Find label ids that interpolation made: seams between a higher id and the background."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NUM_IDS = 256


def find_seam(labels_ZYX: NDArray[np.uint8]) -> tuple[int, int] | None:
    """Find an id that is only a seam between a higher id and 0.

    Linear interpolation between id 2 and background 0 yields a rim of id 1. Such a seam is one
    pixel wide, touches the higher id nearly everywhere, and is long compared with that id's edge.

    Args:
        labels_ZYX: label ids, a few axial slices; neighbours are the 8 in the slice.

    Returns:
        The seam's id and the higher id, the lowest such pair; None without a seam.
    """
    num_voxels = np.bincount(labels_ZYX.ravel(), minlength=NUM_IDS)
    num_edge, num_touching = count_borders(labels_ZYX)
    num_deep = num_voxels - num_edge
    is_thin = num_deep < 0.02 * num_voxels
    is_seam = (
        is_thin[:, None]
        & (num_touching > 0.9 * num_voxels[:, None])
        & (num_voxels[:, None] > 0.3 * num_edge[None, :])
    )
    is_seam[0] = False
    found = np.argwhere(np.triu(is_seam, k=1))
    return (int(found[0][0]), int(found[0][1])) if len(found) else None


def count_borders(
    labels_ZYX: NDArray[np.uint8],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count the voxels of each id that have neighbours of other ids, in one pass for all ids.

    Returns:
        By id, the number of voxels with a neighbour of another id; and by id and other id, the
        number of voxels with a neighbour of that other id.
    """
    neighbours = _neighbours(labels_ZYX)
    is_border = np.zeros(labels_ZYX.shape, dtype=bool)
    for neighbour in neighbours:
        is_border |= neighbour != labels_ZYX
    own = labels_ZYX[is_border].astype(np.int64)
    others = [neighbour[is_border] for neighbour in neighbours]
    num_touching = np.zeros(NUM_IDS * NUM_IDS, dtype=np.int64)
    for index, other in enumerate(others):
        is_new = other != own
        for earlier in others[:index]:
            is_new &= other != earlier
        num_touching += np.bincount(
            own[is_new] * NUM_IDS + other[is_new], minlength=NUM_IDS * NUM_IDS
        )
    num_edge = np.bincount(own, minlength=NUM_IDS)
    return num_edge, num_touching.reshape(NUM_IDS, NUM_IDS)


def _neighbours(labels_ZYX: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Return the ids of the 8 neighbours in the slice; beyond the border the voxel's own id."""
    _, height, width = labels_ZYX.shape
    shifted = []
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            if dy or dx:
                ids = labels_ZYX.copy()
                to = (
                    slice(max(0, -dy), height - max(0, dy)),
                    slice(max(0, -dx), width - max(0, dx)),
                )
                here = (
                    slice(max(0, dy), height + min(0, dy)),
                    slice(max(0, dx), width + min(0, dx)),
                )
                ids[:, *to] = labels_ZYX[:, *here]
                shifted.append(ids)
    return shifted
