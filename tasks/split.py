"""Stage split: assign every case to the training, validation or test set.

Membership in the test set is a function of the patient and a salt alone, so adding a patient never
moves another one. scikit-learn splits the other patients into training and validation, grouped by
patient and stratified by the organs that a case annotates.

Cases for training only, such as scans from the inbox, never change the test set: they do not make
their patient a test patient, and those of a test patient are not used at all.
"""

from __future__ import annotations

import hashlib
import sys

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


def is_test_patient(patient: str, params: SplitParams) -> bool:
    """Return True if a patient belongs to the test set.

    Test patients named in params, if any, replace the hash.
    """
    if params.test_patients:
        return patient in params.test_patients
    # The first 64 bits of the hash, as a number in [0, 1), are uniform over patients.
    digest = hashlib.sha256(f"{params.salt}/{patient}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < params.test_fraction


def split_cases(cases: pd.DataFrame, params: SplitParams) -> pd.DataFrame:
    """Assign every case to a fold.

    Args:
        cases: one row per case; columns case, patient, annotated (organs, ';'-separated), and
            optionally training_only (bool).
        params: the section `split` of params.yaml.

    Returns:
        Columns case, patient, fold (train, val, test or unused), sorted by case. A case for
        training only whose patient is a test patient is unused.

    Raises:
        StageError: a named test patient has no case to test, or there are too few patients.
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
    is_test = is_tested & may_test
    rest = cases[~is_tested]
    num_folds = max(2, round(1 / params.val_fraction))
    num_patients = rest["patient"].nunique()
    if num_patients < num_folds or not is_test.any():
        raise StageError(
            f"{cases['patient'].nunique()} patients give {cases[is_test]['patient'].nunique()} "
            f"for testing and {num_patients} for training and validation; wanted at least 1 and "
            f"{num_folds}: add scans, or change split.test_fraction or split.val_fraction"
        )
    fold = np.select([is_test, is_tested], ["test", "unused"], "train").astype(object)
    fold[rest.index[_validation_rows(rest, num_folds, params.seed)]] = "val"
    return pd.DataFrame({"case": cases["case"], "patient": cases["patient"], "fold": fold})


def _validation_rows(rest: pd.DataFrame, num_folds: int, seed: int) -> np.ndarray:
    """Return the positions in `rest` of one fold of a grouped and stratified K-fold split."""
    # Imported here: it takes a second, and most importers of this module do not split.
    from sklearn.model_selection import StratifiedGroupKFold

    strata = rest["annotated"].to_numpy()
    counts = rest.groupby("annotated")["patient"].nunique()
    # scikit-learn needs at least num_folds members in every stratum.
    rare = set(counts[counts < num_folds].index)
    strata = np.array(["rare" if stratum in rare else stratum for stratum in strata])
    if (pd.Series(strata).value_counts() < num_folds).any():
        strata = np.full(len(rest), "all")
    folds = StratifiedGroupKFold(n_splits=num_folds, shuffle=True, random_state=seed)
    _, validation = next(folds.split(rest, strata, groups=rest["patient"]))
    return np.asarray(validation)


@report_errors
def main() -> None:
    """Run the stage: artifacts/slices -> artifacts/split.csv."""
    workspace = parse_command("split", sys.argv[1:])
    store = SliceStore(workspace.slices)
    table = split_cases(store.cases, workspace.load_params().split)
    write_atomically(workspace.split, table.to_csv(index=False))
    for fold in FOLDS:
        rows = table[table["fold"] == fold]
        print(f"{fold}: {rows['patient'].nunique()} patients, {len(rows)} cases")


if __name__ == "__main__":
    main()
