import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import published

from fullscale.evaluation.paired import (
    MAX_EXACT_PATIENTS,
    NUM_DRAWN,
    compare_differences,
    compare_networks,
    compare_trainings,
    holm,
    is_reachable,
    mean_over_seeds,
    one_sided_level,
    pair_scores,
    paired_gain,
    seed_spread,
)
from fullscale.params import RegisterParams

LEVEL = 0.025
DIFFERENCES = st.floats(-1, 1)
FEW = 5
"""Patients with whom 2.5 % cannot be reached."""


def make_params(**changes):
    return RegisterParams.model_validate(published()["register"] | changes)


def make_scores(dice, patients=None, organ="liver", **columns):
    numbers = range(len(dice))
    return pd.DataFrame(
        {
            "case": [f"c{number}" for number in numbers],
            "patient": patients or [f"p{number}" for number in numbers],
            "organ": organ,
            "dice": dice,
            **columns,
        }
    )


def compare(differences, level=LEVEL, seed=0):
    values = np.asarray(differences, dtype=float)
    return compare_differences(values, level, seed, len(values))


# The test, its p-values and its bounds.


def p_by_all_signs(differences, shift=0.0):
    """One-sided p by going through all sign vectors, as the test is defined."""
    off = np.asarray(differences) - shift
    signs = np.array(list(itertools.product([-1, 1], repeat=len(off))))
    return ((signs * off).sum(axis=1) >= off.sum() - 1e-9).mean()


@pytest.mark.parametrize("seed", range(10))
def test_p_equals_all_signs_tried(seed):
    differences = np.random.default_rng(seed).normal(0.2, 1, 9)
    found = compare(differences)
    up, down = p_by_all_signs(differences), p_by_all_signs(-differences)
    assert found.p_greater == pytest.approx(up)
    assert found.p_value == pytest.approx(min(1, 2 * min(up, down)))


@pytest.mark.parametrize("seed", range(10))
def test_bound_is_the_largest_shift_that_is_rejected(seed):
    differences = np.random.default_rng(seed).normal(0.05, 0.1, 8)
    low = compare(differences).low
    assert p_by_all_signs(differences, low - 1e-6) <= LEVEL < p_by_all_signs(differences, low)
    high = compare(differences).high
    assert p_by_all_signs(-differences, -high - 1e-6) <= LEVEL < p_by_all_signs(-differences, -high)


@pytest.mark.parametrize("num_patients", range(1, 10))
def test_network_that_always_wins_has_one_sign_vector_of_all(num_patients):
    assert compare(np.arange(1, num_patients + 1) / 10).p_greater == 0.5**num_patients


def test_win_in_all_of_eight_patients_is_a_gain_whatever_one_of_them_gains():
    """A bootstrap-t interval reached from -0.0023 to +1.0 here."""
    found = compare([0.02, 0.03, 0.01, 0.02, 0.015, 0.025, 0.03, 0.76])
    assert found.p_greater == 1 / 256
    assert found.low > 0


def test_bound_with_six_patients_is_the_smallest_difference():
    differences = [0.05, 0.02, 0.09, 0.04, 0.03, 0.08]
    assert compare(differences).low == pytest.approx(0.02)
    assert compare(differences).high == pytest.approx(0.09)


@settings(deadline=None)
@given(st.lists(DIFFERENCES, min_size=1, max_size=9), st.integers(0, 8), st.floats(0, 1))
def test_larger_difference_never_lowers_a_bound_or_raises_p(differences, place, more):
    raised = list(differences)
    raised[place % len(raised)] += more
    before, after = compare(differences), compare(raised)
    assert after.low >= before.low
    assert after.high >= before.high
    assert after.p_greater <= before.p_greater


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.integers(0, 19), st.floats(0, 1))
def test_larger_difference_never_lowers_a_bound_of_drawn_signs(seed, place, more):
    differences = np.random.default_rng(seed).normal(0.02, 0.05, MAX_EXACT_PATIENTS + 4)
    raised = differences.copy()
    raised[place] += more
    before, after = compare(differences), compare(raised)
    assert after.low >= before.low
    assert after.p_greater <= before.p_greater


@settings(deadline=None)
@given(st.lists(DIFFERENCES, min_size=1, max_size=9), st.randoms(use_true_random=False))
def test_order_of_patients_changes_nothing(differences, random):
    shuffled = list(differences)
    random.shuffle(shuffled)
    assert compare(differences) == compare(shuffled)


@settings(deadline=None)
@given(st.lists(DIFFERENCES, min_size=1, max_size=9))
def test_bounds_hold_the_mean_and_change_sides_with_the_networks(differences):
    found, turned = compare(differences), compare([-each for each in differences])
    assert found.low <= found.mean + 1e-12
    assert found.mean <= found.high + 1e-12
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))
    assert turned.p_value == found.p_value


@settings(deadline=None)
@given(st.lists(DIFFERENCES, min_size=6, max_size=9), st.floats(0.01, 1))
def test_bounds_scale_with_the_differences(differences, factor):
    found, scaled = compare(differences), compare([factor * each for each in differences])
    assert scaled.low == pytest.approx(factor * found.low)
    assert scaled.high == pytest.approx(factor * found.high)


@pytest.mark.parametrize("outlier", [0.2, 1, 1e3, 1e9])
def test_outlier_on_the_better_side_leaves_the_bound_above_zero(outlier):
    assert compare([0.02, 0.03, 0.01, 0.02, 0.015, 0.025, outlier]).low > 0


@pytest.mark.parametrize("num_patients", range(1, FEW + 1))
def test_too_few_patients_bound_nothing(num_patients):
    found = compare([0.5] * num_patients)
    assert (found.low, found.mean, found.high) == (-1, 0.5, 1)
    assert not is_reachable(num_patients, LEVEL)
    assert is_reachable(num_patients, 0.5**num_patients)
    assert is_reachable(FEW + 1, LEVEL)


def test_nobody_bounds_nothing():
    assert not is_reachable(0, 1)
    assert math.isnan(compare([]).low)


@pytest.mark.parametrize("value", [0.0, 0.1, 0.9 - 0.8, 1 / 3])
@pytest.mark.parametrize("num_patients", [6, 8, 20])
def test_equal_differences_have_bounds_without_width(value, num_patients):
    found = compare([value] * num_patients)
    assert (found.low, found.high) == pytest.approx((value, value))
    assert found.p_greater == pytest.approx(0.5**num_patients if value else 1, abs=2e-5)


def test_ties_are_no_gain_in_spite_of_rounding():
    """0.1 + 0.2 - 0.3 is not 0 in floating point."""
    assert compare([0.1 + 0.2 - 0.3] * 8).p_greater == 1
    assert compare([0.3 - (0.1 + 0.2)] * 8).p_value == 1


def test_drawn_signs_are_close_to_all_signs():
    differences = np.random.default_rng(0).normal(0.02, 0.05, MAX_EXACT_PATIENTS + 1)
    signs = 1 - 2 * ((np.arange(2**17)[:, None] >> np.arange(17)) & 1)
    exact = ((signs @ differences) >= differences.sum() - 1e-9).mean()
    found = compare(differences)
    assert found.p_greater == pytest.approx(exact, abs=4 * math.sqrt(exact / NUM_DRAWN))
    assert found == compare(differences)
    assert found.p_greater != compare(differences, seed=1).p_greater


def test_p_of_drawn_signs_is_never_zero():
    assert compare([0.1] * 40).p_greater == pytest.approx(1 / (NUM_DRAWN + 1))


def test_false_gains_are_as_rare_as_the_level_says():
    """Patients of exchangeable networks, one in ten of whom a network misses."""
    rng = np.random.default_rng(0)
    both = np.where(rng.random((2, 2000, 8)) < 0.1, 0.0, rng.beta(20, 3, (2, 2000, 8)))
    share = np.mean([compare(each).low > 0 for each in both[0] - both[1]])
    assert 0.01 < share <= 0.03


def test_level_is_half_of_what_the_confidence_leaves():
    assert one_sided_level(make_params(confidence=0.95)) == pytest.approx(0.025)


# From tables to differences.


def test_gain_is_the_mean_over_patients_of_their_cases_and_organs():
    patients = ["p0", "p0", "p1"]
    first = pd.concat(
        [make_scores([0.9, 0.9, 0.5], patients), make_scores([0.8, 0.6, 0.5], patients, "spleen")]
    )
    second = pd.concat(
        [make_scores([0.7, 0.7, 0.5], patients), make_scores([0.6, 0.6, 0.5], patients, "spleen")]
    )
    gain = paired_gain(first, second, make_params())
    assert gain.mean == pytest.approx(((0.2 + 0.2 + 0.2 + 0) / 4 + 0) / 2)
    assert (gain.num_patients, gain.num_pairs) == (2, 6)


def test_gain_leaves_out_pairs_without_a_dice():
    gain = paired_gain(
        make_scores([0.9, math.nan, 0.8]), make_scores([0.8, 0.9, math.nan]), make_params()
    )
    assert (gain.num_pairs, gain.num_patients) == (1, 1)
    assert gain.mean == pytest.approx(0.1)


def test_scans_of_one_patient_are_not_more_patients():
    patients = ["p0"] * 6
    first, second = (make_scores([dice] * 6, patients) for dice in (0.9, 0.8))
    gain = paired_gain(first, second, make_params())
    assert (gain.num_patients, gain.p_greater, gain.low) == (1, 0.5, -1)


def test_gain_of_identical_predictions_is_nothing():
    scores = make_scores([0.8, 0.9, 0.7, 0.6, 0.8, 0.7])
    gain = paired_gain(scores, scores, make_params())
    assert (gain.low, gain.mean, gain.high, gain.p_greater, gain.p_value) == (0, 0, 0, 1, 1)


def test_gain_without_pairs_is_no_number():
    nothing = make_scores([math.nan] * 3)
    gain = paired_gain(nothing, nothing, make_params())
    assert gain.num_pairs == gain.num_patients == 0
    assert all(math.isnan(each) for each in (gain.mean, gain.low, gain.high, gain.p_value))


@pytest.mark.parametrize("num_patients", [9, 20])
def test_gain_does_not_depend_on_the_order_of_rows_or_the_names_of_patients(num_patients):
    rng = np.random.default_rng(0)
    first, second = make_scores(rng.random(num_patients)), make_scores(rng.random(num_patients))
    found = paired_gain(first, second, make_params())
    assert found == paired_gain(first, second.sample(frac=1, random_state=0), make_params())
    names = {name: f"q{place}" for place, name in enumerate(sorted(first["patient"], reverse=True))}
    renamed = (table.replace({"patient": names}) for table in (first, second))
    assert found == paired_gain(*renamed, make_params())


def test_pairs_are_those_of_case_and_organ():
    first = pd.concat([make_scores([0.9, 0.8]), make_scores([0.7, 0.6], organ="spleen")])
    second = make_scores([0.1, 0.2], organ="spleen")
    pairs = pair_scores(first, second)
    assert pairs["organ"].tolist() == ["spleen", "spleen"]
    assert (pairs["dice"] - pairs["dice_other"]).tolist() == pytest.approx([0.6, 0.4])


def test_case_scored_twice_is_refused():
    twice = pd.concat([make_scores([0.9])] * 2)
    with pytest.raises(ValueError, match=r"two rows of scores for .*'c0'.*; wanted one"):
        pair_scores(twice, make_scores([0.8]))


# Several trainings.


def of_seeds(*rows):
    return pd.concat([make_scores(dice, seed=seed) for seed, dice in enumerate(rows)])


def test_each_dice_is_the_mean_over_trainings():
    table = of_seeds([0.9, 0.6], [0.7, 0.8])
    assert mean_over_seeds(table)["dice"].tolist() == pytest.approx([0.8, 0.7])
    gain = paired_gain(table, make_scores([0.7, 0.7]), make_params())
    assert gain.mean == pytest.approx(0.05)
    assert (gain.num_patients, gain.num_pairs) == (2, 2)


def test_one_training_with_a_seed_is_as_one_without():
    first, second = make_scores([0.9, 0.8, 0.7]), make_scores([0.8, 0.8, 0.5])
    params = make_params()
    assert paired_gain(first, second, params) == paired_gain(
        first.assign(seed=7), second.assign(seed=3), params
    )


def test_spread_adds_the_variances_of_both_networks():
    first, second = of_seeds([0.8], [0.9], [1.0]), of_seeds([0.5], [0.7])
    assert seed_spread(first, second) == pytest.approx(math.sqrt(0.01 + 0.02))
    assert math.isnan(seed_spread(first, make_scores([0.5])))


# Many comparisons.


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


# Over trainings.


@pytest.mark.parametrize(
    ("first", "second", "p_value"),
    [
        ([0.9, 0.91, 0.92], [0.7, 0.8, 0.85], 1 / 20),  # one choice of three in six is as good
        ([0.9, 0.91, 0.8], [0.7, 0.75, 0.85], 2 / 20),  # or 0.9, 0.91, 0.85
        ([0.8] * 3, [0.8] * 3, 1),
        ([0.7, 0.7, 0.7], [0.9, 0.9, 0.9], 1),
        ([0.9] * 4, [0.8] * 3, 1 / 35),
    ],
)
def test_trainings_are_exchanged_in_every_way(first, second, p_value):
    found = compare_trainings(np.array(first), np.array(second), 0)
    assert found == pytest.approx(p_value)


def test_of_many_trainings_random_choices_are_drawn():
    first_T = np.linspace(0.8, 0.9, 12)
    assert compare_trainings(first_T + 0.2, first_T, 0) == pytest.approx(1 / 100_001)
    assert compare_trainings(first_T, first_T, 0) == pytest.approx(0.5, abs=0.03)  # and ties


def test_network_against_itself_passes_over_trainings_in_one_case_of_twenty():
    rng = np.random.default_rng(5)
    passed = [
        compare_trainings(rng.normal(size=3), rng.normal(size=3), 0) <= 0.05 for _ in range(2000)
    ]
    assert np.mean(passed) == pytest.approx(0.05, abs=0.015)
