from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from bodies import TRUNK_MM, TRUNK_SHAPE, lps_affine, make_trunk

from fullscale.phantom.contrast import draw_contrast
from fullscale.phantom.scanner import build_body, draw_acquisition, simulate
from fullscale.scans.anatomy import check_axes, read_signs
from fullscale.scans.geometry import Geometry
from fullscale.scans.volume import Volume

NAMED = {"liver": 1, "spleen": 2}
CODES = ("axis", "axis", "liver_on_left")
FLIPS = list(product((False, True), repeat=3))


def as_volume(values_ZYX, spacing_mm=TRUNK_MM):
    values = np.ascontiguousarray(values_ZYX)
    return Volume(values, Geometry(values.shape[::-1], lps_affine(values.shape, spacing_mm)))


def flip(values_ZYX, flips):
    return np.flip(values_ZYX, tuple(axis for axis in range(3) if flips[axis]))


def swapped(hu, labels=None, named=NAMED):
    signs = read_signs(as_volume(hu), None if labels is None else as_volume(labels), named)
    return {sign.axis: not sign.agrees for sign in signs}


@pytest.fixture(scope="module")
def phantom():
    """Return HU, labels and spacing of a coarse phantom."""
    rng = np.random.default_rng(3)
    body = build_body(rng, draw_contrast(rng))
    scan = draw_acquisition(rng, body, coarsen=1.5)
    return *simulate(body, scan, rng), scan.spacing_mm


@pytest.mark.parametrize("flips", FLIPS)
def test_every_mixture_of_swapped_axes_is_told_apart_with_labels(flips):
    hu, labels = make_trunk()
    assert swapped(flip(hu, flips), flip(labels, flips)) == dict(enumerate(flips))


@pytest.mark.parametrize("flips", FLIPS)
def test_every_mixture_of_swapped_axes_is_told_apart_without_labels(phantom, flips):
    hu, _, spacing_mm = phantom
    signs = read_signs(as_volume(flip(hu, flips), spacing_mm))
    assert {sign.axis: not sign.agrees for sign in signs} == dict(enumerate(flips))


@pytest.mark.parametrize("flips", FLIPS)
def test_a_phantom_with_swapped_axes_is_found(phantom, flips):
    hu, labels, spacing_mm = phantom
    scan, label_map = (as_volume(flip(each, flips), spacing_mm) for each in (hu, labels))
    found = list(check_axes(scan, label_map, NAMED))
    assert [code for code, _ in found] == [CODES[axis] for axis in range(3) if flips[axis]]


def test_finding_says_what_was_seen_and_how_far_off():
    hu, labels = make_trunk()
    turned = [np.flip(each) for each in (hu, labels)]
    ends, depth, sides = (seen for _, seen in check_axes(*map(as_volume, turned), NAMED))
    assert ends.startswith("head and feet look swapped: the lungs lie ")
    assert ends.endswith(" mm below the liver and spleen")
    assert depth.startswith("front and back look swapped: the spine lies ")
    assert 50 < int(depth.split()[-8]) < 90
    assert sides.startswith("left and right look swapped: the liver's centre lies ")
    assert sides.endswith(" mm left of the spleen's")


@pytest.mark.parametrize(("organ", "found"), [(1, "liver's"), (2, "spleen's")])
def test_one_labelled_organ_tells_left_from_right(organ, found):
    hu, labels = make_trunk(lungs=False)
    one = np.where(labels == organ, labels, 0)
    assert swapped(hu, one)[2] is False
    ((code, seen),) = check_axes(as_volume(hu[..., ::-1]), as_volume(one[..., ::-1]), NAMED)
    assert code == "liver_on_left"
    assert found in seen
    assert "body's" in seen


def test_spleen_on_the_right_beside_a_liver_on_the_right_is_found():
    hu, labels = make_trunk(lungs=False)
    liver = labels == 1
    x = np.nonzero(liver)[2]
    wrong = np.where(liver & (np.arange(labels.shape[2]) > np.median(x)), 2, np.where(liver, 1, 0))
    ((code, seen),) = check_axes(as_volume(hu), as_volume(wrong.astype(np.uint8)), NAMED)
    assert code == "liver_on_left"
    assert seen.startswith("the spleen's centre lies ")
    assert seen.endswith(" mm right of the body's")


def test_names_of_labels_may_be_in_capitals_and_others_are_ignored():
    hu, labels = make_trunk(lungs=False)
    assert swapped(hu[..., ::-1], labels[..., ::-1], {"Liver": 1, "kidney": 2})[2] is True
    assert 2 not in swapped(hu, labels, {"kidney": 1})


def test_scan_without_lungs_says_nothing_of_head_feet_and_unlabelled_sides():
    hu, _ = make_trunk(lungs=False)
    assert swapped(hu) == {1: False}
    assert swapped(hu[:, ::-1]) == {1: True}


def test_bright_bowel_in_a_scan_without_lungs_is_not_the_spine():
    hu, _ = make_trunk(lungs=False)
    hu[:, 24:36] = np.minimum(hu[:, 24:36], 150)  # bone too soft to see
    hu[:, 11:17, 18:30] = 400
    hu[8:14, 8:10, 20:30] = -1000
    assert swapped(hu) == {}


def test_lungs_in_the_middle_of_a_scan_do_not_tell_head_from_feet():
    hu, _ = make_trunk(lungs=False)
    hu[8:30, 13:28, 11:37] = -850
    assert 0 not in swapped(hu)


def test_bowel_gas_is_not_lung():
    hu, _ = make_trunk()
    hu[28:][hu[28:] < -800] = -1000
    assert 0 not in swapped(hu)


def test_large_spleen_is_not_a_liver_on_the_left(phantom):
    """The heart says that left and right are right."""
    hu, _, spacing_mm = phantom
    lungs = int(np.argmax((hu < -600)[:, 25:35, 15:-15].mean(axis=(1, 2)) > 0.3))
    large = np.concatenate([hu[:lungs, :, ::-1], hu[lungs:]])
    assert 2 in {sign.axis for sign in read_signs(as_volume(hu, spacing_mm))}
    assert 2 not in {sign.axis for sign in read_signs(as_volume(large, spacing_mm))}


def test_clipped_values_keep_their_signs():
    hu, _ = make_trunk()
    for clipped in (hu.clip(-1000, 240), np.where(hu > -1000, hu.clip(-125, 275), hu)):
        assert swapped(np.flip(clipped))[0]
        assert swapped(np.flip(clipped))[1]


def test_air_and_table_around_the_body_change_nothing():
    hu, labels = (np.pad(each, ((4, 9), (20, 3), (2, 17))) for each in make_trunk())
    hu[:4] = hu[44:] = -1024
    hu[:, :20] = hu[:, 60:] = hu[..., :2] = hu[..., 50:] = -1024
    hu[:, 60] = 120
    flips = (True, True, True)
    assert swapped(flip(hu, flips), flip(labels, flips)) == dict(enumerate(flips))
    assert not any(swapped(hu, labels).values())


@pytest.mark.parametrize("axes", [(1, 0, 2), (2, 1, 0), (1, 2, 0)])
def test_body_cut_along_another_axis_is_the_only_sign(phantom, axes):
    hu, _, spacing_mm = phantom
    turned = as_volume(hu.transpose(axes), tuple(spacing_mm[axis] for axis in axes))
    ((code, seen),) = check_axes(turned)
    assert code == "axis"
    assert "cuts through from" in seen


@pytest.mark.parametrize("hu", [-1000, 40])
def test_scan_without_anatomy_has_no_signs(hu):
    assert swapped(np.full(TRUNK_SHAPE, hu, dtype=np.int16)) == {}


def test_reading_signs_changes_nothing():
    hu, labels = make_trunk()
    before = hu.copy(), labels.copy()
    swapped(hu, labels)
    np.testing.assert_array_equal(hu, before[0])
    np.testing.assert_array_equal(labels, before[1])
