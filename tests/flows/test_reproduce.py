import json
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from prefect import flow
from prefect.artifacts import Artifact
from prefect.testing.utilities import prefect_test_harness

from flows.reproduce import reproduce
from flows.stages import StageFailedError, run_logged
from fullscale.runtime.processes import stage_environment
from fullscale.tracking.registry import find_training_run
from fullscale.tracking.store import default_store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prefect():
    with prefect_test_harness(server_startup_timeout=180):
        yield


def newest_artifact(key):
    found = Artifact.get(key)
    assert found is not None
    return found


def test_flow_leaves_results_and_verdict_as_artifacts(prefect, small_project, monkeypatch):
    for key, value in small_project.environment.items():
        monkeypatch.setenv(key, value)
    status = reproduce(small_project.root)
    gate = json.loads((small_project.root / "reports/gate.json").read_text())
    assert status == gate["status"]
    table = json.loads(newest_artifact("results").data)
    assert [(row["organ"], row["network"]) for row in table] == [
        ("liver", "unet"),
        ("liver", "unet3plus"),
        ("spleen", "unet"),
        ("spleen", "unet3plus"),
    ]
    verdict = newest_artifact("verdict").data
    assert f"Verdict: {gate['status'].upper()}" in verdict
    assert gate["clauses"][0]["found"] in verdict
    assert newest_artifact("report-scores-1").data.startswith("data:image/svg+xml;base64,")
    store = default_store(small_project.root)
    run_id = find_training_run(store, gate["weights_sha256"])
    files = MlflowClient(store.uri).list_artifacts(run_id, "report")
    assert {"report/report.html", "report/scores-1.svg", "report/cases-1.png"} <= {
        file.path for file in files
    }


def test_failing_stage_fails_the_flow_with_its_reason(prefect, small_project, monkeypatch):
    for key, value in small_project.environment.items():
        monkeypatch.setenv(key, value)
    path = small_project.root / "params.yaml"
    before = path.read_text()
    path.write_text(before.replace("size_px: 32", "size_px: 33\n  colour: grey"))
    try:
        with pytest.raises(Exception, match=r"slice\.colour: unknown key"):
            reproduce(small_project.root)
    finally:
        path.write_text(before)


def test_failing_program_tells_its_last_words(prefect, small_project):
    @flow
    def failing():
        run_logged(["python", "-c", "import sys; sys.exit('error: no scans')"], small_project.root)

    with pytest.raises(StageFailedError, match=r"ended with code 1: error: no scans"):
        failing()


def test_stage_finds_this_interpreter_first():
    environment = stage_environment({"PATH": "/usr/bin", "OMP_WAIT_POLICY": "ACTIVE"})
    assert environment["PATH"].split(":") == [str(Path(sys.executable).parent), "/usr/bin"]
    assert environment["OMP_WAIT_POLICY"] == "ACTIVE"
    assert stage_environment({})["OMP_WAIT_POLICY"] == "PASSIVE"
