import pandas as pd
import pytest
from project import ROOT

from fullscale.params import SplitParams, load_params
from fullscale.patient_split import split_cases
from fullscale.planning.split_rules import choose_split, resolved_margin

ORGANS = ("liver", "spleen")
REGISTER = load_params(ROOT / "params.yaml").register_


def cohort(num_patients, annotated="liver;spleen"):
    names = [f"patient_{place:03d}" for place in range(num_patients)]
    return pd.DataFrame(
        {"case": names, "patient": names, "annotated": annotated, "training_only": False}
    )


def settings(**changes):
    return SplitParams(**{"salt": "s", "test_fraction": 0.45, "folds": 5, "val_fold": 0, **changes})


@pytest.mark.parametrize("num_patients", [20, 30, 60, 300])
def test_test_set_holds_the_patients_that_a_verdict_needs(num_patients):
    cases = cohort(num_patients)
    choice = choose_split(cases, ORGANS, settings(), 6)
    assert choice.gap is None
    assert choice.num_test >= 6
    assert choice.num_test == (choice.table["fold"] == "test").sum()
    if num_patients >= 60:
        assert choice.params.test_fraction == 0.2
        assert choice.params.folds == 5
    pd.testing.assert_frame_equal(choice.table, split_cases(cases, choice.params))


def test_present_test_set_is_kept_where_it_is_large_enough():
    choice = choose_split(cohort(60), ORGANS, settings(test_fraction=0.31), 6)
    assert choice.params.test_fraction == 0.31
    choice = choose_split(cohort(8), ORGANS, settings(test_fraction=0.31), 6)
    assert choice.num_test < 6


def test_the_rarest_organ_counts():
    cases = cohort(60)
    cases.loc[cases.index % 3 > 0, "annotated"] = "liver"
    choice = choose_split(cases, ORGANS, settings(), 6)
    tested = choice.table.loc[choice.table["fold"] == "test", "case"]
    has_spleen = cases.set_index("case").loc[tested, "annotated"].str.contains("spleen")
    assert choice.num_test == has_spleen.sum() >= 8


def test_few_patients_have_fewer_folds_and_no_verdict():
    choice = choose_split(cohort(7), ORGANS, settings(), 6)
    assert choice.gap is None
    assert choice.params.folds < 5
    assert 1 <= choice.num_test < 6


def test_keys_of_the_user_stay():
    mine = settings(test_fraction=0.5, folds=3, val_fold=2)
    choice = choose_split(cohort(60), ORGANS, mine, 6, {"test_fraction", "folds", "val_fold"})
    assert choice.params == mine


@pytest.mark.parametrize("num_patients", [1, 2])
def test_split_that_cannot_be_made_says_what_it_lacks_and_trains_on_all(num_patients):
    choice = choose_split(cohort(num_patients), ORGANS, settings(), 6)
    assert choice.gap is not None
    assert choice.params == settings()
    assert set(choice.table["fold"]) == {"train"}


def test_organ_of_one_patient_leaves_no_split():
    cases = cohort(30)
    cases.loc[1:, "annotated"] = "liver"
    assert choose_split(cases, ORGANS, settings(), 6).gap.endswith("spleen is annotated")


@pytest.mark.parametrize(("salt", "chosen"), [("a", "a-2"), ("c", "c")])
def test_few_patients_get_another_salt_where_the_present_one_leaves_a_set_empty(salt, chosen):
    choice = choose_split(cohort(3), ORGANS, settings(salt=salt), 6)
    assert (choice.gap, choice.params.salt) == (None, chosen)
    assert sorted(choice.table["fold"]) == ["test", "train", "val"]


def test_salt_of_the_user_stays():
    assert choose_split(cohort(3), ORGANS, settings(salt="a"), 6, {"salt"}).gap is not None


@pytest.mark.parametrize(
    ("num_test", "margin"), [(2, None), (5, None), (6, 0.025), (7, 0.02), (21, 0.01), (100, 0.005)]
)
def test_margin_that_patients_can_resolve(num_test, margin):
    assert resolved_margin(num_test, REGISTER) == margin
