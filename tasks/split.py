"""Stage split: which patients are tested, which steer training, and which are learned from.

Test membership is a function of the patient and a salt alone, so a patient who joins later
never moves another. The rest is divided by scikit-learn, grouped by patient and stratified by
which organs a case annotates.

What is for training only, such as scans that landed in the inbox, never changes the test set: its
patients are not tested, and a later scan of a patient who is tested is not used at all.
"""

from __future__ import annotations

import hashlib
import sys

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

from fullscale.params import SplitParams
from fullscale.runtime.console import report_errors
from fullscale.runtime.errors import StageError
from fullscale.runtime.files import write_atomically
from fullscale.scans.cohort import TRAINING_ONLY
from fullscale.scans.slice_store import SliceStore
from fullscale.versioning.provenance import digest_test_set
from fullscale.workspace import parse_command

FOLDS = ("train", "val", "test")


def is_test_patient(patient: str, params: SplitParams) -> bool:
    """Whether a patient belongs to the frozen test set.

    Named test patients, where params give any, replace the hash altogether.
    """
    if params.test_patients:
        return patient in params.test_patients
    digest = hashlib.sha256(f"{params.salt}/{patient}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < params.test_fraction


def split_cases(cases: pd.DataFrame, params: SplitParams) -> pd.DataFrame:
    """Give every case a fold.

    Args:
        cases: columns case, patient, annotated (organs, ';'-separated) and perhaps training_only;
            one row per case.
        params: the section `split` of params.yaml.

    Returns:
        Columns case, patient, fold (one of train, val, test, unused), ordered by case. Unused is
        a case for training only whose patient is tested.

    Raises:
        StageError: a named test patient has no case to test, or too few patients are left to
            divide.
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
            "ingest their scans or take them off the list (scans that landed in the inbox are "
            "for training only)"
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
    """Positions in `rest` of one fold of a grouped, stratified division."""
    strata = rest["annotated"].to_numpy()
    counts = rest.groupby("annotated")["patient"].nunique()
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
    test = table[table["fold"] == "test"]
    for fold in FOLDS:
        rows = table[table["fold"] == fold]
        print(f"{fold}: {rows['patient'].nunique()} patients, {len(rows)} cases")
    print(f"test set {digest_test_set(test['case'])}")


if __name__ == "__main__":
    main()
