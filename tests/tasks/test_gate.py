import math

import numpy as np
import pandas as pd
import pytest
from conftest import published

from tasks.gate import judge, paired_gain
from tasks.params import RegisterParams


def make_params(**changes):
    values = published()["register"] | {"num_bootstrap": 2000, "min_cases": 3}
    return RegisterParams.model_validate(values | changes)


def make_scores(dice, organ="liver", patients=None, false_slices=0, free_slices=10):
    return pd.DataFrame(
        {
            "case": [f"c{number}" for number in range(len(dice))],
            "patient": patients or [f"p{number}" for number in range(len(dice))],
            "organ": organ,
            "dice": dice,
            "num_false_positive_slices": false_slices,
            "num_free_slices": free_slices,
        }
    )


def clause(verdict, name):
    return next(clause for clause in verdict.clauses if clause.name == name)


BASE = [0.80, 0.82, 0.78, 0.85, 0.81, 0.79]
BETTER = [0.90, 0.91, 0.88, 0.93, 0.90, 0.92]


def test_gate_passes_candidate_that_wins_on_every_case():
    verdict = judge(make_scores(BETTER), make_scores(BASE), None, make_params())
    assert verdict.status == "pass"
    assert all(clause.passed for clause in verdict.clauses)
    assert verdict.gain.mean == pytest.approx(np.mean(BETTER) - np.mean(BASE))
    assert 0 < verdict.gain.low <= verdict.gain.mean <= verdict.gain.high


def test_gate_fails_candidate_that_loses():
    verdict = judge(make_scores(BASE), make_scores(BETTER), None, make_params())
    assert verdict.status == "fail"
    assert not clause(verdict, "dice_gain").passed
    assert "unet3plus less unet: -0.098" in clause(verdict, "dice_gain").found


def test_gate_fails_when_mean_wins_but_interval_holds_zero():
    candidate = [0.95, 0.70, 0.95, 0.72, 0.95, 0.80]
    verdict = judge(make_scores(candidate), make_scores(BASE), None, make_params())
    assert verdict.gain.mean > 0 > verdict.gain.low
    assert verdict.status == "fail"


def test_gate_fails_identical_networks():
    verdict = judge(make_scores(BASE), make_scores(BASE), None, make_params())
    assert (verdict.gain.low, verdict.gain.mean, verdict.gain.high) == (0, 0, 0)
    assert verdict.status == "fail"


def test_gate_asks_for_margin():
    scores = make_scores(BETTER), make_scores(BASE)
    assert judge(*scores, None, make_params(min_dice_gain=0.05)).status == "pass"
    assert judge(*scores, None, make_params(min_dice_gain=0.2)).status == "fail"


def test_gate_is_undecided_on_too_few_cases():
    verdict = judge(make_scores(BETTER), make_scores(BASE), None, make_params(min_cases=7))
    assert verdict.status == "undecided"
    assert clause(verdict, "num_cases").found == "6 test cases of 6 patients"


def test_gate_fails_on_false_positive_slices_of_one_organ():
    candidate = pd.concat(
        [make_scores(BETTER), make_scores(BETTER, organ="spleen", false_slices=2)]
    )
    baseline = pd.concat([make_scores(BASE), make_scores(BASE, organ="spleen")])
    verdict = judge(candidate, baseline, None, make_params(max_slice_fpr=0.1))
    assert verdict.status == "fail"
    assert clause(verdict, "slice_fpr/liver").passed
    spleen = clause(verdict, "slice_fpr/spleen")
    assert not spleen.passed
    assert spleen.found == "spleen: 12 of 60 organ-free slices (0.2000)"
    assert spleen.wanted == "at most 0.1"


def test_gate_fails_when_no_slice_is_free_of_the_organ():
    candidate = make_scores(BETTER, free_slices=0)
    verdict = judge(candidate, make_scores(BASE), None, make_params())
    assert not clause(verdict, "slice_fpr/liver").passed
    assert clause(verdict, "slice_fpr/liver").found.endswith("so no rate")


def test_gate_fails_candidate_below_champion():
    champion = make_scores([dice + 0.01 for dice in BETTER])
    verdict = judge(make_scores(BETTER), make_scores(BASE), champion, make_params())
    assert verdict.status == "fail"
    assert not clause(verdict, "champion").passed


def test_gate_passes_candidate_above_champion():
    champion = make_scores(BASE)
    verdict = judge(make_scores(BETTER), make_scores(BASE), champion, make_params())
    assert clause(verdict, "champion").passed
    assert verdict.status == "pass"


def test_gain_leaves_out_pairs_without_a_dice():
    candidate = make_scores([0.9, math.nan, 0.8])
    gain = paired_gain(candidate, make_scores([0.8, 0.9, math.nan]), make_params())
    assert gain.num_pairs == 1
    assert gain.mean == pytest.approx(0.1)


def test_gain_without_pairs_is_not_a_number_and_fails():
    nothing = make_scores([math.nan] * 4)
    verdict = judge(nothing, nothing, None, make_params())
    assert math.isnan(verdict.gain.low)
    assert verdict.gain.num_pairs == 0
    assert verdict.status == "fail"


def test_gain_of_one_patient_is_its_own_interval():
    scores = make_scores([0.9, 0.7]), make_scores([0.8, 0.5])
    for table in scores:
        table["patient"] = "p"
    gain = paired_gain(*scores, make_params())
    assert gain.num_patients == 1
    assert gain.low == gain.mean == gain.high == pytest.approx(0.15)


def test_gain_counts_patient_with_two_scans_once():
    patients = ["p0", "p0", "p1"]
    candidate = make_scores([0.9, 0.9, 0.5], patients=patients)
    gain = paired_gain(candidate, make_scores([0.7, 0.7, 0.5], patients=patients), make_params())
    assert gain.mean == pytest.approx(0.1)


def test_gain_is_the_same_every_time():
    rng = np.random.default_rng(0)
    scores = make_scores(rng.random(20)), make_scores(rng.random(20))
    gain = paired_gain(*scores, make_params())
    assert paired_gain(*scores, make_params()) == gain
    assert paired_gain(*scores, make_params(seed=1)).low != gain.low


def test_interval_widens_with_confidence():
    scores = make_scores(BETTER), make_scores(BASE)
    narrow = paired_gain(*scores, make_params(confidence=0.5))
    wide = paired_gain(*scores, make_params(confidence=0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_gain_refuses_case_scored_twice():
    twice = pd.concat([make_scores(BASE), make_scores(BASE)])
    with pytest.raises(pd.errors.MergeError, match="one-to-one"):
        paired_gain(twice, make_scores(BASE), make_params())
