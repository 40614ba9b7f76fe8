"""What a program loads before its first line of work, counted in modules: start-up time."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from project import ROOT

pytestmark = pytest.mark.slow

# Each of these takes 0.2 to 2 s to import; what a program needs later, it imports then.
HEAVY = {
    "torch", "torch._dynamo", "lightning_fabric", "kornia", "mlflow", "prefect", "dvc", "sklearn",
    "scipy.ndimage", "pandas", "matplotlib", "highdicom", "onnx", "onnxruntime", "fastapi",
    "sqlalchemy", "dask", "nibabel",
}  # fmt: skip
ALLOWED = {
    "tasks.cli": set(),
    "tasks.slice": {"pandas", "nibabel"},
    "tasks.split": {"pandas"},
    "tasks.train": {"torch", "pandas"},
    "tasks.evaluate, tasks.register": {"torch", "pandas", "scipy.ndimage", "nibabel"},
    "tasks.report": {"pandas", "scipy.ndimage", "nibabel", "matplotlib"},
    "tasks.receive": {"scipy.ndimage", "nibabel"},
    "flows.watch_inbox": {"prefect", "scipy.ndimage", "nibabel"},
    "flows.promote_check, flows.reproduce, flows.retrain, flows.servers.deployments": {"prefect"},
}
"""The heavy modules that importing modules may load."""


@pytest.mark.parametrize("modules", ALLOWED)
def test_modules_load_no_more_than_their_budget(modules):
    code = f"import sys, json, {modules}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert HEAVY & set(json.loads(done.stdout)) <= ALLOWED[modules]


TRAIN = """
import sys
from tasks.train import main
sys.argv = ["train", "unet", "0"]
main()
print(*sys.modules)
"""


def test_training_does_not_load_the_compiler(reproduced_project):
    loaded = reproduced_project.run("python", "-c", TRAIN).split()
    assert "tasks.train" in loaded
    assert "lightning_fabric" in loaded
    assert not [name for name in loaded if name.startswith(("torch._dynamo", "sympy"))]
