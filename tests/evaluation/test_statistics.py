import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from tiny import published

from fullscale.evaluation.statistics import (
    bootstrap_mean,
    highest_rate,
    mean_over_cases,
    pooled_mean,
)
from fullscale.params import RegisterParams

NUM_PATIENTS = 28
NUM_TRIALS = 2000


def make_params(**changes):
    return RegisterParams.model_validate(
        published()["register"] | {"num_bootstrap": 1000} | changes
    )


def interval_of(values, weights=None, **changes):
    values = np.asarray(values, dtype=float)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    return bootstrap_mean(values, weights, make_params(**changes))


# What the interval is centred on, and how it behaves at the edges.


def test_interval_holds_the_mean_and_widens_with_confidence():
    values = np.random.default_rng(0).normal(0.8, 0.05, 20)
    narrow, wide = interval_of(values, confidence=0.8), interval_of(values, confidence=0.99)
    assert narrow.mean == wide.mean == pytest.approx(values.mean())
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


def test_interval_of_normal_scores_is_about_student_t():
    values = np.random.default_rng(1).normal(0, 1, 40)
    found = interval_of(values, num_bootstrap=20000)
    low, high = stats.t.interval(0.95, 39, values.mean(), stats.sem(values))
    assert [found.low, found.high] == pytest.approx([low, high], abs=0.06)


def test_interval_follows_the_skew_of_the_scores():
    values = np.random.default_rng(2).lognormal(0, 1, 28)
    found = interval_of(values)
    assert found.high - found.mean > 1.3 * (found.mean - found.low)


def test_interval_mirrors_with_its_scores():
    values = np.random.default_rng(3).beta(6, 1.2, 12)
    found, mirrored = interval_of(values), interval_of(-values)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))


def test_interval_is_the_same_every_time_and_depends_on_the_seed():
    values = np.random.default_rng(4).random(9)
    assert interval_of(values) == interval_of(values)
    assert interval_of(values) != interval_of(values, seed=1)


def test_nothing_to_average_gives_no_number():
    found = interval_of([])
    assert all(math.isnan(value) for value in (found.mean, found.low, found.high))


def test_one_patient_bounds_nothing():
    found = interval_of([0.9])
    assert (found.low, found.mean, found.high) == (-math.inf, 0.9, math.inf)


def test_two_patients_that_differ_bound_nothing():
    found = interval_of([0.8, 0.9])
    assert (found.low, found.high) == (-math.inf, math.inf)


@pytest.mark.parametrize("value", [0.0, 0.1, 0.9 - 0.8, 1 / 3])
@pytest.mark.parametrize("num_patients", [2, 3, 28])
def test_equal_patients_have_an_interval_without_width(value, num_patients):
    found = interval_of([value] * num_patients)
    assert found.low == found.mean == found.high == pytest.approx(value)


def test_equal_but_for_rounding_is_equal():
    found = interval_of([0.9 - 0.8, 0.8 - 0.7, 0.1, 0.3 - 0.2])
    assert found.high - found.low == 0


def test_mostly_tied_scores_keep_a_finite_end_on_the_safe_side():
    found = interval_of([0.0] * 26 + [0.1, 0.2])
    assert -0.05 < found.low < 0.01
    assert math.isinf(found.high)


def test_weighted_mean_is_the_mean_over_cases():
    found = interval_of([0.9, 0.6, 0.8], weights=[1, 3, 2])
    assert found.mean == pytest.approx((0.9 + 3 * 0.6 + 2 * 0.8) / 6)


def test_scaling_weights_changes_nothing():
    values, weights = np.random.default_rng(5).random((2, 10))
    one, ten = interval_of(values, weights), interval_of(values, 10 * weights)
    assert (one.low, one.high) == pytest.approx((ten.low, ten.high))


def test_mean_over_cases_counts_each_case_and_no_nan():
    scores = pd.Series([0.9, 0.7, math.nan, 0.5])
    patients = pd.Series(["a", "a", "b", "c"])
    assert mean_over_cases(scores, patients, make_params()).mean == pytest.approx(0.7)


def test_mean_over_cases_without_scores_is_no_number():
    found = mean_over_cases(pd.Series([math.nan]), pd.Series(["a"]), make_params())
    assert math.isnan(found.mean)


def test_pooled_mean_weighs_patients_by_what_they_hold():
    parts, wholes = pd.Series([1, 0, 3]), pd.Series([2, 8, 10])
    patients = pd.Series(["a", "b", "c"])
    found = pooled_mean(parts, wholes, patients, make_params())
    assert found.mean == pytest.approx(4 / 20)
    assert found.low < found.mean < found.high


def test_pooled_mean_leaves_out_patients_with_nothing_to_count():
    found = pooled_mean(pd.Series([1, 0]), pd.Series([4, 0]), pd.Series(["a", "b"]), make_params())
    assert (found.low, found.mean, found.high) == (-math.inf, 0.25, math.inf)


def test_cases_of_one_patient_are_not_more_patients():
    """Scores copied within a patient leave the interval as it was."""
    values = np.random.default_rng(6).random(10)
    patients = pd.Series([f"p{number}" for number in range(10)])
    once = mean_over_cases(pd.Series(values), patients, make_params())
    twice = mean_over_cases(
        pd.Series(np.tile(values, 2)), pd.concat([patients] * 2, ignore_index=True), make_params()
    )
    assert (once.low, once.high) == pytest.approx((twice.low, twice.high))


# Exact bounds of rates.


@pytest.mark.parametrize("num_trials", [1, 8, 60, 122])
def test_rate_of_no_event_is_bounded_by_the_probability_of_seeing_none(num_trials):
    assert highest_rate(0, num_trials) == pytest.approx(1 - 0.05 ** (1 / num_trials))


def test_rate_is_bounded_exactly():
    """At the bound, so few events have a probability of 5 %."""
    assert highest_rate(0, 8) == pytest.approx(0.3123, abs=1e-4)
    assert stats.binom.cdf(3, 11, highest_rate(3, 11)) == pytest.approx(0.05)
    assert highest_rate(8, 8) == 1


# How often an interval holds the truth, measured.


def normal_differences(rng, shape):
    return rng.normal(0.02, 0.03, shape), 0.02


def dice_differences(rng, shape):
    """Good network less worse one, both with a tail of bad cases."""
    return rng.beta(20, 2, shape) - rng.beta(6, 1.2, shape), 20 / 22 - 6 / 7.2


def dice_itself(rng, shape):
    return rng.beta(12, 1.5, shape), 12 / 13.5


def mostly_small_gains(rng, shape):
    return rng.beta(0.5, 6, shape), 0.5 / 6.5


def measure_coverage(draw, num_patients, weights=None):
    rng = np.random.default_rng(0)
    trials, truth = draw(rng, (NUM_TRIALS, num_patients))
    weights = np.ones(num_patients) if weights is None else weights
    params, held = make_params(), 0
    for trial, values in enumerate(trials):
        found = bootstrap_mean(values, weights, params.model_copy(update={"seed": trial}))
        held += found.low <= truth <= found.high
    return held / NUM_TRIALS


@pytest.mark.slow
@pytest.mark.parametrize(
    "draw", [normal_differences, dice_differences, dice_itself, mostly_small_gains]
)
def test_interval_holds_the_truth_as_often_as_it_says(draw):
    coverage = measure_coverage(draw, NUM_PATIENTS)
    print(f"{draw.__name__}: {coverage:.4f}")
    assert 0.93 <= coverage <= 0.97


@pytest.mark.slow
def test_interval_holds_the_truth_when_patients_have_several_scans():
    weights = np.repeat([1.0, 2.0, 3.0], [18, 6, 4])
    coverage = measure_coverage(dice_differences, NUM_PATIENTS, weights)
    print(f"one to three scans a patient: {coverage:.4f}")
    assert 0.93 <= coverage <= 0.97
