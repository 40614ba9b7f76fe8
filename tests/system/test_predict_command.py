"""The command predict as a person runs it."""

import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from bodies import make_body, save_nifti
from cohorts import SPACING_MM, write_series
from project import ROOT
from random_network import narrow, save_random
from typer.testing import CliRunner

from fullscale.params import load_params
from tasks.cli import app

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """The folder of a network with random weights."""
    params = narrow(load_params(ROOT / "params.yaml"))
    return save_random(tmp_path_factory.mktemp("network"), params)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    save_nifti(folder / "a.nii.gz", make_body(seed=1)[0], SPACING_MM, "RAS")
    write_series(folder / "ct", make_body(seed=2)[0])
    return folder


def run_here(*arguments, code):
    """Run the command in this process, which has imported what it needs."""
    done = CliRunner().invoke(app, ["predict", *map(str, arguments)])
    assert done.exit_code == code, done.output
    assert isinstance(done.exception, SystemExit)
    return done


def test_everything_of_one_series(scans, network, tmp_path):
    out = tmp_path / "out.nii.gz"
    command = [
        sys.executable, "-m", "tasks.cli", "predict",
        scans / "ct", out, "--model", network, "--probabilities",
        "--preview", tmp_path / "p.png", "--statistics", tmp_path / "s.json",
        "--dicom-seg", tmp_path / "seg.dcm", "--device", "cpu", "--batch-size", "4",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith("predict: ct: liver ")
    assert "slices: 4/4" in done.stderr
    content = json.loads((tmp_path / "s.json").read_text())
    assert content["model"]["version"] is None
    label = np.asarray(nib.load(out).dataobj)
    ml = (label == 1).sum() * np.prod(SPACING_MM) / 1000
    assert content["organs"]["liver"]["volume_ml"] == pytest.approx(ml, abs=1e-3)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("out.nii.gz", "out_liver_probability.nii.gz", "out_spleen_probability.nii.gz"),
        *("p.png", "s.json", "seg.dcm"),
    }


def test_exit_code_says_whether_some_or_all_failed(network, scans, tmp_path):
    save_nifti(tmp_path / "in/good.nii.gz", make_body()[0], SPACING_MM)
    (tmp_path / "in/bad.nii.gz").write_bytes(b"no scan")
    done = run_here(tmp_path / "in", tmp_path / "out", "--model", network, code=3)
    assert "error: bad: unreadable" in done.stderr
    assert "predict: 1 of 2 scans failed" in done.stderr
    assert "predict: good: liver" in done.stdout
    (tmp_path / "in/good.nii.gz").write_bytes(b"no scan")
    done = run_here(tmp_path / "in", tmp_path / "out2", "--model", network, code=1)
    assert "predict: 2 of 2 scans failed" in done.stderr
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere.nii", "o.nii"), "error: there is no nowhere.nii"),
        (("{scan}", "o.png"), "error: found OUT o.png; for a single scan wanted a file named"),
        (("{scan}", "o.nii", "--device", "gpu"), "error: found device 'gpu'; wanted one of auto"),
        (("{scan}", "o.nii", "--model", "{net}", "--batch-size", "0"), "found --batch-size 0;"),
        (("{scan}", "o.nii", "--model", "nowhere"), "error: no trained network in nowhere"),
        (("{scan}", "o.nii"), "error: no params.yaml here names a registered model"),
        (("{scan}", "o.nii", "--model", "models:/a@b"), "error: there is no registry in mlruns/"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_1(
    scans, network, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    filled = [each.format(scan=scans / "a.nii.gz", net=network) for each in arguments]
    done = CliRunner().invoke(app, ["predict", *filled])
    assert done.exit_code == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
