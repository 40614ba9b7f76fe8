from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from bodies import lps_affine, make_body

from fullscale.prediction.network_files import TrainedOn, describe_network
from fullscale.scans.checks import CHECKS
from fullscale.scans.geometry import Geometry
from fullscale.scans.trunk import find_trunk
from fullscale.scans.volume import Volume
from fullscale.serving.input_checks import MAX_COARSENESS, TOLERANCE, check_scan

SHAPE, SPACING_MM = (16, 40, 48), (8.0, 7.0, 7.0)


def make_scan(values_ZYX=None, spacing_mm=SPACING_MM):
    hu = make_body(SHAPE, SPACING_MM)[0] if values_ZYX is None else values_ZYX
    return Volume(hu, Geometry(hu.shape[::-1], lps_affine(hu.shape, spacing_mm)))


@pytest.fixture(scope="module")
def description(tiny_params):
    depth_mm, width_mm = find_trunk(make_scan()).extent_mm
    seen = TrainedOn(
        slice_spacing_mm=(8.0, 8.0),
        pixel_spacing_mm=(7.0, 7.0),
        height_mm=(128.0, 128.0),
        trunk_depth_mm=(depth_mm, depth_mm),
        trunk_width_mm=(width_mm, width_mm),
    )
    network = describe_network("unet", tiny_params)
    wide = network.slice.model_copy(update={"pixel_mm": 12.0, "neighbour_mm": 8.0})
    return network.model_copy(update={"trained_on": seen, "slice": wide})


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
    hu = make_body(SHAPE, SPACING_MM)[0]
    hu[4:8, 10:13, 20:30] = -1000  # bowel gas
    assert check_scan(make_scan(hu), describe_network("unet", tiny_params)) == []
    hu = hu[:, ::-1]
    found = check_scan(make_scan(hu), describe_network("unet", tiny_params))
    assert [each.code for each in found] == ["axis"]
    assert "in front of the body's" in found[0].found
    assert found[0].wanted == CHECKS["axis"].wanted


def test_few_slices(tiny_params):
    scan = make_scan(make_body(SHAPE, SPACING_MM)[0][:5])
    assert codes(scan, describe_network("unet", tiny_params)) == ["few_slices"]


@pytest.mark.parametrize(
    ("spacing_mm", "expected"),
    [
        ((8.0 * MAX_COARSENESS + 0.1, 7.0, 7.0), ["slice_spacing"]),
        ((8.0 * MAX_COARSENESS, 7.0, 7.0), []),
        ((1.0, 7.0, 7.0), []),
        ((8.0, 7.0, 7.0 * (1 + 1.5 * TOLERANCE)), ["trunk_size"]),
        ((8.0, 7.0 * (1 - 1.5 * TOLERANCE), 7.0), ["trunk_size"]),
        ((8.0, 7.0 * (1 + 0.5 * TOLERANCE), 7.0 * (1 - 0.5 * TOLERANCE)), []),
    ],
)
def test_only_coarse_slices_and_a_trunk_of_another_size_are_unlike(
    description, spacing_mm, expected
):
    assert codes(make_scan(spacing_mm=spacing_mm), description) == expected


def test_field_of_view_and_height_are_never_unlike(description):
    hu = np.pad(make_scan().values_ZYX, ((0, 0), (20, 20), (30, 30)), constant_values=-1000)
    taller = np.repeat(hu, 2, axis=0)
    taller[1::2] += 1  # equal slices would be copies
    assert codes(make_scan(taller), description) == []


@pytest.mark.parametrize(("change", "expected"), [(0.9, ["pixel_spacing"]), (1.0, [])])
def test_voxels_coarser_than_the_pixels(tiny_params, change, expected):
    network = describe_network("unet", tiny_params)
    pixels = {"pixel_mm": change * 7.0 / MAX_COARSENESS, "size_px": 96}
    coarse = network.model_copy(update={"slice": network.slice.model_copy(update=pixels)})
    assert codes(make_scan(), coarse) == expected


def test_trunk_larger_than_the_canvas(tiny_params):
    network = describe_network("unet", tiny_params)
    small = network.slice.model_copy(update={"size_px": 32, "pixel_mm": 6.0})
    (found,) = check_scan(make_scan(), network.model_copy(update={"slice": small}))
    assert found.code == "trunk_too_large"
    assert "at most 192 mm" in found.wanted


def test_warning_gives_both_numbers(description):
    (warning,) = check_scan(make_scan(spacing_mm=(14.0, 7.0, 7.0)), description)
    assert str(warning) == "slice_spacing: found slices every 14 mm; wanted at most 12 mm"


def test_network_without_training_ranges_is_not_compared_with_trunks(tiny_params):
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


def test_doubts_of_the_header_are_warnings(description):
    scan = dataclasses.replace(make_scan(), doubts=(("orientation_missing", "sform_code 0"),))
    assert codes(scan, description) == ["orientation_missing"]


def test_slices_that_are_copies(description):
    scan = make_scan(np.repeat(make_scan().values_ZYX[:8], 2, axis=0))
    assert codes(scan, description) == ["slices_repeated"]
