"""Surface Dice by area, against other programs.

Expected numbers are of DeepMind's program surface-distance 0.1, made once outside of the project:
`compute_surface_distances` and `compute_surface_dice_at_tolerance` on the same masks, and its table
of areas for the sums over all 256 codes. MONAI 1.6.1, `compute_surface_dice` with
`use_subvoxels=True`, gave the same values in single precision.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fullscale.evaluation.surface_area import area_surface_dice, element_areas, surface_elements

TOLERANCES_MM = (0.5, 1.05, 3.05)


def ellipsoid(centre, radii):
    grid = np.ogrid[:14, :30, :28]
    return sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii, strict=True)) < 1


def noise():
    random = np.random.default_rng(5)
    return [random.random((9, 11, 10)) < 0.4 for _ in range(2)]


BALL = ellipsoid((6.5, 14, 13), (4.2, 9.3, 8.1))
MOVED = ellipsoid((7.2, 15.5, 12.4), (4.6, 8.7, 9.2))
CUT_OFF = (ellipsoid((0, 3, 25), (6, 7, 9)), ellipsoid((1, 2, 26), (5, 8, 9)))
"""At three sides of the scan."""
PAIRS = {
    "ellipsoids": ((MOVED, BALL), (5.0, 0.8, 0.8)),
    "cubic voxels": ((MOVED, BALL), (1.0, 1.0, 1.0)),
    "cut off": (CUT_OFF, (2.5, 0.7, 1.1)),
    "noise": (noise(), (1.7, 0.9, 1.3)),
}
EXPECTED = {
    "ellipsoids": (0.41852427927387753, 0.7353787481901773, 0.9684401756460659),
    "cubic voxels": (0.44072035560896405, 0.8611125710574143, 1.0),
    "cut off": (0.907292781857011, 0.957585411515658, 1.0),
    "noise": (0.9416222561997043, 0.99276022258989, 1.0),
}
EXPECTED_MM2 = {
    "ellipsoids": (1885.79118764496, 1676.391552900069),
    "cubic voxels": (766.5371512808267, 701.4259108243366),
    "cut off": (579.9800269395212, 552.634152927972),
    "noise": (1543.466038867249, 1493.9942266900077),
}


@pytest.mark.parametrize("name", PAIRS)
def test_surface_dice_is_that_of_surface_distance(name):
    masks, spacing = PAIRS[name]
    assert area_surface_dice(*masks, spacing, TOLERANCES_MM) == pytest.approx(
        EXPECTED[name], rel=1e-12
    )


@pytest.mark.parametrize("name", PAIRS)
def test_areas_are_those_of_surface_distance(name):
    masks, spacing = PAIRS[name]
    found = [surface_elements(mask, spacing)[1].sum() for mask in masks]
    assert found == pytest.approx(EXPECTED_MM2[name], rel=1e-12)


def test_table_of_areas_is_that_of_surface_distance():
    areas, codes = element_areas((2.0, 3.0, 5.0)), np.arange(256)
    assert np.flatnonzero(areas == 0).tolist() == [0, 255]
    sums = [(areas * codes**power).sum() for power in range(3)]
    expected = [2608.212782591453, 332547.12978041027, 55586916.61374395]
    assert sums == pytest.approx(expected, rel=1e-12)


def test_masks_of_the_comparison_meet_every_code():
    codes = set()
    for mask in noise():
        padded = np.pad(mask, 1)
        for corner in itertools.product(*(range(size - 1) for size in padded.shape)):
            voxels = padded[tuple(slice(at, at + 2) for at in corner)].ravel()
            codes.add(int("".join("1" if voxel else "0" for voxel in voxels), 2))
    assert len(codes) > 230


@given(
    seed=st.integers(0, 1000),
    axes=st.permutations(range(3)),
    flips=st.lists(st.sampled_from([1, -1]), min_size=3, max_size=3),
)
@settings(deadline=None, max_examples=30)
def test_turned_and_mirrored_masks_have_the_same_area(seed, axes, flips):
    mask = np.random.default_rng(seed).random((4, 5, 6)) < 0.5
    spacing = (2.0, 0.7, 1.1)
    turned = mask[tuple(slice(None, None, flip) for flip in flips)].transpose(axes)
    area = surface_elements(turned, [spacing[axis] for axis in axes])[1].sum()
    assert area == pytest.approx(surface_elements(mask, spacing)[1].sum())


def test_place_of_an_element_is_between_its_voxels():
    mask = np.zeros((3, 4, 5), dtype=bool)
    mask[1, 2, 3] = True
    places_mm, areas_mm2 = surface_elements(mask, (2.0, 1.0, 10.0))
    assert len(places_mm) == len(areas_mm2) == 8
    assert sorted(set(places_mm[:, 0])) == [1, 3]
    assert sorted(set(places_mm[:, 1])) == [1.5, 2.5]
    assert sorted(set(places_mm[:, 2])) == [25, 35]


def test_empty_mask_has_no_element():
    places_mm, areas_mm2 = surface_elements(np.zeros((2, 3, 4), dtype=bool), (1.0, 1.0, 1.0))
    assert places_mm.shape == (0, 3)
    assert areas_mm2.shape == (0,)


def test_tolerance_may_be_exactly_the_distance_in_single_precision():
    mask = np.zeros((9, 9, 9), dtype=bool)
    mask[2:5, 2:7, 2:7] = True
    step = float(np.float32(1.0 + 1e-6))
    moved = np.roll(mask, 1, axis=0)
    assert area_surface_dice(moved, mask, (step, 1.0, 1.0), (1.0,)) == [1.0]
