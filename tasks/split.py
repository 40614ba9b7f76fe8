"""Stage split: assign every case to the training, validation or test set.

Two independent hashes of the patient, both with the same salt, decide: one whether the patient is
tested, the other the fold of everybody else. So adding a patient never moves another one, in any
set. One fold validates, the others train.

Cases for training only, such as scans from the inbox, never change the test set: they do not make
their patient a test patient, and those of a test patient are not used at all.
"""

from __future__ import annotations

import hashlib
import hmac
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from fullscale.params import SplitParams
from fullscale.runtime.console import report_errors
from fullscale.runtime.errors import StageError
from fullscale.runtime.files import write_atomically
from fullscale.scans.cohort import TRAINING_ONLY
from fullscale.scans.slice_store import SliceStore
from fullscale.workspace import parse_command

FOLDS = ("train", "val", "test")
NUM_SALTS = 200
"""Other salts that are tried to name a cure."""


def is_test_patient(patient: str, params: SplitParams) -> bool:
    """Return True if a patient belongs to the test set.

    Test patients named in params, if any, replace the hash.
    """
    if params.test_patients:
        return patient in params.test_patients
    # The first 64 bits of the hash, as a number in [0, 1), are uniform over patients.
    digest = hashlib.sha256(f"{params.salt}/{patient}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < params.test_fraction


def fold_index(patient: str, params: SplitParams) -> int:
    """Return the fold of a patient outside the test set, 0 to `params.folds` - 1.

    HMAC is another hash than that of `is_test_patient`: with the same one, the patients who are
    not tested would have its upper values only, and the lower folds would be empty.
    """
    digest = hmac.digest(params.salt.encode(), patient.encode(), "sha256")
    # In whole numbers, because the largest hash divided by 2^64 rounds to 1.
    return int.from_bytes(digest[:8], "big") * params.folds >> 64


def split_cases(cases: pd.DataFrame, params: SplitParams) -> pd.DataFrame:
    """Assign every case to a set.

    Args:
        cases: one row per case; columns case, patient, and optionally training_only (bool).
        params: the section `split` of params.yaml.

    Returns:
        Columns case, patient, fold_index (from 0; missing outside training and validation), fold
        (train, val, test or unused), sorted by case. A case for training only whose patient is a
        test patient is unused. A set may be empty; see `check_split`.

    Raises:
        StageError: a named test patient has no case to test.
    """
    cases = cases.sort_values("case", ignore_index=True)
    may_test = np.ones(len(cases), dtype=bool)
    if TRAINING_ONLY in cases:
        may_test = ~cases[TRAINING_ONLY].to_numpy(dtype=bool)
    testable = cases.loc[may_test, "patient"]
    missing = sorted(set(params.test_patients) - set(testable))
    if missing:
        raise StageError(
            f"split.test_patients names patients who have no case: {', '.join(missing)}; "
            "ingest their scans or remove them from the list (scans from the inbox are for "
            "training only)"
        )
    test_patients = {patient for patient in testable if is_test_patient(patient, params)}
    is_tested = cases["patient"].isin(test_patients).to_numpy()
    index = cases["patient"].map(lambda patient: fold_index(patient, params)).astype("Int64")
    index = index.mask(is_tested)
    validates = (index == params.val_fold).fillna(False).to_numpy(dtype=bool)
    fold = np.select(
        [is_tested & may_test, is_tested, validates], ["test", "unused", "val"], "train"
    )
    columns = {"case": cases["case"], "patient": cases["patient"], "fold_index": index}
    return pd.DataFrame({**columns, "fold": fold})


def check_split(
    table: pd.DataFrame, cases: pd.DataFrame, params: SplitParams, organs: Sequence[str]
) -> None:
    """Check that no set is empty, and that training and validation have every organ.

    A hash cannot stratify, so a small cohort may need another fold or another salt.

    Args:
        table: as `split_cases` returns it.
        cases: one row per case; columns case, patient, annotated (organs, ';'-separated), and
            optionally training_only (bool).
        params: the section `split` of params.yaml.
        organs: the organs of params.yaml.

    Raises:
        StageError: something is missing; the message names settings that do not lack it.
    """
    gap = _find_gap(table, cases, organs)
    if gap is None:
        return
    numbers = ", ".join(f"{count_patients(table, fold)} {fold}" for fold in FOLDS)
    raise StageError(
        f"with split.salt {params.salt}, split.folds {params.folds} and split.val_fold "
        f"{params.val_fold} there is no {gap} (patients: {numbers}); wanted a patient to test, and "
        f"{', '.join(organs)} in training and in validation; {_find_cure(cases, params, organs)}"
    )


def count_patients(table: pd.DataFrame, fold: str) -> int:
    """Return the number of patients of a set."""
    return int(table.loc[table["fold"] == fold, "patient"].nunique())


def _find_gap(table: pd.DataFrame, cases: pd.DataFrame, organs: Sequence[str]) -> str | None:
    """Return what is missing, or None."""
    if not count_patients(table, "test"):
        return "test patient"
    annotated = cases.set_index("case")["annotated"]
    for fold, word in (("val", "validation"), ("train", "training")):
        names = annotated[table.loc[table["fold"] == fold, "case"]]
        if names.empty:
            return f"{word} patient"
        drawn = {organ for text in names for organ in text.split(";")}
        missing = [organ for organ in organs if organ not in drawn]
        if missing:
            return f"{word} patient in whom {' or '.join(missing)} is annotated"
    return None


def _find_cure(cases: pd.DataFrame, params: SplitParams, organs: Sequence[str]) -> str:
    """Return the smallest change of the settings that leaves nothing missing, in words."""
    for changes, words in _changes(params):
        changed = params.model_copy(update=changes)
        if _find_gap(split_cases(cases, changed), cases, organs) is None:
            return f"try {words}"
    return "add scans: no other fold, no smaller number of folds and no salt tried has all of this"


def _changes(params: SplitParams) -> Iterator[tuple[dict[str, int | str], str]]:
    for val_fold in range(params.folds):
        yield {"val_fold": val_fold}, f"split.val_fold: {val_fold}"
    for folds in range(params.folds - 1, 1, -1):
        for val_fold in range(folds):
            words = f"split.folds: {folds} and split.val_fold: {val_fold}"
            yield {"folds": folds, "val_fold": val_fold}, words
    tested = "" if params.test_patients else ", which also chooses other test patients"
    for number in range(2, NUM_SALTS + 2):
        salt = f"{params.salt}-{number}"
        yield {"salt": salt}, f"split.salt: {salt}{tested}"


@report_errors
def main() -> None:
    """Run the stage: artifacts/slices -> artifacts/split.csv."""
    workspace = parse_command("split", sys.argv[1:])
    store = SliceStore(workspace.slices)
    params = workspace.load_params().split
    table = split_cases(store.cases, params)
    check_split(table, store.cases, params, store.organs)
    write_atomically(workspace.split, table.to_csv(index=False))
    for fold in FOLDS:
        print(
            f"{fold}: {count_patients(table, fold)} patients, {(table['fold'] == fold).sum()} cases"
        )


if __name__ == "__main__":
    main()
