"""Masks of label maps, and their connected components. Z Y X voxels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]
Box = tuple[slice, slice, slice]


def label_mask(labels_ZYX: NDArray[np.uint8], label_ids: Sequence[int]) -> Mask:
    """Return the voxels of some ids, at least one; np.isin takes several times as long for few."""
    mask_ZYX = labels_ZYX == label_ids[0]
    for label_id in label_ids[1:]:
        mask_ZYX |= labels_ZYX == label_id
    return np.asarray(mask_ZYX)


def bounding_box(mask_ZYX: Mask) -> Box | None:
    """Return the smallest box that holds a mask, or None for an empty mask."""
    with_mask = [mask_ZYX.any(axis=axes) for axes in ((1, 2), (0, 2), (0, 1))]
    if not with_mask[0].any():
        return None
    z, y, x = (np.flatnonzero(each) for each in with_mask)
    return (
        slice(int(z[0]), int(z[-1]) + 1),
        slice(int(y[0]), int(y[-1]) + 1),
        slice(int(x[0]), int(x[-1]) + 1),
    )


def largest_component(mask_ZYX: Mask) -> Mask:
    """Return a mask's largest connected component in 3D, with 26 neighbours.

    Of two equally large components the first in memory order is kept.

    Args:
        mask_ZYX: boolean.

    Returns:
        Boolean, same shape; empty for an empty mask.
    """
    largest_ZYX = np.zeros_like(mask_ZYX)
    box = bounding_box(mask_ZYX)
    if box is not None:
        part_ZYX = mask_ZYX[box]
        component_ZYX, _ = ndimage.label(part_ZYX, structure=np.ones((3, 3, 3)))
        # Only the mask's voxels, because bincount converts its input to 64-bit integers.
        largest_ZYX[box] = component_ZYX == np.bincount(component_ZYX[part_ZYX]).argmax()
    return largest_ZYX


def keep_largest_components(label_ZYX: NDArray[np.uint8], label_ids: Iterable[int]) -> None:
    """Set the voxels outside of each label's largest component to 0, in place.

    Args:
        label_ZYX: label map.
        label_ids: labels, one of each organ.
    """
    for label_id in label_ids:
        mask_ZYX = label_ZYX == label_id
        label_ZYX[mask_ZYX & ~largest_component(mask_ZYX)] = 0
