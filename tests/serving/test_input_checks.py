from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from bodies import lps_affine, make_body

from fullscale.prediction.network_files import TrainedOn, describe_network
from fullscale.scans.geometry import Geometry
from fullscale.scans.volume import Volume
from fullscale.serving.input_checks import TOLERANCE, check_scan

SHAPE, SPACING_MM = (16, 40, 48), (8.0, 7.0, 7.0)
SEEN = TrainedOn(
    slice_spacing_mm=(8.0, 8.0),
    pixel_spacing_mm=(7.0, 7.0),
    height_mm=(128.0, 128.0),
    field_of_view_mm=(280.0, 336.0),
)


def make_scan(values_ZYX=None, spacing_mm=SPACING_MM):
    hu = make_body(SHAPE, SPACING_MM)[0] if values_ZYX is None else values_ZYX
    return Volume(hu, Geometry(hu.shape[::-1], lps_affine(hu.shape, spacing_mm)))


@pytest.fixture(scope="module")
def description(tiny_params):
    return describe_network("unet", tiny_params).model_copy(update={"trained_on": SEEN})


def codes(scan, description):
    return [each.code for each in check_scan(scan, description)]


def test_scan_like_the_training_scans_has_no_warning(description):
    assert check_scan(make_scan(), description) == []


@pytest.mark.parametrize("change", [lambda hu: hu // 2 + 600, lambda hu: hu.clip(-1000, 90)])
def test_values_that_are_not_hu(description, change):
    found = check_scan(make_scan(change(make_body(SHAPE, SPACING_MM)[0])), description)
    assert [each.code for each in found] == ["not_hu"]
    assert "found values from" in str(found[0])


@pytest.mark.parametrize("axes", [(1, 0, 2), (2, 1, 0)])
def test_axis_that_the_header_names_wrongly(tiny_params, axes):
    """A volume stored in another order than its affine states."""
    hu = np.ascontiguousarray(make_body((48, 40, 48), (7.0, 7.0, 7.0))[0].transpose(axes))
    found = check_scan(make_scan(hu, (7.0, 7.0, 7.0)), describe_network("unet", tiny_params))
    assert [each.code for each in found] == ["axis"]
    assert "cuts through" in found[0].found


def test_front_and_back_that_the_header_mixes_up(tiny_params):
    hu = make_body(SHAPE, SPACING_MM)[0][:, ::-1]
    found = check_scan(make_scan(hu), describe_network("unet", tiny_params))
    assert [each.code for each in found] == ["axis"]
    assert "in front of the body's" in found[0].found


def test_few_slices(tiny_params):
    scan = make_scan(make_body(SHAPE, SPACING_MM)[0][:5])
    assert codes(scan, describe_network("unet", tiny_params)) == ["few_slices"]


@pytest.mark.parametrize(
    ("spacing_mm", "expected"),
    [
        ((9.0, 7.0, 7.0), ["slice_spacing", "height"]),
        ((7.0, 7.0, 7.0), ["slice_spacing", "height"]),
        ((8.0, 7.0, 8.0), ["pixel_spacing", "field_of_view"]),
        ((8.0, 6.0, 6.0), ["pixel_spacing", "field_of_view"]),
        ((8.0 * (1 + 0.9 * TOLERANCE), 7.0, 7.0), []),
    ],
)
def test_spacing_and_size_beyond_the_training_cases(description, spacing_mm, expected):
    assert codes(make_scan(spacing_mm=spacing_mm), description) == expected


def test_warning_gives_both_numbers(description):
    (warning, _) = check_scan(make_scan(spacing_mm=(9.0, 7.0, 7.0)), description)
    assert str(warning) == (
        "slice_spacing: found slices every 9 mm; wanted 8 to 8 mm, as in the scans that the "
        "network was trained on"
    )


def test_network_without_training_ranges_is_checked_for_values_and_axes_only(tiny_params):
    scan = make_scan(spacing_mm=(9.0, 3.0, 3.0))
    assert codes(scan, describe_network("unet", tiny_params)) == []


def test_scan_without_a_body_raises_no_error(tiny_params):
    hu = np.full(SHAPE, -1000, dtype=np.int16)
    hu[0, 0, 0] = 500
    assert "not_hu" not in codes(make_scan(hu), describe_network("unet", tiny_params))


def test_check_does_not_change_the_scan(description):
    scan = make_scan()
    before = scan.values_ZYX.copy()
    check_scan(scan, description)
    np.testing.assert_array_equal(scan.values_ZYX, before)
    assert dataclasses.is_dataclass(scan)
