from __future__ import annotations

import json

import numpy as np
import pytest
from bodies import ORGANS, lps_affine, make_body, save_nifti, turn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_volume import ALL_CODES

from fullscale.scans.cohort import IGNORED_ID
from fullscale.scans.geometry import Geometry
from fullscale.scans.slicing import AIR_HU, Grid, plan_grid, restore, slice_image, slice_labels
from fullscale.scans.volume import Volume, read_image, read_labels

WINDOW_HU = (-160.0, 240.0)


def as_volume(values_ZYX, spacing_mm):
    own, affine = turn(values_ZYX, lps_affine(values_ZYX.shape, spacing_mm), "LPS")
    return Volume(values_ZYX, Geometry(own.shape, affine))


def dice(first, second):
    return 2 * np.count_nonzero(first & second) / (first.sum() + second.sum())


def whole_image_grid(num, size_px, spacing_mm=1.0, num_z=3):
    pixel_mm = num * spacing_mm / size_px
    spacings_mm = (5.0, spacing_mm, spacing_mm)
    return Grid((num_z, num, num), spacings_mm, 0, 0, pixel_mm, size_px, (1.0, 1.0))


def test_grid_round_trips_through_json():
    hu, _ = make_body()
    grid = plan_grid(as_volume(hu, (8.0, 7.0, 7.0)), 33, 11.5)
    assert Grid.from_json(json.loads(json.dumps(grid.to_json()))) == grid


def test_plan_grid_centres_the_canvas_on_the_trunk():
    hu = np.full((10, 100, 100), -1000, np.int16)
    hu[:, 20:60, 30:80] = 40
    hu[:, 75:77, 5:95] = 200
    grid = plan_grid(as_volume(hu, (5.0, 3.0, 3.0)), 64, 4.0)
    assert (grid.pixel_mm, grid.side_mm) == (4.0, 256.0)
    assert grid.left_mm + grid.side_mm / 2 == pytest.approx(55 * 3, abs=1.5)
    assert grid.top_mm + grid.side_mm / 2 == pytest.approx(40 * 3, abs=1.5)
    assert grid.trunk_mm == pytest.approx((40 * 3, 50 * 3), abs=3)


def test_plan_grid_may_reach_beyond_the_image():
    hu = np.full((10, 60, 40), 40, np.int16)
    grid = plan_grid(as_volume(hu, (5.0, 3.0, 3.0)), 64, 4.0)
    assert grid.top_mm == pytest.approx(90 - 128)
    assert grid.left_mm == pytest.approx(60 - 128)
    image = slice_image(as_volume(hu, (5.0, 3.0, 3.0)), grid, WINDOW_HU)
    assert (image[:, :, 0] == WINDOW_HU[0]).all()
    assert (image[:, 32, 32] == 40).all()


def test_slice_image_of_equal_grids_changes_nothing_but_the_window():
    values = np.arange(3 * 33 * 33, dtype=np.int16).reshape(3, 33, 33) - 1000
    image = slice_image(as_volume(values, (5.0, 1.0, 1.0)), whole_image_grid(33, 33), (-500, 900))
    np.testing.assert_array_equal(image, values.clip(-500, 900))
    assert image.dtype == np.int16


def test_slice_image_to_half_size_is_the_hand_computed_average():
    row = np.array([0, 0, 80, 0, 0, 0, 0, 0], np.int16)
    values = np.tile(row, (3, 8, 1))
    image = slice_image(as_volume(values, (5.0, 1.0, 1.0)), whole_image_grid(8, 4), (-1000, 1000))
    # Triangle of radius 2 at half pixels: weights 1/8 3/8 3/8 1/8. Pixel 0 takes columns -1 to 2,
    # the first of which is air: (-1000 + 80) / 8. Pixel 1 takes columns 1 to 4.
    np.testing.assert_array_equal(image[1:2, 1, :3], [[-115, 30, 0]])


def test_slice_image_shrinks_without_aliasing():
    stripes = np.where(np.arange(96) % 2, 200, -200).astype(np.int16)
    values = np.tile(stripes, (3, 96, 1))
    image = slice_image(as_volume(values, (5.0, 1.0, 1.0)), whole_image_grid(96, 32), (-999, 999))
    assert np.abs(image[:, 4:-4, 4:-4]).max() <= 200 / 9 + 1


def test_slice_image_keeps_every_slice_where_it_is():
    values = np.zeros((5, 40, 40), np.int16)
    values[3] = 77
    grid = whole_image_grid(40, 35, num_z=5)
    image = slice_image(as_volume(values, (5.0, 1.0, 1.0)), grid, (0, 100))
    assert [int(plane[17, 17]) for plane in image] == [0, 0, 0, 77, 0]


def test_slice_image_of_another_scan_is_refused():
    values = np.zeros((4, 40, 40), np.int16)
    with pytest.raises(ValueError, match=r"\(4, 40, 40\); the grid was planned on \(3, 40, 40\)"):
        slice_image(as_volume(values, (5.0, 1.0, 1.0)), whole_image_grid(40, 35), WINDOW_HU)


def test_slice_labels_numbers_organs_in_order_and_merges_parts():
    labels = np.zeros((3, 20, 20), np.uint8)
    labels[1, 2:8, 2:8], labels[1, 4:6, 4:6], labels[1, 12:18, 12:18] = 5, 2, 9
    labels[1, 12:18, 2:8] = 3
    organs = {"spleen": (9,), "liver": (5, 2)}
    sliced, num_lost = slice_labels(labels, whole_image_grid(20, 20), organs)
    expected = np.zeros((20, 20), np.uint8)
    expected[2:8, 2:8], expected[12:18, 12:18] = 2, 1
    np.testing.assert_array_equal(sliced[1], expected)
    assert sliced.dtype == np.uint8
    assert not sliced[[0, 2]].any()
    assert num_lost == {"spleen": 0, "liver": 0}


def test_slice_labels_counts_the_voxels_of_each_organ_outside_the_canvas():
    labels = np.zeros((3, 20, 20), np.uint8)
    labels[0, 0:10, 4:6] = 1
    labels[0, 0, 0] = 7
    labels[1, 19, 10:13] = 2
    grid = Grid((3, 20, 20), (5.0, 1.0, 1.0), 4.0, 4.0, 1.0, 12, (9.0, 9.0))
    _, num_lost = slice_labels(labels, grid, {"liver": (1,), "spleen": (2,), "kidney": (3,)})
    assert num_lost == {"liver": 4 * 2, "spleen": 3, "kidney": 0}


def test_slice_labels_with_one_id_for_two_organs_is_refused():
    labels = np.zeros((3, 20, 20), np.uint8)
    with pytest.raises(ValueError, match="label id 1 is given to two organs"):
        slice_labels(labels, whole_image_grid(20, 20), {"liver": (1,), "spleen": (2, 1)})


def test_slice_labels_gives_a_pixel_to_who_covers_most_of_it():
    labels = np.ones((3, 40, 40), np.uint8)
    labels[:, :, 21:] = 2
    sliced, _ = slice_labels(labels, whole_image_grid(40, 20), ORGANS)
    np.testing.assert_array_equal(sliced[0, 10, :10], 1)
    np.testing.assert_array_equal(sliced[0, 10, 11:], 2)


def test_slice_labels_marks_pixels_that_were_mostly_not_judged():
    labels = np.ones((3, 40, 40), np.uint8)
    labels[:, :, 21:] = IGNORED_ID
    labels[:, :, 30:] = 7  # no organ
    sliced, num_lost = slice_labels(labels, whole_image_grid(40, 20), ORGANS)
    row = sliced[0, 10]
    assert (row[:10] == 1).all()
    assert (row[11:14] == IGNORED_ID).all()
    assert not row[16:].any()
    assert num_lost == {"liver": 0, "spleen": 0}


def test_slice_labels_of_an_organ_with_the_id_of_ignored_voxels_is_refused():
    labels = np.zeros((3, 20, 20), np.uint8)
    with pytest.raises(ValueError, match="liver: label id 255; expected 1 to 254"):
        slice_labels(labels, whole_image_grid(20, 20), {"liver": (255,)})


def test_restore_is_the_hand_computed_average_and_zero_outside():
    grid = Grid((1, 8, 16), (5.0, 1.0, 1.0), 0.0, 4.0, 2.0, 4, (1.0, 1.0))
    ramp = np.tile(np.array([1.0, 2, 3, 4], np.float32), (1, 4, 1))
    restored = restore(ramp, grid)
    # Pixel centres lie 2 mm apart at 5, 7, 9, 11 mm. Voxel 5 is at 5.5 mm: weights 0.75 and 0.25
    # of pixels 1 and 2.
    expected = [1.25, 1.75, 2.25, 2.75, 3.25, 3.75]
    np.testing.assert_allclose(restored[0, 4, 5:11], expected, rtol=1e-6)
    assert (restored[0, :, :3] == 0).all()
    assert (restored[0, :, 13:] == 0).all()
    assert restored.dtype == np.float32


def test_restore_takes_organs_together_or_alone():
    grid = whole_image_grid(21, 16)
    stack = np.random.default_rng(0).random((2, 3, 16, 16)).astype(np.float16)
    together = restore(stack, grid)
    assert together.shape == (2, 3, 21, 21)
    np.testing.assert_array_equal(together[1], restore(stack[1], grid))


def test_restore_of_ones_covers_the_canvas_with_ones():
    restored = restore(np.ones((3, 16, 16)), whole_image_grid(37, 16))
    np.testing.assert_allclose(restored[:, 2:-2, 2:-2], 1, rtol=1e-5)


def test_restore_of_the_wrong_size_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 15, 16\); expected \(3, 16, 16\)"):
        restore(np.ones((3, 15, 16)), whole_image_grid(37, 16))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    num=st.integers(5, 90),
    size_px=st.integers(3, 70),
    start=st.floats(-20, 20),
    pixel_mm=st.floats(0.5, 6),
    step=st.floats(0.3, 4),
)
def test_slices_never_leave_the_range_of_the_scan(num, size_px, start, pixel_mm, step):
    rng = np.random.default_rng(num)
    values = rng.integers(-1000, 500, (2, num, num), dtype=np.int16)
    grid = Grid((2, num, num), (5.0, step, step), start, start, pixel_mm, size_px, (1.0, 1.0))
    image = slice_image(as_volume(values, (5.0, step, step)), grid, (-2000, 2000))
    assert image.min() >= AIR_HU
    assert image.max() <= values.max()
    back = restore((image > 0).astype(np.float32), grid)
    assert back.min() >= 0
    assert back.max() <= 1 + 1e-5


def round_trip(tmp_path, codes, spacing_mm, size_px=320, pixel_mm=1.2):
    """Return the Dice of each organ on the file's voxels after slicing and restoring its label."""
    num_y, num_x = (round(360 / step) for step in spacing_mm[1:])
    hu, labels_ZYX = make_body((3, num_y, num_x), spacing_mm)
    scan = read_image(save_nifti(tmp_path / "ct.nii", hu, spacing_mm, codes))
    labels = read_labels(save_nifti(tmp_path / "label.nii", labels_ZYX, spacing_mm, codes))
    grid = plan_grid(scan, size_px, pixel_mm)
    sliced, num_lost = slice_labels(labels.values_ZYX, grid, ORGANS)
    assert not any(num_lost.values())
    own = labels.to_own_grid(labels.values_ZYX)
    scores = []
    for index in (1, 2):
        back = restore((sliced == index).astype(np.float32), grid) >= 0.5
        scores.append(dice(labels.to_own_grid(back), own == index))
    return scores


@pytest.mark.parametrize("codes", ALL_CODES)
def test_label_round_trip_keeps_dice_in_every_orientation(tmp_path, codes):
    assert min(round_trip(tmp_path, codes, (5.0, 0.9, 0.75))) >= 0.99


@settings(max_examples=12, deadline=None)
@given(
    codes=st.sampled_from(ALL_CODES),
    dz=st.floats(0.5, 8),
    dy=st.floats(0.55, 1.4),
    dx=st.floats(0.55, 1.4),
)
def test_label_round_trip_keeps_dice_for_any_spacing(tmp_path_factory, codes, dz, dy, dx):
    assert min(round_trip(tmp_path_factory.mktemp("trip"), codes, (dz, dy, dx))) >= 0.99
