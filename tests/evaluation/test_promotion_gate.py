import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import published

from fullscale.evaluation.promotion_gate import Champion, Deployed, Trial, judge
from fullscale.params import RegisterParams

TEST_SET = "0123456789abcdef"
BASE = [0.80, 0.82, 0.78, 0.85, 0.81, 0.79]
BETTER = [0.90, 0.91, 0.88, 0.93, 0.90, 0.92]
DICE = st.floats(0, 1)


def make_params(**changes):
    settings = published()["register"] | {"min_dice_gain": 0} | changes
    return RegisterParams.model_validate(settings)


def make_scores(dice, organ="liver", patients=None, false_slices=0, free_slices=10, true_voxels=50):
    return pd.DataFrame(
        {
            "case": [f"c{number}" for number in range(len(dice))],
            "patient": patients or [f"p{number}" for number in range(len(dice))],
            "organ": organ,
            "dice": dice,
            "num_true_voxels": true_voxels,
            "num_false_positive_slices": false_slices,
            "num_free_slices": free_slices,
        }
    )


def two_organs(liver, spleen, **columns):
    return pd.concat([make_scores(liver), make_scores(spleen, organ="spleen", **columns)])


def make_champion(scores, organs=("liver",), test_set=TEST_SET):
    return Champion("7", test_set, organs, scores)


def decide(candidate, baseline, champion=None, organs=("liver",), num_verdicts=1, **changes):
    trial = Trial(organs, TEST_SET, num_verdicts)
    return judge(candidate, baseline, champion, trial, make_params(**changes))


def decide_dice(candidate, baseline, **changes):
    return decide(make_scores(candidate), make_scores(baseline), **changes)


def criterion(verdict, name):
    return next(criterion for criterion in verdict.criteria if criterion.name == name)


def failed(verdict):
    return [criterion.name for criterion in verdict.criteria if not criterion.passed]


# The gain over the baseline.


def test_gate_passes_candidate_that_wins_in_every_patient():
    verdict = decide_dice(BETTER, BASE)
    assert verdict.status == "pass"
    assert failed(verdict) == []
    assert verdict.gain.mean == pytest.approx(np.mean(BETTER) - np.mean(BASE))
    gain = criterion(verdict, "dice_gain")
    assert gain.value == verdict.gain.low == pytest.approx(0.08)
    assert gain.found == "Dice against unet +0.0983, at least +0.0800, p 0.016"
    assert gain.wanted == "more than 0"


def test_gate_fails_candidate_that_loses():
    verdict = decide_dice(BASE, BETTER)
    assert verdict.status == "fail"
    assert criterion(verdict, "dice_gain").found.startswith("Dice against unet -0.0983, at least -")


def test_gate_fails_when_the_mean_wins_by_chance():
    verdict = decide_dice([0.95, 0.70, 0.95, 0.72, 0.95, 0.80], BASE)
    assert verdict.gain.mean > 0 > verdict.gain.low
    assert "dice_gain" in failed(verdict)
    assert verdict.status == "fail"


def test_gate_fails_identical_networks():
    verdict = decide_dice(BASE, BASE)
    assert failed(verdict) == ["dice_gain"]


def test_gate_asks_for_margin():
    assert decide_dice(BETTER, BASE, min_dice_gain=0.05).status == "pass"
    assert decide_dice(BETTER, BASE, min_dice_gain=0.2).status == "fail"


def test_gate_may_ask_for_no_more_than_as_good():
    equal = decide_dice(BASE, BASE, min_dice_gain=-0.01)
    assert equal.status == "pass"
    assert any("not worse than unet by 0.01. That it is better is not" in n for n in equal.notes)
    better = decide_dice(BETTER, BASE, min_dice_gain=-0.01)
    assert any("That it is better is shown." in note for note in better.notes)
    worse = [dice - 0.02 for dice in BASE]
    assert "dice_gain" in failed(decide_dice(worse, BASE, min_dice_gain=-0.01))
    assert not any("That it is better" in note for note in decide_dice(BETTER, BASE).notes)


def test_gate_passes_win_in_all_patients_one_of_whom_the_baseline_nearly_missed():
    baseline = [0.81, 0.79, 0.80, 0.82, 0.78, 0.80, 0.81, 0.05]
    candidate = [0.83, 0.80, 0.83, 0.84, 0.80, 0.82, 0.83, 0.80]
    assert decide_dice(candidate, baseline).status == "pass"


RANK = {"fail": 0, "pass": 1}


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(DICE, DICE), min_size=6, max_size=8), st.integers(0, 7), st.floats(0, 1))
def test_worse_baseline_and_better_candidate_never_turn_pass_into_fail(pairs, place, share):
    candidate, baseline = (list(each) for each in zip(*pairs, strict=True))
    candidate = [0.5 + each / 2 for each in candidate]  # so that many pass
    before = decide_dice(candidate, baseline, max_organ_dice_loss=1.0).status
    place %= len(pairs)
    worse = [each * share if here == place else each for here, each in enumerate(baseline)]
    assert RANK[decide_dice(candidate, worse, max_organ_dice_loss=1.0).status] >= RANK[before]
    better = list(candidate)
    better[place] += (1 - better[place]) * share
    assert RANK[decide_dice(better, baseline, max_organ_dice_loss=1.0).status] >= RANK[before]


# Enough patients of every organ.


@pytest.mark.parametrize("num_patients", [1, 2, 3, 5])
def test_gate_is_undecided_on_too_few_patients(num_patients):
    verdict = decide_dice(BETTER[:num_patients], BASE[:num_patients])
    assert verdict.status == "undecided"
    patients = criterion(verdict, "num_patients")
    assert patients.found == f"{num_patients} test patients; liver has the fewest, {num_patients}"
    assert patients.wanted == "at least 6 for each organ"


def test_six_scans_of_two_patients_are_two_patients():
    scores = (make_scores(each, patients=["a", "b"] * 3) for each in (BETTER, BASE))
    verdict = decide(*scores)
    assert verdict.status == "undecided"
    assert criterion(verdict, "num_patients").value == 2


def test_organ_without_a_test_case_cannot_pass():
    scores = make_scores(BETTER), make_scores(BASE)
    verdict = decide(*scores, organs=("liver", "spleen"))
    assert verdict.status == "undecided"
    assert criterion(verdict, "num_patients").found == "6 test patients; spleen has the fewest, 0"
    assert criterion(verdict, "organ_dice/spleen").found == "spleen: no test case has the organ"
    loss = criterion(verdict, "organ_loss/spleen")
    assert loss.found == "spleen: Dice: no case to compare with unet"
    assert {"organ_dice/spleen", "organ_loss/spleen"} < set(failed(verdict))


@pytest.mark.parametrize("num_patients", [2, 3])
def test_verdict_says_where_a_level_cannot_be_reached(num_patients):
    dice = BETTER[:num_patients], BASE[:num_patients]
    verdict = decide_dice(*dice, min_patients=2)
    assert verdict.status == "fail"
    assert criterion(verdict, "dice_gain").found.endswith(
        f"but p of {num_patients} patients is never below {0.5**num_patients:.2g}, wanted 0.025"
    )
    assert criterion(verdict, "organ_loss/liver").found.endswith(
        f"the mean of {num_patients} patients, too few to bound it"
    )
    assert decide_dice(*dice, min_patients=2, confidence=0.4).status == "pass"


def test_gate_without_pairs_is_undecided():
    nothing = make_scores([math.nan] * 4)
    verdict = decide(nothing, nothing)
    assert verdict.status == "undecided"
    assert verdict.gain.num_pairs == 0
    assert criterion(verdict, "dice_gain").found.startswith("Dice against unet not measured")
    assert not criterion(verdict, "failures").passed


# New failures.


def test_one_new_failure_fails_though_the_gain_is_shown():
    candidate = [0.99] * 11 + [0.49]
    verdict = decide_dice(candidate, [0.5] * 12)
    assert failed(verdict) == ["failures"]
    assert criterion(verdict, "failures").found == (
        "Dice below 0.5 in 1 of 12 patients; new against unet: p11 liver 0.49 (unet 0.50)"
    )
    assert decide_dice(candidate, [0.49] * 12).status == "pass"


def test_failure_of_one_scan_is_not_hidden_by_another_of_the_patient():
    patients = [*"abcdef", "a"]
    candidate = make_scores([*BETTER, 0.45], patients=patients)
    verdict = decide(candidate, make_scores([*BASE, 0.6], patients=patients))
    assert criterion(verdict, "failures").value == 1


def test_verdict_says_which_rate_of_failures_so_few_patients_exclude():
    verdict = decide_dice([*BETTER, 0.9, 0.9], [*BASE, 0.8, 0.8])
    assert criterion(verdict, "failures").found == (
        "Dice below 0.5 in 0 of 8 patients (true rate at most 31 %); new against unet: none"
    )


def test_many_new_failures_are_counted_and_some_named():
    found = criterion(decide_dice([0.1] * 6, BASE), "failures").found
    assert "p0 liver 0.10 (unet 0.80), p1 liver" in found
    assert found.endswith(", 3 more")


# Each organ.


def test_gain_over_a_bad_baseline_does_not_lift_the_floor():
    verdict = decide_dice([0.35] * 8, [0.31] * 8)
    assert failed(verdict) == ["organ_dice/liver"]
    floor = criterion(verdict, "organ_dice/liver")
    assert (floor.found, floor.wanted) == ("liver: mean Dice 0.3500 (8 patients)", "at least 0.5")


def test_floor_may_be_of_each_organ():
    scores = two_organs(BETTER, BETTER), two_organs(BASE, BASE)
    verdict = decide(
        *scores, organs=("liver", "spleen"), min_organ_dice={"liver": 0.92, "spleen": 0.8}
    )
    assert failed(verdict) == ["organ_dice/liver"]


def test_gate_fails_when_one_organ_pays_for_another():
    candidate = two_organs([dice + 0.15 for dice in BASE], [dice - 0.05 for dice in BASE])
    verdict = decide(candidate, two_organs(BASE, BASE), organs=("liver", "spleen"))
    assert failed(verdict) == ["organ_loss/spleen"]
    spleen = criterion(verdict, "organ_loss/spleen")
    assert (spleen.value, spleen.limit) == (pytest.approx(-0.05), -0.02)
    assert spleen.found == "spleen: Dice against unet -0.0500, at least -0.0500"
    assert spleen.wanted == "at least -0.02"
    assert verdict.status == "fail"


@pytest.mark.parametrize(("tolerance", "passed"), [(0.05, True), (0.0499, False), (0.0, False)])
def test_organ_may_lose_exactly_the_tolerance(tolerance, passed):
    candidate = two_organs([dice + 0.15 for dice in BASE], [dice - 0.05 for dice in BASE])
    verdict = decide(
        candidate,
        two_organs(BASE, BASE),
        organs=("liver", "spleen"),
        max_organ_dice_loss=tolerance,
    )
    assert criterion(verdict, "organ_loss/spleen").passed is passed


def test_organ_that_is_worse_in_some_patients_is_bounded_not_averaged():
    candidate = [*(dice + 0.02 for dice in BASE[:5]), BASE[5] - 0.06]
    loss = criterion(decide_dice(candidate, BASE), "organ_loss/liver")
    assert loss.value == pytest.approx(-0.06)
    assert not loss.passed


# Organ-free slices and patients.


def test_gate_fails_on_false_positive_slices_of_one_organ():
    candidate = two_organs(BETTER, BETTER, false_slices=2)
    verdict = decide(candidate, two_organs(BASE, BASE), organs=("liver", "spleen"))
    assert failed(verdict) == ["slice_fpr/spleen"]
    spleen = criterion(verdict, "slice_fpr/spleen")
    assert spleen.found == "spleen: seen in 12 of 60 organ-free slices (0.2000), in 6 of 6 patients"
    assert spleen.wanted == "slice FPR at most 0.1"
    assert criterion(verdict, "slice_fpr/liver").found == (
        "liver: seen in 0 of 60 organ-free slices (0.0000), in 0 of 6 patients "
        "(true rate at most 39 %)"
    )


def test_organ_that_is_in_every_slice_passes():
    verdict = decide(make_scores(BETTER, free_slices=0), make_scores(BASE))
    assert criterion(verdict, "slice_fpr/liver").found == "liver: no organ-free slice"
    assert verdict.status == "pass"


def with_free_patients(dice, free_dice):
    """Six patients who have the liver, and others who do not."""
    table = make_scores([*dice, *free_dice])
    table.loc[len(dice) :, "num_true_voxels"] = 0
    return table


def test_organ_hallucinated_in_3_of_11_patients_fails_though_the_baseline_is_no_better():
    free = [0.0] * 3 + [1.0] * 8
    verdict = decide(with_free_patients(BETTER, free), with_free_patients(BASE, free))
    assert failed(verdict) == ["organ_free/liver"]
    seen = criterion(verdict, "organ_free/liver")
    assert seen.found == "liver: seen in 3 of 11 organ-free patients"
    assert seen.value == pytest.approx(3 / 11)


def test_new_hallucination_is_a_new_failure():
    candidate = with_free_patients(BETTER, [0.0] + [1.0] * 20)
    verdict = decide(candidate, with_free_patients(BASE, [1.0] * 21))
    assert "failures" in failed(verdict)
    assert criterion(verdict, "organ_free/liver").passed


def test_organ_free_patients_count_as_patients_but_not_for_the_floor():
    candidate, baseline = (with_free_patients(each, [1.0] * 5) for each in (BETTER[:3], BASE[:3]))
    verdict = decide(candidate, baseline, max_organ_dice_loss=0.2)
    assert criterion(verdict, "num_patients").value == 8
    assert criterion(verdict, "organ_free/liver").found == (
        "liver: seen in 0 of 5 organ-free patients (true rate at most 45 %)"
    )
    floor = criterion(verdict, "organ_dice/liver")
    assert floor.value == pytest.approx(np.mean(BETTER[:3]))
    assert "(3 patients)" in floor.found


# The champion.


def test_gate_fails_candidate_worse_than_the_champion_by_more_than_the_margin():
    champion = make_champion(make_scores([dice + 0.03 for dice in BETTER]))
    verdict = decide(make_scores(BETTER), make_scores(BASE), champion)
    assert failed(verdict) == ["champion", "champion/liver"]
    assert criterion(verdict, "champion").found == (
        "Dice against champion version 7 -0.0300, at least -0.0300"
    )
    assert criterion(verdict, "champion").wanted == "at least -0.02"


@pytest.mark.parametrize("more", [-0.1, 0.0, 0.01, 0.02])
def test_gate_passes_candidate_within_the_margin_of_the_champion(more):
    champion = make_champion(make_scores([dice + more for dice in BETTER]))
    assert decide(make_scores(BETTER), make_scores(BASE), champion).status == "pass"


def test_gate_fails_candidate_that_may_be_worse_than_the_champion():
    """The mean is as good, but the bound is not."""
    noise = [0.05, -0.05, 0.05, -0.05, 0.05, -0.05]
    champion = make_champion(make_scores([a + b for a, b in zip(BETTER, noise, strict=True)]))
    verdict = decide(make_scores(BETTER), make_scores(BASE), champion)
    assert failed(verdict) == ["champion", "champion/liver"]


def test_gate_fails_candidate_that_misses_what_the_champion_finds():
    candidate, baseline = two_organs(BETTER, [0.4] * 6), two_organs(BASE, [0.3] * 6)
    champion = make_champion(two_organs([0.2] * 6, [0.6] * 6), ("liver", "spleen"))
    verdict = decide(candidate, baseline, champion, ("liver", "spleen"), min_organ_dice=0)
    assert failed(verdict) == ["champion_failures", "champion/spleen"]
    assert criterion(verdict, "champion").passed


def test_organs_of_only_one_network_are_named():
    candidate, baseline = two_organs(BETTER, BETTER), two_organs(BASE, BASE)
    champion = make_champion(make_scores(BASE), ("liver", "kidney"))
    verdict = decide(candidate, baseline, champion, ("liver", "spleen"))
    assert verdict.status == "pass"
    assert "champion/spleen" not in {each.name for each in verdict.criteria}
    assert "Not compared, because champion version 7 lacks it: spleen." in verdict.notes
    assert "Champion version 7 also segments kidney, which unet3plus does not." in verdict.notes


def test_champion_without_a_common_organ_is_not_compared():
    champion = make_champion(make_scores([]), ("kidney",))
    verdict = decide(make_scores(BETTER), make_scores(BASE), champion)
    assert verdict.status == "pass"
    assert "Not compared, because champion version 7 lacks it: liver." in verdict.notes


def test_verdict_names_the_champions_other_test_set():
    champion = make_champion(make_scores(BASE), test_set="f" * 16)
    notes = decide(make_scores(BETTER), make_scores(BASE), champion).notes
    wanted = f"Champion version 7 was registered on test set {'f' * 16}; both are scored on this"
    assert any(note.startswith(wanted) for note in notes)
    own = decide(make_scores(BETTER), make_scores(BASE), make_champion(make_scores(BASE))).notes
    assert not any("was registered on" in note for note in own)


# What the verdict is about.


def of_seeds(dice, num_seeds, step=0.01):
    tables = [make_scores([each + step * seed for each in dice]) for seed in range(num_seeds)]
    return pd.concat([table.assign(seed=seed) for seed, table in enumerate(tables)])


def test_verdict_on_one_training_each_is_on_the_weights():
    notes = decide_dice(BETTER, BASE).notes
    assert notes[1] == (
        "Judged: these weights against those weights (1 and 1 trainings; from 3 each on, unet3plus "
        "against unet)."
    )


def test_verdict_on_three_trainings_each_is_on_the_networks():
    verdict = decide(of_seeds(BETTER, 3), of_seeds(BASE, 3))
    assert verdict.status == "pass"
    assert verdict.gain.num_pairs == 6
    assert verdict.notes[1] == (
        "Judged: unet3plus against unet, 3 and 3 trainings. The standard deviation of the gain "
        "between trainings is 0.0141."
    )
    fewer = decide(of_seeds(BETTER, 3), of_seeds(BASE, 2)).notes[1]
    assert fewer.startswith("Judged: these weights against those weights (3 and 2 trainings;")
    assert fewer.endswith("between trainings is 0.0122.")


def test_gain_of_a_lucky_group_of_trainings_is_none_of_the_network():
    """Every patient gains in the mean, because two of the three trainings were lucky."""
    lucky = [0.03, 0.03, -0.01]
    candidate = pd.concat(
        [make_scores([each + gain for each in BASE]).assign(seed=i) for i, gain in enumerate(lucky)]
    )
    verdict = decide(candidate, of_seeds(BASE, 3, step=0))
    assert failed(verdict) == ["trainings"]
    # Of three of the six: 0.03 twice, and any other.
    assert criterion(verdict, "trainings").value == pytest.approx(4 / 20)
    fewer = decide(candidate[candidate["seed"] < 2], of_seeds(BASE, 3, step=0))
    assert "trainings" not in [each.name for each in fewer.criteria]


def test_trainings_of_a_network_are_not_more_patients():
    three = (of_seeds(each, 3, step=0) for each in (BETTER, BASE))
    one = decide_dice(BETTER, BASE)
    assert decide(*three).gain.low == pytest.approx(one.gain.low)


def of_ensembles(candidate, baseline, champion=None, **columns):
    """Three trainings of each network, BETTER and BASE, with other scores of what is deployed."""
    deployed = Deployed(
        "the ensemble of 3 trainings", make_scores(candidate, **columns), make_scores(baseline)
    )
    params = make_params()
    trial = Trial(("liver",), TEST_SET)
    trainings = (of_seeds(BETTER, 3, step=0), of_seeds(BASE, 3, step=0))
    return judge(*trainings, champion, trial, params, deployed)


def test_gain_is_of_the_networks_whatever_their_ensembles_score():
    alone = decide(of_seeds(BETTER, 3, step=0), of_seeds(BASE, 3, step=0))
    verdict = of_ensembles([0.95] * 6, [0.99] * 6)
    assert verdict.status == "pass"
    assert verdict.gain == alone.gain
    for name in ("num_patients", "dice_gain", "organ_loss/liver"):
        assert criterion(verdict, name) == criterion(alone, name)
    assert verdict.comparisons[0].gain == verdict.gain


def test_floors_failures_and_false_positives_are_of_what_is_registered():
    low = [0.4] * 6
    assert failed(of_ensembles(low, low)) == ["organ_dice/liver"]
    assert failed(of_ensembles([*BETTER[:5], 0.3], BASE)) == ["failures"]
    assert failed(of_ensembles([*BETTER[:5], 0.3], [*BASE[:5], 0.4])) == []
    assert failed(of_ensembles(BETTER, BASE, false_slices=2)) == ["slice_fpr/liver"]


def test_champion_is_compared_with_what_is_registered():
    champion = make_champion(make_scores([0.95] * 6))
    assert "champion" in failed(of_ensembles(BETTER, BASE, champion))
    assert failed(of_ensembles([0.96] * 6, BASE, champion)) == []
    assert "champion" not in failed(of_ensembles([0.93] * 5 + [0.96], BASE, None))


def test_organ_free_patients_are_those_of_what_is_registered():
    columns = {"true_voxels": [0, *[50] * 5]}
    seen = of_ensembles([0.0, *BETTER[1:]], BASE, **columns)
    assert "organ_free/liver" in failed(seen)
    unseen = of_ensembles([1.0, *BETTER[1:]], BASE, **columns)
    assert failed(unseen) == []


def test_verdict_says_what_a_pass_registers_and_compares_it_too():
    verdict = of_ensembles([0.95] * 6, BASE)
    assert verdict.notes[1].startswith("Judged: unet3plus against unet, 3 and 3 trainings.")
    assert verdict.notes[2].startswith("A pass registers the ensemble of 3 trainings. Dice again")
    ensemble = "unet3plus (the ensemble of 3 trainings)"
    pairs = {(each.first, each.second) for each in verdict.comparisons}
    assert pairs == {("unet3plus", "unet"), ("unet3plus", ensemble), ("unet", ensemble)}


@pytest.mark.slow
@given(st.lists(st.tuples(DICE, DICE, DICE), min_size=6, max_size=9))
@settings(max_examples=30, deadline=None)
def test_order_of_trainings_and_of_rows_is_irrelevant(dice):
    tables = [make_scores(list(column)) for column in zip(*dice, strict=True)]

    def of(order):
        table = pd.concat([tables[place].assign(seed=place) for place in order])
        return table.sample(frac=1, random_state=order[0])

    base = make_scores([0.5] * len(dice))
    one, other = (decide(of(order), base) for order in ((0, 1, 2), (2, 0, 1)))
    assert one.gain.mean == pytest.approx(other.gain.mean, abs=1e-12)
    assert one.gain.p_greater == other.gain.p_greater


def test_verdict_says_how_often_the_test_set_was_judged_on():
    scores = make_scores(BETTER), make_scores(BASE)
    first, fourth = decide(*scores).notes[-1], decide(*scores, num_verdicts=4).notes[-1]
    assert first == f"First candidate judged on test set {TEST_SET}."
    assert fourth.startswith(f"Candidate number 4 judged on test set {TEST_SET}: with each one ")


@pytest.mark.parametrize(("num_patients", "words"), [(16, "the exact"), (17, "100,000 random")])
def test_verdict_names_its_test_and_level(num_patients, words):
    note = decide_dice([0.9] * num_patients, [0.8] * num_patients).notes[0]
    assert words in note
    assert "over patients, one-sided at 2.5 %;" in note


def test_every_criterion_states_its_number_and_limit():
    organs = ("liver", "spleen")
    champion = make_champion(two_organs(BASE, BASE), organs)
    verdict = decide(two_organs(BETTER, BETTER), two_organs(BASE, BASE), champion, organs)
    assert [criterion.name for criterion in verdict.criteria] == [
        "num_patients",
        "dice_gain",
        "failures",
        *("organ_dice/liver", "organ_loss/liver", "slice_fpr/liver"),
        *("organ_dice/spleen", "organ_loss/spleen", "slice_fpr/spleen"),
        *("champion", "champion_failures", "champion/liver", "champion/spleen"),
    ]
    upper = {"slice_fpr/liver", "slice_fpr/spleen", "failures", "champion_failures"}
    for each in verdict.criteria:
        assert math.isfinite(each.value)
        assert each.passed is True
        assert each.value <= each.limit if each.name in upper else each.value >= each.limit


def test_verdict_compares_all_three_networks():
    champion = make_champion(make_scores([0.85, 0.84, 0.83, 0.86, 0.88, 0.80]))
    verdict = decide(make_scores(BETTER), make_scores(BASE), champion)
    pairs = {(each.first, each.second) for each in verdict.comparisons}
    assert pairs == {
        ("unet3plus", "unet"),
        ("unet3plus", "champion version 7"),
        ("unet", "champion version 7"),
    }
    assert verdict.comparisons[0].gain == verdict.gain
    assert verdict.comparisons[0].p_holm > verdict.gain.p_value
