import subprocess
import sys

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fullscale.params import SplitParams
from fullscale.runtime.errors import StageError
from tasks.split import is_test_patient, split_cases

ANNOTATIONS = ("liver;spleen", "liver", "spleen")


def make_params(**changes):
    values = {"salt": "s", "test_fraction": 0.3, "val_fraction": 0.25, "seed": 0}
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


def divisible(cases, params):
    is_test = cases["patient"].map(lambda patient: is_test_patient(patient, params))
    return is_test.any() and cases.loc[~is_test, "patient"].nunique() >= 4


@settings(deadline=None, max_examples=60)
@given(cohort=cohorts, seed=st.integers(0, 5), salt=st.text(max_size=4))
def test_split_never_shares_patient_between_folds(cohort, seed, salt):
    cases, params = make_cases(cohort), make_params(seed=seed, salt=salt)
    if not divisible(cases, params):
        return
    table = split_cases(cases, params)
    assert table.groupby("patient")["fold"].nunique().max() == 1
    assert sorted(table["case"]) == sorted(cases["case"])
    assert set(table["fold"]) == {"train", "val", "test"}


@settings(deadline=None, max_examples=60)
@given(cohort=cohorts, later=cohorts)
def test_split_keeps_test_set_when_patients_are_added(cohort, later):
    params = make_params()
    before = make_cases(cohort)
    after = make_cases(cohort + [(f"new_{patient}", drawn) for patient, drawn in later])
    if not divisible(before, params):
        return
    first = split_cases(before, params).set_index("case")["fold"]
    second = split_cases(after, params).set_index("case")["fold"]
    was_test = first == "test"
    assert (second[first.index][was_test] == "test").all()
    assert (second[first.index][~was_test] != "test").all()


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


def test_split_refuses_too_few_patients():
    cases = make_cases([(f"p{number}", "liver") for number in range(3)])
    with pytest.raises(StageError, match=r"3 patients give 1 .* and 2 .*wanted at least 1 and 4"):
        split_cases(cases, make_params(test_patients=["p0"]))


def test_validation_holds_every_common_annotation():
    cohort = [(f"p{number:02d}", ANNOTATIONS[number % 3]) for number in range(60)]
    table = split_cases(make_cases(cohort), make_params()).merge(make_cases(cohort))
    assert set(table.loc[table["fold"] == "val", "annotated"]) == set(ANNOTATIONS)


def test_split_ignores_order_of_cases():
    cases = make_cases([(f"p{number % 17}", "liver") for number in range(40)])
    shuffled = cases.sample(frac=1, random_state=3)
    assert split_cases(cases, make_params()).equals(split_cases(shuffled, make_params()))


def landed(cohort):
    """Return a table like `make_cases`, of cases from the inbox."""
    table = make_cases(cohort).assign(training_only=True)
    table["case"] = "landed_" + table["case"]
    return table


@settings(deadline=None, max_examples=60)
@given(cohort=cohorts, later=cohorts)
def test_landed_cases_leave_the_test_set_as_it_is(cohort, later):
    """Draw cases from the inbox: of known patients, and of new ones with any name."""
    params = make_params()
    before = make_cases(cohort)
    if not divisible(before, params):
        return
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


@pytest.mark.parametrize("stage", ["slice", "split"])
def test_stage_starts_without_slow_libraries(stage):
    code = f"import sys, tasks.{stage}; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert f"tasks.{stage}" in loaded
    assert not {"torch", "sklearn", "scipy.ndimage", "matplotlib", "mlflow"} & set(loaded)
