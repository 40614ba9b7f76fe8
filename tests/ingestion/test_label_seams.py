from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from fullscale.ingestion.label_seams import count_borders, find_seam


def dilate(mask):
    return ndimage.binary_dilation(mask, np.ones((1, 3, 3), dtype=bool))


def find_seam_plainly(labels):
    """Dilate the masks of every pair of ids, as the rule says."""
    present = [value for value in np.unique(labels).tolist() if value]
    for low, high in combinations(present, 2):
        seam, inside = labels == low, labels == high
        num_seam, num_deep = seam.sum(), (seam & ~dilate(~seam)).sum()
        num_edge, num_touching = (inside & dilate(~inside)).sum(), (seam & dilate(inside)).sum()
        if (
            num_touching > 0.9 * num_seam
            and num_deep < 0.02 * num_seam
            and num_seam > 0.3 * num_edge
        ):
            return low, high
    return None


@st.composite
def label_maps(draw):
    """Boxes of a few ids, with rims of one pixel and single pixels here and there."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 17), st.integers(1, 19)))
    ids = draw(st.lists(st.integers(1, 255), min_size=1, max_size=6, unique=True))
    labels = np.zeros(shape, np.uint8)
    for value in ids:
        corner = [rng.integers(0, n) for n in shape]
        size = [rng.integers(1, n + 1) for n in shape]
        box = np.zeros(shape, bool)
        box[tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))] = True
        if rng.random() < 0.5:
            labels[dilate(box) & ~box] = rng.choice(ids)
        labels[box] = value
    scattered = rng.random(shape) < draw(st.sampled_from([0, 0, 0.05]))
    labels[scattered] = rng.choice([0, *ids], scattered.sum())
    return labels


@given(label_maps())
@settings(max_examples=300, deadline=None)
def test_find_seam_decides_as_the_plain_form(labels):
    assert find_seam(labels) == find_seam_plainly(labels)


@given(label_maps())
@settings(max_examples=50, deadline=None)
def test_count_borders_counts_as_dilation_does(labels):
    num_edge, num_touching = count_borders(labels)
    for value in np.unique(labels):
        mask = labels == value
        assert num_edge[value] == (mask & dilate(~mask)).sum()
        for other in set(np.unique(labels).tolist()) - {int(value)}:
            assert num_touching[value, other] == (mask & dilate(labels == other)).sum()


@pytest.mark.parametrize(("rim", "found"), [(1, (1, 2)), (3, None)])
def test_find_seam_wants_a_lower_id_around_a_higher_one(rim, found):
    labels = np.zeros((2, 16, 16), np.uint8)
    labels[:, 4:12, 4:12] = rim
    labels[:, 5:11, 5:11] = 2
    assert find_seam(labels) == found


def test_find_seam_of_nothing_is_none():
    assert find_seam(np.zeros((0, 5, 6), np.uint8)) is None
    assert find_seam(np.zeros((1, 5, 6), np.uint8)) is None
