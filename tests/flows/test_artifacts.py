from __future__ import annotations

import pandas as pd
import pytest

from flows.artifacts import fold_rows
from flows.devices import VISIBLE, list_gpus
from flows.stages import is_transient
from fullscale.tracking.errors import UnreachableError


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


@pytest.mark.parametrize(
    "line",
    [
        f"error: {UnreachableError('http://127.0.0.1:5000', 'Connection refused')}",
        "mlflow.exceptions.MlflowException: API request to http://m/api failed with exception HTTP",
        "mlflow.exceptions.MlflowException: API request to endpoint /api/2.0/x failed with error "
        "code 503 != 200. Response body: ''",
    ],
)
def test_server_that_is_away_is_transient(line: str) -> None:
    assert is_transient(["unet epoch 1/2: loss 1.0", line, "ERROR: failed to reproduce 'train'"])


@pytest.mark.parametrize(
    "line",
    [
        "error: params.yaml: slice.colour: unknown key; remove it or correct its spelling",
        "MLflow at http://m does not answer (refused); training goes on, metrics are kept",
        "mlflow.exceptions.MlflowException: API request to endpoint /x failed with error code 403",
        "ERROR: failed to reproduce 'train@unet': No space left on device",
    ],
)
def test_other_failures_are_not_transient(line: str) -> None:
    assert not is_transient([line])


def test_gpus_are_those_the_environment_leaves() -> None:
    assert list_gpus({VISIBLE: "2,GPU-5e"}) == ["2", "GPU-5e"]
    assert list_gpus({VISIBLE: ""}) == []
