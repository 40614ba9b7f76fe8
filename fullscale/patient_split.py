"""The patients of the training, validation and test sets, chosen by hashes of their names.

Two independent hashes of the patient, both with the same salt, decide: one whether the patient is
tested, the other the fold of everybody else. So adding a patient never moves another one, in any
set. One fold validates, the others train; with `split.rotate` it is another one for each seed.

Cases for training only, such as scans from the inbox, never change the test set: they do not make
their patient a test patient, and those of a test patient are not used at all.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fullscale.params import SplitParams
from fullscale.runtime.errors import StageError
from fullscale.scans.cohort import TRAINING_ONLY

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


def split_of_seed(table: pd.DataFrame, params: SplitParams, seed: int) -> pd.DataFrame:
    """Return the split of one training.

    Args:
        table: as `split_cases` returns it.
        params: the section `split` of params.yaml.
        seed: of the training; with `params.rotate` it decides which fold validates.

    Returns:
        The table, with the column fold of training and validation cases changed.
    """
    validates = table["fold_index"] == params.validation_fold(seed)
    is_used = table["fold"].isin(["train", "val"])
    fold = np.where(validates.fillna(False).to_numpy(dtype=bool), "val", "train")
    return table.assign(fold=table["fold"].where(~is_used, fold))


def read_split(path: Path) -> pd.DataFrame:
    """Return the table that stage split wrote, as `split_cases` makes it."""
    types: dict[Hashable, Any] = {"case": str, "patient": str, "fold_index": "Int64"}
    return pd.read_csv(path, dtype=types)


def cases_of(split: pd.DataFrame, fold: str) -> list[str]:
    """Return the cases of a fold.

    Raises:
        StageError: the fold is empty.
    """
    cases: list[str] = split.loc[split["fold"] == fold, "case"].tolist()
    if not cases:
        raise StageError(f"the split holds no {fold} cases; add scans or change section split")
    return cases


def check_split(
    cases: pd.DataFrame, params: SplitParams, organs: Sequence[str], seeds: Sequence[int] = (0,)
) -> None:
    """Check that no set is empty, and that training and validation have every organ.

    A hash cannot stratify, so a small cohort may need another fold or another salt.

    Args:
        cases: one row per case; columns case, patient, annotated (organs, ';'-separated), and
            optionally training_only (bool).
        params: the section `split` of params.yaml.
        organs: the organs of params.yaml.
        seeds: of the trainings, each of which has a validation fold.

    Raises:
        StageError: something is missing; the message names settings that do not lack it.
    """
    found = _find_training_gap(cases, params, organs, seeds)
    if found is None:
        return
    gap, val_fold, table = found
    numbers = ", ".join(f"{count_patients(table, fold)} {fold}" for fold in FOLDS)
    raise StageError(
        f"with split.salt {params.salt}, split.folds {params.folds} and validation on fold "
        f"{val_fold} there is no {gap} (patients: {numbers}); wanted a patient to test, and "
        f"{', '.join(organs)} in training and in validation; "
        f"{_find_cure(cases, params, organs, seeds)}"
    )


def count_patients(table: pd.DataFrame, fold: str) -> int:
    """Return the number of patients of a set."""
    return int(table.loc[table["fold"] == fold, "patient"].nunique())


def _find_training_gap(
    cases: pd.DataFrame, params: SplitParams, organs: Sequence[str], seeds: Sequence[int]
) -> tuple[str, int, pd.DataFrame] | None:
    """Return what the split of a training lacks, its validation fold and the split, or None."""
    table = split_cases(cases, params)
    for seed in {params.validation_fold(seed): seed for seed in seeds}.values():
        split = split_of_seed(table, params, seed)
        gap = find_gap(split, cases, organs)
        if gap is not None:
            return gap, params.validation_fold(seed), split
    return None


def find_gap(table: pd.DataFrame, cases: pd.DataFrame, organs: Sequence[str]) -> str | None:
    """Return what a split lacks, in words, or None.

    Args:
        table: as `split_cases` returns it.
        cases: the cases of the split, as `check_split` takes them.
        organs: the organs of params.yaml.
    """
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


def _find_cure(
    cases: pd.DataFrame, params: SplitParams, organs: Sequence[str], seeds: Sequence[int]
) -> str:
    """Return the smallest change of the settings that leaves nothing missing, in words."""
    for changes, words in _changes(params):
        if _find_training_gap(cases, params.model_copy(update=changes), organs, seeds) is None:
            return f"try {words}"
    return "add scans: no other fold, no smaller number of folds and no salt tried has all of this"


def _changes(params: SplitParams) -> Iterator[tuple[dict[str, int | str], str]]:
    if not params.rotate:  # else every fold validates
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
