import json

import pytest
import yaml
from project import ROOT
from typer.testing import CliRunner

from fullscale.params import load_params
from tasks.cli import app


@pytest.fixture
def project(tiny_data, tmp_path, monkeypatch):
    """A folder with eight small scans and the published params.yaml, the width being the user's."""
    text = (ROOT / "params.yaml").read_text().replace("  width: 8  ", "  width: 12 # mine ")
    (tmp_path / "params.yaml").write_text(text)
    (tmp_path / "data").symlink_to(tiny_data)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments, code=0):
    done = CliRunner().invoke(app, ["plan", *arguments])
    assert done.exit_code == code, done.output
    return done.output


@pytest.mark.slow
def test_plan_for_a_gpu_elsewhere_has_sizes_and_no_times(project):
    text = (project / "params.yaml").read_text()
    assert "params.yaml is as it was" in run("--gpu", "a100")
    assert (project / "params.yaml").read_text() == text
    output = run("--gpu", "a100", "--write")
    assert "the time of a step on a100: run `fullscale plan` there" in output
    params = load_params(project / "params.yaml")
    assert params.train.width == 12
    assert params.slice.pixel_mm == 7  # as the scans
    assert params.slice.size_px == 64
    assert params.train.num_epochs == load_params(ROOT / "params.yaml").train.num_epochs
    written = (project / "params.yaml").read_text()
    assert "  width: 12 # mine " in written
    names = [line.partition(":")[0] for line in text.splitlines()]
    assert [line.partition(":")[0] for line in written.splitlines()] == names
    # A plan is its own best plan, and the same scans and test set have the same fingerprint.
    first = (project / "reports/fingerprint.json").read_bytes()
    assert "0 values changed" in run("--gpu", "a100", "--write")
    assert (project / "params.yaml").read_text() == written
    assert (project / "reports/fingerprint.json").read_bytes() == first
    tested = 8 - len(json.loads(first)["cases"])
    assert tested == json.loads(first)["num_tested"] > 0
    assert (project / "reports/fingerprint.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "abacus"), "--gpu 'abacus' is none of auto, none"),
        (("--data", "nothing", "--gpu", "none"), "no folder nothing"),
    ],
)
def test_plan_that_cannot_be_made_says_why(project, caplog, arguments, message):
    run(*arguments, code=1)
    assert message in caplog.text


@pytest.mark.slow
def test_plan_by_measured_steps_fills_the_hours(project, monkeypatch, caplog):
    monkeypatch.setattr("fullscale.planning.step_time.MEASURED_S", 0.1)
    run("--gpu", "none", "--hours", "0.01", code=1)
    assert "--hours 0.01 is too short for all trainings" in caplog.text
    run("--gpu", "none", "--hours", "20", "--write")
    content = yaml.safe_load((project / "params.yaml").read_text())
    assert content["train"]["num_epochs"] >= 10
    assert content["train"]["slices_per_epoch"] == 512  # eight small scans have fewer slices
