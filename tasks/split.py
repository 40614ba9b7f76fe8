"""Stage split: assign every case to the training, validation or test set."""

from __future__ import annotations

import sys

from fullscale.patient_split import FOLDS, check_split, count_patients, split_cases
from fullscale.runtime.console import report_errors
from fullscale.runtime.files import write_atomically
from fullscale.scans.slice_store import SliceStore
from fullscale.workspace import parse_command


@report_errors
def main() -> None:
    """Run the stage: artifacts/slices -> artifacts/split.csv."""
    workspace = parse_command("split", sys.argv[1:])
    store = SliceStore(workspace.slices)
    params = workspace.load_params()
    check_split(store.cases, params.split, store.organs, params.seeds)
    table = split_cases(store.cases, params.split)
    write_atomically(workspace.split, table.to_csv(index=False))
    for fold in FOLDS:
        print(
            f"{fold}: {count_patients(table, fold)} patients, {(table['fold'] == fold).sum()} cases"
        )


if __name__ == "__main__":
    main()
