import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from tiny import published

from fullscale.evaluation.statistics import (
    bootstrap_mean,
    compare_networks,
    holm,
    mean_over_cases,
    pair_scores,
    paired_gain,
    pooled_mean,
    wilcoxon_p,
)
from fullscale.params import RegisterParams

NUM_PATIENTS = 28
NUM_TRIALS = 2000


def make_params(**changes):
    return RegisterParams.model_validate(
        published()["register"] | {"num_bootstrap": 1000} | changes
    )


def make_scores(dice, patients=None, organ="liver"):
    numbers = range(len(dice))
    return pd.DataFrame(
        {
            "case": [f"c{number}" for number in numbers],
            "patient": patients or [f"p{number}" for number in numbers],
            "organ": organ,
            "dice": dice,
        }
    )


def interval_of(values, weights=None, limits=(-math.inf, math.inf), **changes):
    values = np.asarray(values, dtype=float)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    return bootstrap_mean(values, weights, make_params(**changes), limits)


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
    found = interval_of([0.9], limits=(0, 1))
    assert (found.low, found.mean, found.high) == (0, 0.9, 1)


def test_two_patients_that_differ_bound_nothing():
    found = interval_of([0.8, 0.9], limits=(0, 1))
    assert (found.low, found.high) == (0, 1)
    assert math.isinf(interval_of([0.8, 0.9]).high)


@pytest.mark.parametrize("value", [0.0, 0.1, 0.9 - 0.8, 1 / 3])
@pytest.mark.parametrize("num_patients", [2, 3, 28])
def test_equal_patients_have_an_interval_without_width(value, num_patients):
    found = interval_of([value] * num_patients)
    assert found.low == found.mean == found.high == pytest.approx(value)


def test_equal_but_for_rounding_is_equal():
    found = interval_of([0.9 - 0.8, 0.8 - 0.7, 0.1, 0.3 - 0.2])
    assert found.high - found.low == 0


def test_mostly_tied_scores_keep_a_finite_end_on_the_safe_side():
    found = interval_of([0.0] * 26 + [0.1, 0.2], limits=(-1, 1))
    assert -0.05 < found.low < 0.01
    assert found.high == 1


def test_interval_ends_at_the_limits_of_the_score():
    values = [0.99, 1.0, 0.98, 1.0, 0.7, 1.0]
    assert interval_of(values).high > 1
    assert interval_of(values, limits=(0, 1)).high == 1


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


# Paired differences.


def test_gain_leaves_out_pairs_without_a_dice():
    gain = paired_gain(
        make_scores([0.9, math.nan, 0.8]), make_scores([0.8, 0.9, math.nan]), make_params()
    )
    assert (gain.num_pairs, gain.num_patients) == (1, 1)
    assert gain.mean == pytest.approx(0.1)


def test_gain_of_one_patient_is_anywhere():
    patients = ["p", "p"]
    gain = paired_gain(
        make_scores([0.9, 0.7], patients), make_scores([0.8, 0.5], patients), make_params()
    )
    assert (gain.num_patients, gain.num_pairs) == (1, 2)
    assert gain.mean == pytest.approx(0.15)
    assert (gain.low, gain.high, gain.p_value) == (-1, 1, 1)


def test_gain_counts_patient_with_two_scans_once():
    patients = ["p0", "p0", "p1"]
    gain = paired_gain(
        make_scores([0.9, 0.9, 0.5], patients),
        make_scores([0.7, 0.7, 0.5], patients),
        make_params(),
    )
    assert gain.mean == pytest.approx(0.1)


def test_gain_of_identical_predictions_is_nothing():
    scores = make_scores([0.8, 0.9, 0.7, 0.6])
    gain = paired_gain(scores, scores, make_params())
    assert (gain.low, gain.mean, gain.high, gain.p_value) == (0, 0, 0, 1)


def test_gain_without_pairs_is_no_number():
    nothing = make_scores([math.nan] * 3)
    gain = paired_gain(nothing, nothing, make_params())
    assert gain.num_pairs == gain.num_patients == 0
    assert all(math.isnan(each) for each in (gain.mean, gain.low, gain.high, gain.p_value))


def test_gain_does_not_depend_on_the_order_of_rows():
    rng = np.random.default_rng(0)
    first, second = make_scores(rng.random(20)), make_scores(rng.random(20))
    shuffled = second.sample(frac=1, random_state=0)
    assert paired_gain(first, second, make_params()) == paired_gain(first, shuffled, make_params())


def test_gain_changes_its_sign_with_the_order_of_networks():
    rng = np.random.default_rng(1)
    first, second = make_scores(rng.random(20)), make_scores(rng.random(20))
    there, back = (paired_gain(*pair, make_params()) for pair in ((first, second), (second, first)))
    assert (there.mean, there.low, there.high) == pytest.approx((-back.mean, -back.high, -back.low))
    assert there.p_value == pytest.approx(back.p_value)


def test_pairs_are_those_of_case_and_organ():
    first = pd.concat([make_scores([0.9, 0.8]), make_scores([0.7, 0.6], organ="spleen")])
    second = make_scores([0.1, 0.2], organ="spleen")
    pairs = pair_scores(first, second)
    assert pairs["organ"].tolist() == ["spleen", "spleen"]
    assert (pairs["dice"] - pairs["dice_other"]).tolist() == pytest.approx([0.6, 0.4])


def test_case_scored_twice_is_refused():
    twice = pd.concat([make_scores([0.9])] * 2)
    with pytest.raises(pd.errors.MergeError, match="not a one-to-one merge"):
        pair_scores(twice, make_scores([0.8]))


# Tests of significance.


def exact_wilcoxon(differences):
    """Two-sided p by going through all signs, for values without ties."""
    ranks = stats.rankdata(np.abs(differences))
    observed = ranks[np.asarray(differences) > 0].sum()
    sums = np.array(
        [np.dot(ranks, signs) for signs in itertools.product([0, 1], repeat=len(ranks))]
    )
    tail = min((sums <= observed).mean(), (sums >= observed).mean())
    return min(1.0, 2 * tail)


@pytest.mark.parametrize("seed", range(10))
def test_wilcoxon_equals_all_signs_tried(seed):
    differences = np.random.default_rng(seed).normal(0.3, 1, 9)
    assert wilcoxon_p(differences) == pytest.approx(exact_wilcoxon(differences))


@pytest.mark.parametrize(("num", "expected"), [(1, 1.0), (2, 0.5), (5, 2 / 32), (8, 2 / 256)])
def test_wilcoxon_of_a_network_that_always_wins(num, expected):
    assert wilcoxon_p(np.arange(1, num + 1) / 10) == pytest.approx(expected)


def test_wilcoxon_with_ties_and_zeros():
    """Equal differences share a rank, though rounding makes them differ; zeros are left out."""
    rounded = np.array([0.9 - 0.8, 0.8 - 0.7, 0.0, -(0.3 - 0.2)])
    assert rounded[0] != rounded[1]
    assert wilcoxon_p(rounded) == pytest.approx(exact_wilcoxon([0.1, 0.1, -0.1]))


def test_wilcoxon_without_differences():
    assert wilcoxon_p(np.zeros(7)) == 1
    assert math.isnan(wilcoxon_p(np.array([])))


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [
        ([], []),
        ([0.03], [0.03]),
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.04, 0.001, 0.2, 0.03], [0.09, 0.004, 0.2, 0.09]),
        ([0.5, 0.6], [1.0, 1.0]),
        ([0.02, 0.02], [0.04, 0.04]),
    ],
)
def test_holm_matches_hand_computed_value(p_values, expected):
    assert holm(p_values) == pytest.approx(expected)


def test_holm_does_not_count_what_was_not_tested():
    found = holm([0.01, math.nan, 0.03])
    assert [found[0], found[2]] == pytest.approx([0.02, 0.03])
    assert math.isnan(found[1])


def test_comparison_holds_every_pair_of_networks_and_organ():
    rng = np.random.default_rng(0)
    tables = {
        name: pd.concat([make_scores(rng.random(8)), make_scores(rng.random(8), organ="spleen")])
        for name in ("a", "b", "c")
    }
    found = compare_networks(tables, make_params())
    assert [(each.first, each.second, each.organ) for each in found] == [
        (first, second, organ)
        for first, second in (("a", "b"), ("a", "c"), ("b", "c"))
        for organ in ("all", "liver", "spleen")
    ]
    corrected = holm([each.gain.p_value for each in found])
    assert [each.p_holm for each in found] == pytest.approx(corrected)
    assert found[0].gain == paired_gain(tables["a"], tables["b"], make_params())
    assert found[0].gain.mean == pytest.approx((found[1].gain.mean + found[2].gain.mean) / 2)
    assert [each.gain.num_pairs for each in found[:3]] == [16, 8, 8]


def test_comparison_leaves_out_an_organ_that_one_network_lacks():
    tables = {"a": make_scores([0.9, 0.8]), "b": make_scores([0.7, 0.6], organ="spleen")}
    found = compare_networks(tables, make_params())
    assert [each.organ for each in found] == ["all"]
    assert found[0].gain.num_pairs == 0
    assert math.isnan(found[0].p_holm)


def test_one_network_is_compared_with_nothing():
    assert compare_networks({"a": make_scores([0.9])}, make_params()) == []


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
