import re

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fullscale.params import SplitParams
from fullscale.patient_split import (
    check_split,
    fold_index,
    is_test_patient,
    split_cases,
    split_of_seed,
)
from fullscale.runtime.errors import StageError

ANNOTATIONS = ("liver;spleen", "liver", "spleen")
TESTED = [3, 4, 5, 7, 10, 11, 13, 16, 17, 19, 21, 24, 26, 28, 29, 34, 36, 38, 39, 43, 47]


def make_params(**changes):
    values = {"salt": "s", "test_fraction": 0.3, "folds": 4, "val_fold": 0}
    return SplitParams.model_validate(values | changes)


def make_cases(cohort):
    """Return a table of cases from (patient, annotated) pairs."""
    return pd.DataFrame(
        {
            "case": [f"case_{number:03d}" for number in range(len(cohort))],
            "patient": [patient for patient, _ in cohort],
            "annotated": [annotated for _, annotated in cohort],
        }
    )


cohorts = st.lists(
    st.tuples(st.integers(0, 60).map("patient_{:02d}".format), st.sampled_from(ANNOTATIONS)),
    min_size=30,
    max_size=90,
)


@settings(deadline=None, max_examples=60)
@given(cohort=cohorts, val_fold=st.integers(0, 3), salt=st.text(max_size=4))
def test_split_never_shares_patient_between_folds(cohort, val_fold, salt):
    cases, params = make_cases(cohort), make_params(val_fold=val_fold, salt=salt)
    table = split_cases(cases, params)
    assert table.groupby("patient")["fold"].nunique().max() == 1
    assert table.groupby("patient")["fold_index"].nunique(dropna=False).max() == 1
    assert sorted(table["case"]) == sorted(cases["case"])
    assert set(table["fold"]) <= {"train", "val", "test"}
    assert (table["fold_index"].isna() == (table["fold"] == "test")).all()
    assert ((table["fold_index"] == val_fold).fillna(False) == (table["fold"] == "val")).all()
    assert table["fold_index"].dropna().between(0, 3).all()


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(cohort=cohorts, later=cohorts)
def test_new_patients_never_move_another_one(cohort, later):
    params = make_params()
    after = make_cases(cohort + [(f"new_{patient}", drawn) for patient, drawn in later])
    first = split_cases(make_cases(cohort), params).set_index("case")
    second = split_cases(after, params).set_index("case")
    assert second.loc[first.index].equals(first)


def test_folds_are_of_equal_size_and_independent_of_the_test_set():
    params = make_params(test_fraction=0.45, folds=5)
    table = pd.DataFrame({"patient": [f"patient_{number}" for number in range(10000)]})
    tested = table["patient"].map(lambda patient: is_test_patient(patient, params))
    index = table["patient"].map(lambda patient: fold_index(patient, params))
    for group, num in ((tested, 4500), (~tested, 5500)):
        assert (index[group].value_counts().sort_index() / num).between(0.18, 0.22).all()


def test_largest_hash_is_in_the_last_fold(monkeypatch):
    monkeypatch.setattr("fullscale.patient_split.hmac.digest", lambda *_: b"\xff" * 32)
    assert fold_index("p", make_params(folds=7)) == 6


def test_published_test_patients_and_their_number_stay():
    """The sample's verdict is about these patients, so a later program must test the same."""
    params = make_params(salt="fullscale-2", test_fraction=0.45, folds=5)
    patients = [f"patient_{number:03d}" for number in range(1, 49)]
    tested = [int(name[-3:]) for name in patients if is_test_patient(name, params)]
    assert tested == TESTED


@given(patient=st.text(min_size=1), fraction=st.floats(0.05, 0.9))
def test_patient_stays_in_test_when_fraction_grows(patient, fraction):
    small, large = make_params(test_fraction=fraction), make_params(test_fraction=fraction + 0.05)
    assert is_test_patient(patient, large) or not is_test_patient(patient, small)


def test_share_of_test_patients_follows_fraction():
    params = make_params(test_fraction=0.3)
    chosen = sum(is_test_patient(f"patient_{number}", params) for number in range(4000))
    assert 0.27 < chosen / 4000 < 0.33


def test_salt_changes_test_set():
    patients = [f"patient_{number}" for number in range(200)]
    chosen = [
        {patient for patient in patients if is_test_patient(patient, make_params(salt=salt))}
        for salt in "ab"
    ]
    assert chosen[0] != chosen[1]


def test_named_test_patients_replace_hash():
    cases = make_cases([(f"p{number}", "liver") for number in range(20)])
    table = split_cases(cases, make_params(test_patients=["p3", "p7"]))
    assert set(table.loc[table["fold"] == "test", "patient"]) == {"p3", "p7"}


def test_split_names_test_patients_without_cases():
    cases = make_cases([(f"p{number}", "liver") for number in range(20)])
    with pytest.raises(StageError, match=r"patients who have no case: q1, q2; ingest their scans"):
        split_cases(cases, make_params(test_patients=["q2", "p3", "q1"]))


def check(cohort, seeds=(0,), **changes):
    check_split(make_cases(cohort), make_params(**changes), ("liver", "spleen"), seeds)


def cure_of(cohort, seeds=(0,), **changes):
    """Return the settings that the message names; check that they are a cure."""
    with pytest.raises(StageError) as error:
        check(cohort, seeds, **changes)
    text = str(error.value)
    found = dict(re.findall(r"split\.(\w+): (\S+?)(?:,|\s|$)", text.rpartition("; ")[2]))
    cure = {key: value if key == "salt" else int(value) for key, value in found.items()}
    check(cohort, seeds, **(changes | cure))
    return text, cure


def by_fold(folds, **changes):
    """Return a name of a patient outside the test set for each fold."""
    params = make_params(folds=folds, **changes)
    names = {}
    for number in range(1000):
        name = f"p{number}"
        if not is_test_patient(name, params):
            names.setdefault(fold_index(name, params), name)
    return [names[fold] for fold in range(folds)]


@settings(deadline=None, max_examples=30)
@given(cohort=cohorts, val_fold=st.integers(0, 3))
def test_each_patient_outside_the_test_set_validates_once_in_a_cross_validation(cohort, val_fold):
    params = make_params(val_fold=val_fold, rotate=True)
    table = split_cases(make_cases(cohort), params)
    splits = [split_of_seed(table, params, seed) for seed in range(params.folds)]
    for split in splits:
        assert set(split["fold"]) <= {"train", "val", "test"}
        assert split[split["fold"] == "test"].equals(table[table["fold"] == "test"])
        pd.testing.assert_frame_equal(split.drop(columns="fold"), table.drop(columns="fold"))
    validated = [case for split in splits for case in split.loc[split["fold"] == "val", "case"]]
    assert sorted(validated) == sorted(table.loc[table["fold"] != "test", "case"])
    assert split_of_seed(table, params, params.folds).equals(splits[0])


def test_without_cross_validation_every_seed_has_the_same_split():
    params = make_params(val_fold=2)
    table = split_cases(make_cases([(f"p{number}", "liver") for number in range(30)]), params)
    assert all(split_of_seed(table, params, seed).equals(table) for seed in range(5))


def test_gap_of_a_later_fold_of_a_cross_validation_is_named_with_a_cure():
    a, b, c, d = by_fold(4, test_patients=["t"])
    both = "liver;spleen"
    cohort = [("t", both), (a, both), (b, both), (c, "liver"), (d, both)]
    check(cohort, test_patients=["t"])
    check(cohort, (0, 1), test_patients=["t"], rotate=True)
    text, cure = cure_of(cohort, (0, 1, 2), test_patients=["t"], rotate=True)
    assert "validation on fold 2 there is no validation patient in whom spleen is annotated" in text
    assert "val_fold" not in cure or "folds" in cure


def test_missing_organ_of_the_validation_fold_names_another_fold():
    a, b, c, d = by_fold(4, test_patients=["t"])
    both = "liver;spleen"
    cohort = [("t", both), (a, "liver"), (b, "spleen"), (c, both), (d, both)]
    text, cure = cure_of(cohort, test_patients=["t"])
    assert "no validation patient in whom spleen is annotated" in text
    assert "(patients: 3 train, 1 val, 1 test)" in text
    assert cure == {"val_fold": 2}


def test_empty_validation_fold_names_another_fold():
    a, b, _, d = by_fold(4, test_patients=["t"])
    both = "liver;spleen"
    cohort = [("t", both), (a, both), (b, "spleen"), (d, "liver")]
    text, cure = cure_of(cohort, test_patients=["t"], val_fold=2)
    assert "no validation patient (" in text
    assert cure == {"val_fold": 0}


def test_organ_that_training_lacks_is_named():
    a, b, c, _ = by_fold(4, test_patients=["t"])
    both = "liver;spleen"
    cohort = [("t", both), (a, both), (b, "liver"), (c, "liver")]
    with pytest.raises(StageError, match=r"no training patient in whom spleen is annotated"):
        check(cohort, test_patients=["t"])


def test_cohort_that_no_fold_fits_is_told_fewer_folds_or_another_salt():
    both = "liver;spleen"
    num_by_folds = {}
    for number in range(40):
        cohort = [(f"{number}_{each}", both) for each in range(6)]
        try:
            check(cohort, folds=4, test_fraction=0.5)
        except StageError:
            text, cure = cure_of(cohort, folds=4, test_fraction=0.5)
            key = "salt" if "salt" in cure else "folds" if "folds" in cure else "val_fold"
            num_by_folds[key] = num_by_folds.get(key, 0) + 1
            assert ("also chooses other test patients" in text) == (key == "salt")
    assert set(num_by_folds) == {"val_fold", "salt"}


def test_cohort_without_a_cure_is_told_to_add_scans():
    cohort = [("p0", "liver;spleen"), *((f"p{number}", "liver") for number in range(1, 9))]
    with pytest.raises(StageError, match=r"in whom spleen is annotated .*; add scans: no other"):
        check(cohort, test_patients=["p0"], folds=2)


def test_split_without_a_test_patient_is_refused():
    with pytest.raises(StageError, match=r"there is no test patient .*split\.salt: s-\d+, which"):
        check([(f"p{number}", "liver;spleen") for number in range(9)], test_fraction=0.001)


def test_split_ignores_order_of_cases():
    cases = make_cases([(f"p{number % 17}", "liver") for number in range(40)])
    shuffled = cases.sample(frac=1, random_state=3)
    assert split_cases(cases, make_params()).equals(split_cases(shuffled, make_params()))


def landed(cohort):
    """Return a table like `make_cases`, of cases from the inbox."""
    table = make_cases(cohort).assign(training_only=True)
    table["case"] = "landed_" + table["case"]
    return table


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(cohort=cohorts, later=cohorts)
def test_landed_cases_leave_the_test_set_as_it_is(cohort, later):
    """Draw cases from the inbox: of known patients, and of new ones with any name."""
    params = make_params()
    before = make_cases(cohort)
    new = landed(later + [(f"new_{patient}", drawn) for patient, drawn in later])
    after = pd.concat([before.assign(training_only=False), new])
    first = split_cases(before, params)
    second = split_cases(after, params)
    is_test = second["fold"] == "test"
    assert list(second.loc[is_test, "case"]) == list(first.loc[first["fold"] == "test", "case"])
    tested = set(second.loc[is_test, "patient"])
    learned = set(second.loc[second["fold"].isin(["train", "val"]), "patient"])
    assert not tested & learned
    unused = second[second["fold"] == "unused"]
    assert set(unused["case"]) == set(new.loc[new["patient"].isin(tested), "case"])


def test_column_that_keeps_nobody_out_changes_nothing():
    cases = make_cases([(f"p{number}", "liver") for number in range(20)])
    same = split_cases(cases.assign(training_only=False), make_params())
    assert split_cases(cases, make_params()).equals(same)


def test_named_test_patient_with_cases_for_training_only_is_refused():
    cases = pd.concat(
        [make_cases([(f"p{number}", "liver") for number in range(20)]), landed([("q", "liver")])]
    ).fillna({"training_only": False})
    with pytest.raises(StageError, match=r"have no case: q; .*inbox are for training only"):
        split_cases(cases, make_params(test_patients=["p3", "q"]))
