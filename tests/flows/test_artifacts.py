from __future__ import annotations

import pandas as pd

from flows.artifacts import fold_rows
from flows.devices import VISIBLE, list_gpus


def test_folds_name_every_patient_once() -> None:
    split = pd.DataFrame(
        [
            ("a1", "anna", "train"),
            ("a2", "anna", "train"),
            ("b", "bert", "test"),
            ("b2", "bert", "unused"),
            ("c", "carl", "train"),
        ],
        columns=["case", "patient", "fold"],
    )
    assert fold_rows(split) == [
        {"fold": "train", "num_patients": 2, "num_cases": 3, "patients": "anna, carl"},
        {"fold": "test", "num_patients": 1, "num_cases": 1, "patients": "bert"},
        {"fold": "unused", "num_patients": 1, "num_cases": 1, "patients": "bert"},
    ]


def test_gpus_are_those_the_environment_leaves() -> None:
    assert list_gpus({VISIBLE: "2,GPU-5e"}) == ["2", "GPU-5e"]
    assert list_gpus({VISIBLE: ""}) == []
