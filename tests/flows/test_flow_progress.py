from __future__ import annotations

import subprocess
import sys

import pytest
from project import ROOT

from flows.progress import EPOCH, artifact_key
from fullscale.runtime.progress import TrainingDisplay

METRICS = {"val/dice": 0.5, "train/total": 1.0, "slices/organ": 9.0, "slices/organ_free": 3.0}


def test_line_of_an_epoch_is_the_trainers_own(capsys) -> None:
    with TrainingDisplay("unet3plus", num_epochs=12, num_steps=5, done_steps=0) as display:
        display.epoch({"epoch": 3.0, **METRICS}, improved=True)
    found = EPOCH.match(capsys.readouterr().out)
    assert found is not None
    assert found.groupdict() == {"network": "unet3plus", "epoch": "3", "num_epochs": "12"}


@pytest.mark.parametrize(
    "line", ["unet: stopped in epoch 3 after step 4; run again", "unet epoch three", "epoch 1/2: "]
)
def test_other_lines_tell_of_no_epoch(line: str) -> None:
    assert EPOCH.match(line) is None


@pytest.mark.parametrize(
    ("name", "key"),
    [("training-unet3plus", "training-unet3plus"), ("training-My_UNet++", "training-my-unet")],
)
def test_artifact_key_has_what_prefect_allows(name: str, key: str) -> None:
    assert artifact_key(name) == key


@pytest.mark.parametrize("flow", ["watch_inbox", "promote_check"])
def test_flow_that_looks_every_few_minutes_imports_nothing_heavy(flow: str) -> None:
    heavy = ("torch", "mlflow", "dvc", "pandas", "matplotlib", "sklearn")
    script = f"import sys, flows.{flow}; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
