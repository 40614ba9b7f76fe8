from __future__ import annotations

import subprocess
import sys

import pytest
from project import ROOT

from flows.progress import artifact_key


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
