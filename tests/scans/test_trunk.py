from __future__ import annotations

import numpy as np
import pytest
from test_slicing import as_volume

from fullscale.runtime.errors import ScanError
from fullscale.scans.trunk import find_trunk

SPACING_MM = (8.0, 4.0, 4.0)
Y, X = np.mgrid[:120, :160] * 4.0 + 2  # mm, centres of the voxels
CENTRE_MM = (240.0, 320.0)


def disc(y_mm, x_mm, height_mm, width_mm):
    return ((Y - y_mm) / height_mm) ** 2 + ((X - x_mm) / width_mm) ** 2 <= 0.25


def body(*parts, lungs=False, num_slices=6):
    """A trunk of 220 x 340 mm around CENTRE_MM, with other parts in every slice."""
    plane = np.full(Y.shape, -1000, np.int16)
    for part in (disc(*CENTRE_MM, 220, 340), *parts):
        plane[part] = 40
    if lungs:
        for side in (-70, 70):
            plane[disc(240, 320 + side, 150, 120)] = -850
    return np.repeat(plane[None], num_slices, axis=0)


def arms(gap_mm, thickness_mm=95):
    away_mm = 170 + gap_mm + thickness_mm / 2
    return [disc(230, 320 + side * away_mm, thickness_mm, thickness_mm) for side in (-1, 1)]


SHEETS = [(np.abs(Y - y_mm) < 2) & (np.abs(X - 320) < 220) for y_mm in (354, 386)]
CUSHION = (np.abs(Y - 350) < 12) & (np.abs(X - 320) < 150)


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([], id="alone"),
        pytest.param(arms(20), id="arms beside"),
        pytest.param(arms(-6), id="arms that touch"),
        pytest.param(arms(-6)[:1], id="one arm that touches"),
        pytest.param(SHEETS, id="table"),
        pytest.param([*SHEETS, *arms(-6)], id="table and arms"),
        pytest.param([(X > 480) & (X < 560) & (Y < 100)], id="infusion bottle"),
    ],
)
@pytest.mark.parametrize("lungs", [False, True])
def test_trunk_is_found_whatever_lies_beside_it(parts, lungs):
    trunk = find_trunk(as_volume(body(*parts, lungs=lungs), SPACING_MM))
    assert trunk.centre_mm == pytest.approx(CENTRE_MM, abs=5)
    assert trunk.extent_mm == pytest.approx((220, 340), abs=12)


def test_cushion_that_touches_moves_the_centre_by_less_than_its_thickness():
    trunk = find_trunk(as_volume(body(CUSHION), SPACING_MM))
    assert trunk.centre_mm == pytest.approx(CENTRE_MM, abs=15)


def test_slices_without_the_trunk_do_not_count():
    legs = np.full((14, *Y.shape), -1000, np.int16)
    legs[:, disc(240, 100, 150, 150)] = 40
    trunk = find_trunk(as_volume(np.concatenate([legs, body(num_slices=10)]), SPACING_MM))
    assert trunk.centre_mm == pytest.approx(CENTRE_MM, abs=4)


def test_child_keeps_its_trunk():
    hu = np.full((6, *Y.shape), -1000, np.int16)
    hu[:, disc(200, 300, 110, 150)] = 40
    hu[:, disc(200, 215, 40, 40)] = 40  # an arm
    trunk = find_trunk(as_volume(hu, SPACING_MM))
    assert trunk.centre_mm == pytest.approx((200, 300), abs=5)
    assert trunk.extent_mm == pytest.approx((110, 150), abs=12)


def test_finer_voxels_give_the_same_trunk():
    fine = body(*arms(-6)).repeat(2, axis=1).repeat(2, axis=2).repeat(4, axis=0)
    coarse = find_trunk(as_volume(body(*arms(-6)), SPACING_MM))
    found = find_trunk(as_volume(fine, (2.0, 2.0, 2.0)))
    assert found.centre_mm == pytest.approx(coarse.centre_mm, abs=4)
    assert found.extent_mm == pytest.approx(coarse.extent_mm, abs=4)


@pytest.mark.parametrize("hu", [-1000, -301])
def test_scan_without_a_body_is_refused(hu):
    empty = np.full((10, 20, 20), hu, np.int16)
    with pytest.raises(ScanError, match="no_body: found no part of the scan above -300 HU"):
        find_trunk(as_volume(empty, (5.0, 3.0, 3.0)))


def test_scan_of_a_table_alone_is_refused():
    hu = np.full((6, *Y.shape), -1000, np.int16)
    for sheet in SHEETS:
        hu[:, sheet] = 200
    with pytest.raises(ScanError, match="no_body"):
        find_trunk(as_volume(hu, SPACING_MM))
