import json
import os
import time

import pytest
from running_services import free_port
from tiny import changed
from typer.testing import CliRunner

from fullscale.tracking.registry import CHALLENGER, CHAMPION
from tasks.cli import app
from tasks.commands.status import describe, read_status

VERSION = {"version": "3", "verdict": "pass", "data_version": "ab" * 16, "git_commit": "cd" * 20}
FACTS = {
    "models": {"name": "organs", CHAMPION: VERSION, CHALLENGER: None},
    "verdict": {"status": "pass", "candidate": "unet3plus", "baseline": "unet", "test_set": "0f"},
    "scans": {
        "data_version": "ab" * 16,
        "cases": 52,
        "patients": 50,
        "landed": "ef" * 16,
        "retrained": "retrain/2026-11-29-efefefef",
    },
    "inbox": {"url": "/inbox", "ready": ["a"], "waiting": {"b": "its label has not arrived"}},
    "runs": {
        "api": "http://127.0.0.1:4200/api",
        "now": [{"name": "retrain by hand", "state": "Running", "time": "2026-11-29T02:00:03Z"}],
        "next": [],
        "last": [],
    },
    "disk": {"free_bytes": 3 * 2**30, "folder_bytes": {"data": 2**30, "mlruns": 0}},
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project without git, results and servers, whose inbox holds one image."""
    (tmp_path / "params.yaml").write_text(json.dumps(changed({})))
    image = tmp_path / "inbox/imagesTr/a_0000.nii.gz"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"scan")
    os.utime(image, (time.time() - 120, time.time() - 120))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("FULLSCALE_PREFECT_PORT", str(free_port()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_lines_fit_a_narrow_terminal_and_say_what_matters():
    lines = describe(FACTS)
    assert max(map(len, lines)) < 80
    text = "\n".join(lines)
    assert "champion of organs: version 3, pass, scans abababab, commit cdcdcdcd" in text
    assert "challenger of organs: none" in text
    assert "PASS: unet3plus against unet on test set 0f" in text
    assert "data version abababab: 52 cases of 50 patients" in text
    assert "newer scans have landed: data version efefefef" in text
    assert "retrain/2026-11-29-efefefef" in text
    assert "1 pairs ready, 1 waiting in /inbox" in text
    assert "b: its label has not arrived" in text
    assert "now: retrain by hand, Running, 2026-11-29 02:00 UTC" in text
    assert "3 GiB free; GiB in data 1.00" in text


def test_new_project_is_described_without_being_changed(project):
    before = sorted(project.rglob("*"))
    facts = read_status(project)
    assert sorted(project.rglob("*")) == before
    assert (facts["models"][CHAMPION], facts["models"][CHALLENGER]) == (None, None)
    assert "gate.json is missing; run `dvc repro register`" in facts["verdict"]["error"]
    assert facts["inbox"]["waiting"] == {"a": "its label has not arrived"}
    assert "Prefect does not answer at http://127.0.0.1:" in facts["runs"]["error"]
    assert facts["disk"]["folder_bytes"]["data"] == 0
    assert max(map(len, describe(facts))) < 80


def test_command_prints_one_json_object(project):
    done = CliRunner().invoke(app, ["status", "--json"])
    assert done.exit_code == 0, done.output
    assert set(json.loads(done.output)) == set(FACTS)
    shown = CliRunner().invoke(app, ["status"])
    assert shown.exit_code == 0
    assert "challenger of fullscale-organs: none" in shown.output
