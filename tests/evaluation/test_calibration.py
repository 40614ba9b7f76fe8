import math

import numpy as np
import pytest

from fullscale.evaluation.calibration import MARGIN_MM, ReliabilityCurve, neighbourhood

SPACING_MM = (5.0, 1.0, 1.0)


def volume(*values):
    """A scan of one row of voxels."""
    return np.array(values, dtype=np.float32).reshape(1, 1, -1)


def mask(*values):
    return np.array(values, dtype=bool).reshape(1, 1, -1)


def test_curve_matches_hand_count():
    curve = ReliabilityCurve()
    curve.add(volume(0.05, 0.15, 0.12, 0.95, 1.0, 0.93), mask(0, 1, 0, 1, 1, 0), SPACING_MM)
    rows = curve.rows()
    assert [row["bin_low"] for row in rows] == [0.0, 0.1, 0.9]
    assert [row["bin_high"] for row in rows] == [0.1, 0.2, 1.0]
    assert [row["num_voxels"] for row in rows] == [1, 2, 3]
    assert [row["mean_probability"] for row in rows] == pytest.approx([0.05, 0.135, 0.96])
    assert [row["fraction_true"] for row in rows] == pytest.approx([0, 1 / 2, 2 / 3])
    expected = (1 * 0.05 + 2 * (0.5 - 0.135) + 3 * (0.96 - 2 / 3)) / 6
    assert curve.expected_error == pytest.approx(expected)


def test_curve_counts_judged_voxels_only():
    whole, part = ReliabilityCurve(), ReliabilityCurve()
    whole.add(volume(0.05, 0.12, 0.95), mask(0, 1, 1), SPACING_MM)
    drawn, judged = mask(0, 0, 1, 0, 1), mask(1, 0, 1, 0, 1)
    part.add(volume(0.05, 0.85, 0.12, 1.0, 0.95), drawn, SPACING_MM, judged)
    assert part.rows() == whole.rows()


def test_error_of_uncertain_voxels_leaves_the_certain_ones_out():
    curve = ReliabilityCurve()
    curve.add(volume(0.05, 0.1, 0.12, 0.85, 0.91, 1.0), mask(1, 1, 0, 1, 0, 1), SPACING_MM)
    assert curve.num_uncertain_voxels == 3
    expected = (abs(0.1 + 0.12 - 1) + (1 - 0.85)) / 3
    assert curve.uncertain_error == pytest.approx(expected)
    assert curve.expected_error == pytest.approx((3 * expected + 0.95 + 0.91) / 6)


def test_curve_of_certain_voxels_has_no_error_of_uncertain_ones():
    curve = ReliabilityCurve()
    curve.add(volume(0.0, 0.95), mask(1, 0), SPACING_MM)
    assert curve.num_uncertain_voxels == 0
    assert math.isnan(curve.uncertain_error)


def test_calibrated_probabilities_have_little_error():
    rng = np.random.default_rng(0)
    probability = rng.random((20, 60, 60)).astype(np.float32)
    curve = ReliabilityCurve()
    curve.add(probability, rng.random(probability.shape) < probability, SPACING_MM)
    assert curve.num_voxels == probability.size
    assert curve.expected_error < 0.01
    for row in curve.rows():
        assert row["fraction_true"] == pytest.approx(row["mean_probability"], abs=0.02)


def test_too_sure_network_has_an_error():
    rng = np.random.default_rng(1)
    probability = rng.choice([0.01, 0.99], size=(20, 60, 60)).astype(np.float32)
    curve = ReliabilityCurve()
    curve.add(probability, rng.random(probability.shape) < 0.2 + 0.6 * probability, SPACING_MM)
    assert curve.expected_error == pytest.approx(0.196, abs=0.01)


def test_scans_one_by_one_are_as_all_at_once():
    rng = np.random.default_rng(2)
    probability, true = rng.random((6, 8, 9)).astype(np.float32), rng.random((6, 8, 9)) < 0.5
    together, apart = ReliabilityCurve(), ReliabilityCurve()
    together.add(probability, true, SPACING_MM)
    for part in (slice(0, 3), slice(3, 6)):
        apart.add(probability[part], true[part], SPACING_MM)
    assert together.num_voxels == apart.num_voxels
    assert together.expected_error == pytest.approx(apart.expected_error)


@pytest.mark.parametrize(("value", "low"), [(0.0, 0.0), (0.1, 0.1), (0.999, 0.9), (1.0, 0.9)])
def test_bin_holds_its_lower_end_and_the_last_both(value, low):
    curve = ReliabilityCurve()
    curve.add(np.full((1, 1, 1), value), mask(1), SPACING_MM)
    assert [row["bin_low"] for row in curve.rows()] == [low]


def test_resampled_probability_a_little_above_one_is_counted():
    curve = ReliabilityCurve()
    curve.add(volume(1 + 1e-6), mask(1), SPACING_MM)
    assert curve.rows()[0]["num_voxels"] == 1


def test_voxels_far_from_the_organ_do_not_count():
    true = np.zeros((30, 50, 60), dtype=bool)
    true[10:12, 20:25, 30:31] = True
    curve = ReliabilityCurve()
    curve.add(np.zeros(true.shape, dtype=np.float32), true, SPACING_MM)
    assert curve.num_voxels == (2 + 2 * 2) * (5 + 2 * 10) * (1 + 2 * 10)


def test_neighbourhood_is_wider_by_the_margin_and_within_the_scan():
    true = np.zeros((30, 50, 60), dtype=bool)
    true[10:12, 3:5, 58:60] = True
    z, y, x = neighbourhood(true, SPACING_MM)
    assert (z.start, z.stop) == (10 - 2, 12 + 2)
    assert (y.start, y.stop) == (0, 5 + MARGIN_MM)
    assert true[z, y, x].shape[2] == 2 + MARGIN_MM


def test_scan_without_the_organ_adds_nothing():
    curve = ReliabilityCurve()
    curve.add(volume(0.9, 0.1), mask(0, 0), SPACING_MM)
    assert curve.num_voxels == 0
    assert curve.rows() == []
    assert math.isnan(curve.expected_error)


def test_curve_refuses_shapes_that_differ():
    with pytest.raises(ValueError, match=r"probabilities \(1, 1, 2\) and truth \(1, 1, 1\)"):
        ReliabilityCurve().add(volume(0.1, 0.2), mask(1), SPACING_MM)
