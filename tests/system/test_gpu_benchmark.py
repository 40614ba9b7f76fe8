"""The GPU kit: it runs to its end on a CPU, and a part that fails ends no other."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from project import ROOT

from benchmarks.gpu import __main__ as kit
from benchmarks.gpu.settings import Settings


@pytest.mark.slow
def test_kit_measures_every_part_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--device", "cpu", "--quick"],
        cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in kit.PARTS}
    failed = [
        (part, measure, value["error"])
        for part, results in found.items()
        for measure, value in results.items()
        if isinstance(value, dict) and "error" in value
    ]
    assert failed == []
    assert set(found["agreement"]["unet3plus, float32"].values()) == {0}
    assert found["agreement"]["masks of a scan"]["different_voxels_fp32"] == 0
    training = found["training"]
    assert training["resumed in the middle of an epoch"] == {"largest difference": 0}
    assert training["out of memory"].startswith("memory ran out with train.batch_size 2")
    assert training["one process with ddp"]["relative difference of the loss"] < 1e-6
    assert training["determinism"]["free: largest difference"] == 0
    assert found["pipeline"].keys() == {"slice", "whole part"}
    summary = (tmp_path / "summary.md").read_text()
    assert "| scan | file to file, s |" in summary
    assert "| UNet3P on one A100, training | 26 images/s |" in summary


def test_part_that_fails_or_takes_too_long_writes_its_error_and_the_next_one_runs(
    tmp_path, monkeypatch, capfd
):
    def fail(settings, report):
        report.add("first", 1.0)
        raise ValueError("no such kernel")

    def wait(settings, report):
        report.add("first", 2.0)
        time.sleep(60)

    def work(settings, report):
        report.measure("bad", lambda: 1 / 0)
        report.measure("good", lambda: 3.0)

    for name, function in {"fails": fail, "waits": wait, "works": work}.items():
        part = SimpleNamespace(run=function)
        monkeypatch.setitem(sys.modules, f"benchmarks.gpu.{name}", part)
    parts = {"fails": 20, "missing": 20, "waits": 1, "works": 20}
    monkeypatch.setattr(kit, "PARTS", parts)
    for name in parts:
        kit.run_part(name, Settings("cpu"), tmp_path, time.perf_counter())
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in parts}
    assert found["fails"] == {"first": 1.0, "whole part": {"error": "ValueError: no such kernel"}}
    assert found["missing"] == {"import": {"error": "No module named 'benchmarks.gpu.missing'"}}
    assert found["waits"] == {
        "first": 2.0, "end": {"error": "ended by signal 9 after at most 1 s"},
    }  # fmt: skip
    assert found["works"]["bad"] == {"error": "ZeroDivisionError: division by zero"}
    assert found["works"]["good"] == 3.0
    assert "works: good: 3" in capfd.readouterr().out
