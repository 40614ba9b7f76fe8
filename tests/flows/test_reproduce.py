import json
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from prefect import flow
from prefect.artifacts import Artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.sorting import FlowRunSort

from flows.reproduce import reproduce
from flows.stages import StageFailedError, plan, run_logged
from fullscale.params import load_params
from fullscale.runtime.processes import SPIN_COUNT, stage_environment
from fullscale.tracking.registry import find_training_run
from fullscale.tracking.store import default_store

pytestmark = pytest.mark.slow


def newest_artifact(key):
    found = Artifact.get(key)
    assert found is not None
    return found


def test_flow_runs_the_stages_and_leaves_results_and_verdict_as_artifacts(
    prefect, reproduced_project, monkeypatch, caplog
):
    for key, value in reproduced_project.environment.items():
        monkeypatch.setenv(key, value)
    status = reproduce(reproduced_project.root)
    for stage in plan(load_params(reproduced_project.root / "params.yaml")):
        assert f"Stage '{stage}' didn't change, skipping" in caplog.text
    gate = json.loads((reproduced_project.root / "reports/gate.json").read_text())
    assert status == gate["status"]
    with get_client(sync_client=True) as client:
        (run,) = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)
    assert run.name == f"reproduce by hand: {status.upper()}"
    assert run.tags == [status]
    table = json.loads(newest_artifact("results").data)
    assert [(row["organ"], row["network"]) for row in table] == [
        ("liver", "unet"),
        ("liver", "unet3plus"),
        ("spleen", "unet"),
        ("spleen", "unet3plus"),
    ]
    verdict = newest_artifact("verdict").data
    assert f"Verdict: {gate['status'].upper()}" in verdict
    assert gate["criteria"][0]["found"] in verdict
    assert newest_artifact("report-scores-1").data.startswith("data:image/svg+xml;base64,")
    store = default_store(reproduced_project.root)
    run_id = find_training_run(store, gate["weights_sha256"])
    files = MlflowClient(store.uri).list_artifacts(run_id, "report")
    assert {"report/report.html", "report/scores-1.svg", "report/cases-1.png"} <= {
        file.path for file in files
    }


def test_failing_stage_fails_the_flow_with_its_reason(prefect, quick_project, monkeypatch):
    for key, value in quick_project.environment.items():
        monkeypatch.setenv(key, value)
    path = quick_project.root / "params.yaml"
    path.write_text(path.read_text().replace("size_px: 32", "size_px: 33\n  colour: grey"))
    with pytest.raises(Exception, match=r"slice\.colour: unknown key"):
        reproduce(quick_project.root)


def test_failing_program_tells_its_last_words(prefect, tmp_path):
    @flow
    def failing():
        run_logged(["python", "-c", "import sys; sys.exit('error: no scans')"], tmp_path)

    with pytest.raises(StageFailedError, match=r"ended with code 1: error: no scans"):
        failing()


def test_stage_finds_this_interpreter_first():
    environment = stage_environment({"PATH": "/usr/bin"})
    assert environment["PATH"].split(":") == [str(Path(sys.executable).parent), "/usr/bin"]


def test_waiting_threads_spin_for_a_moment_unless_the_user_decides():
    assert stage_environment({})["GOMP_SPINCOUNT"] == SPIN_COUNT
    assert stage_environment({"GOMP_SPINCOUNT": "1"})["GOMP_SPINCOUNT"] == "1"
    assert "GOMP_SPINCOUNT" not in stage_environment({"OMP_WAIT_POLICY": "ACTIVE"})
