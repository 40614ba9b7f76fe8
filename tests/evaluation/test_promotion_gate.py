import math

import numpy as np
import pandas as pd
import pytest
from tiny import published

from fullscale.evaluation.promotion_gate import Champion, judge
from fullscale.params import RegisterParams
from fullscale.versioning.provenance import digest_test_set


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


def make_champion(scores, test_set=None):
    return Champion("7", test_set or digest_test_set(scores["case"]), scores)


def criterion(verdict, name):
    return next(criterion for criterion in verdict.criteria if criterion.name == name)


BASE = [0.80, 0.82, 0.78, 0.85, 0.81, 0.79]
BETTER = [0.90, 0.91, 0.88, 0.93, 0.90, 0.92]


def test_gate_passes_candidate_that_wins_on_every_case():
    verdict = judge(make_scores(BETTER), make_scores(BASE), None, make_params())
    assert verdict.status == "pass"
    assert all(criterion.passed for criterion in verdict.criteria)
    assert verdict.gain.mean == pytest.approx(np.mean(BETTER) - np.mean(BASE))
    assert 0 < verdict.gain.low <= verdict.gain.mean <= verdict.gain.high
    assert criterion(verdict, "dice_gain").value == verdict.gain.low


def test_gate_fails_candidate_that_loses():
    verdict = judge(make_scores(BASE), make_scores(BETTER), None, make_params())
    assert verdict.status == "fail"
    assert not criterion(verdict, "dice_gain").passed
    assert "unet3plus - unet: -0.098" in criterion(verdict, "dice_gain").found


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
    assert criterion(verdict, "num_cases").found == "6 test cases of 6 patients"


def test_gate_fails_on_false_positive_slices_of_one_organ():
    candidate = pd.concat(
        [make_scores(BETTER), make_scores(BETTER, organ="spleen", false_slices=2)]
    )
    baseline = pd.concat([make_scores(BASE), make_scores(BASE, organ="spleen")])
    verdict = judge(candidate, baseline, None, make_params(max_slice_fpr=0.1))
    assert verdict.status == "fail"
    assert criterion(verdict, "slice_fpr/liver").passed
    spleen = criterion(verdict, "slice_fpr/spleen")
    assert not spleen.passed
    assert spleen.found == "spleen: 12 of 60 organ-free slices (0.2000)"
    assert spleen.wanted == "at most 0.1"


def test_gate_fails_when_no_slice_is_free_of_the_organ():
    candidate = make_scores(BETTER, free_slices=0)
    verdict = judge(candidate, make_scores(BASE), None, make_params())
    assert not criterion(verdict, "slice_fpr/liver").passed
    assert criterion(verdict, "slice_fpr/liver").found.endswith("so no rate")


def test_gate_fails_candidate_below_champion():
    champion = make_champion(make_scores([dice + 0.01 for dice in BETTER]))
    verdict = judge(make_scores(BETTER), make_scores(BASE), champion, make_params())
    assert verdict.status == "fail"
    assert not criterion(verdict, "champion").passed
    assert criterion(verdict, "champion").value == pytest.approx(-0.01)


def test_gate_passes_candidate_above_champion():
    champion = make_champion(make_scores(BASE))
    verdict = judge(make_scores(BETTER), make_scores(BASE), champion, make_params())
    assert criterion(verdict, "champion").passed
    assert verdict.status == "pass"


def test_gate_passes_candidate_equal_to_champion():
    verdict = judge(
        make_scores(BETTER), make_scores(BASE), make_champion(make_scores(BETTER)), make_params()
    )
    assert criterion(verdict, "champion").passed


def test_gate_names_the_champions_other_test_set():
    champion = make_champion(make_scores(BASE), test_set="0123456789abcdef")
    scores = make_scores(BETTER)
    found = criterion(judge(scores, make_scores(BASE), champion, make_params()), "champion").found
    assert "unet3plus - champion version 7: +0.0" in found
    assert (
        f"test set 0123456789abcdef, both are scored on {digest_test_set(scores['case'])}" in found
    )


def test_gate_says_nothing_of_the_champions_own_test_set():
    verdict = judge(
        make_scores(BETTER), make_scores(BASE), make_champion(make_scores(BASE)), make_params()
    )
    assert "test set" not in criterion(verdict, "champion").found


def two_organs(liver, spleen):
    return pd.concat([make_scores(liver), make_scores(spleen, organ="spleen")])


def test_gate_fails_when_one_organ_pays_for_another():
    candidate = two_organs([dice + 0.15 for dice in BASE], [dice - 0.05 for dice in BASE])
    verdict = judge(candidate, two_organs(BASE, BASE), None, make_params())
    assert criterion(verdict, "dice_gain").passed
    assert criterion(verdict, "organ_dice/liver").passed
    spleen = criterion(verdict, "organ_dice/spleen")
    assert not spleen.passed
    assert (spleen.value, spleen.limit) == (pytest.approx(-0.05), -0.01)
    assert spleen.found == "spleen: mean Dice 0.7583, unet 0.8083 (6 cases)"
    assert spleen.wanted == "at most 0.01 below unet"
    assert verdict.status == "fail"


@pytest.mark.parametrize(("tolerance", "passed"), [(0.05, True), (0.0499, False), (0.0, False)])
def test_organ_may_lose_exactly_the_tolerance(tolerance, passed):
    candidate = two_organs([dice + 0.15 for dice in BASE], [dice - 0.05 for dice in BASE])
    params = make_params(max_organ_dice_loss=tolerance)
    verdict = judge(candidate, two_organs(BASE, BASE), None, params)
    assert criterion(verdict, "organ_dice/spleen").passed is passed


def test_organ_is_compared_on_cases_that_both_networks_scored():
    candidate = two_organs(BETTER, [0.9, 0.9, 0.1, math.nan, 0.9, 0.9])
    baseline = two_organs(BASE, [0.8, 0.8, math.nan, 0.1, 0.8, 0.8])
    spleen = criterion(judge(candidate, baseline, None, make_params()), "organ_dice/spleen")
    assert spleen.found == "spleen: mean Dice 0.9000, unet 0.8000 (4 cases)"


def test_organ_without_a_pair_does_not_pass():
    candidate, baseline = two_organs(BETTER, [math.nan] * 6), two_organs(BASE, BASE)
    spleen = criterion(judge(candidate, baseline, None, make_params()), "organ_dice/spleen")
    assert not spleen.passed
    assert math.isnan(spleen.value)
    assert "no case in which both networks have a Dice" in spleen.found


def test_gate_without_pairs_fails():
    nothing = make_scores([math.nan] * 4)
    verdict = judge(nothing, nothing, None, make_params())
    assert math.isnan(verdict.gain.low)
    assert verdict.gain.num_pairs == 0
    assert verdict.status == "fail"


def test_gate_trusts_no_gain_of_a_single_patient():
    candidate, baseline = make_scores(BETTER), make_scores(BASE)
    for table in (candidate, baseline):
        table["patient"] = "p"
    verdict = judge(candidate, baseline, None, make_params())
    assert (verdict.gain.low, verdict.gain.high) == (-1, 1)
    assert verdict.status == "fail"


def test_every_clause_states_its_number_and_limit():
    verdict = judge(
        two_organs(BETTER, BETTER),
        two_organs(BASE, BASE),
        make_champion(two_organs(BASE, BASE)),
        make_params(),
    )
    assert [criterion.name for criterion in verdict.criteria] == [
        "num_cases",
        "dice_gain",
        "organ_dice/liver",
        "organ_dice/spleen",
        "slice_fpr/liver",
        "slice_fpr/spleen",
        "champion",
    ]
    upper = {"slice_fpr/liver", "slice_fpr/spleen"}
    for each in verdict.criteria:
        assert math.isfinite(each.value)
        assert each.passed is True
        assert each.value <= each.limit if each.name in upper else each.value >= each.limit


def test_verdict_compares_all_three_networks():
    champion = make_champion(make_scores([0.85, 0.84, 0.83, 0.86, 0.88, 0.80]))
    verdict = judge(make_scores(BETTER), make_scores(BASE), champion, make_params())
    pairs = {(each.first, each.second) for each in verdict.comparisons}
    assert pairs == {
        ("unet3plus", "unet"),
        ("unet3plus", "champion version 7"),
        ("unet", "champion version 7"),
    }
    assert verdict.comparisons[0].gain == verdict.gain
    assert verdict.comparisons[0].p_holm > verdict.gain.p_value
