import gzip
import json
import shutil

import pytest
from conftest import FIRST_OUTPUT
from project import ROOT, clone_project

from fullscale.scans.cohort import read_cohort

pytestmark = pytest.mark.slow
STAGES = (
    "slice",
    "split",
    "train@unet-0",
    "train@unet3plus-0",
    "evaluate@unet",
    "evaluate@unet3plus",
    "register",
)


def stages_run(output):
    return [
        line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage '")
    ]


def test_fresh_clone_runs_every_stage(reproduced_project):
    root = reproduced_project.root
    assert sorted(stages_run((root.parent / FIRST_OUTPUT).read_text())) == sorted(STAGES)
    gate = json.loads((root / "reports/gate.json").read_text())
    assert gate["status"] in ("pass", "fail", "undecided")
    assert len(gate["data_version"]) >= 32
    split = (root / "artifacts/split.csv").read_text().splitlines()
    assert len(split) == 1 + len(read_cohort(root / "data").cases)


def test_verdict_shows_scores_reasons_and_model(reproduced_project):
    gate = json.loads((reproduced_project.root / "reports/gate.json").read_text())
    shown = reproduced_project.run("fullscale", "verdict")
    for organ in ("liver", "spleen"):
        for network in ("unet", "unet3plus"):
            summary = json.loads(
                (reproduced_project.root / f"reports/{network}/summary.json").read_text()
            )
            row = next(
                line for line in shown.splitlines() if organ in line and f" {network} " in line
            )
            assert f"{summary[f'test/dice/{organ}']:.4f}" in row
    assert f"Verdict: {gate['status'].upper()}" in shown
    for criterion in gate["criteria"]:
        assert criterion["found"] in shown
    assert "Registered: " in shown
    # Scores that were made again after the verdict, as `dvc repro evaluate` does.
    doubt = "warning: The verdict was made from other scores of unet than these"
    assert doubt not in shown
    with (reproduced_project.root / "reports/unet/cases.csv").open("a") as scores:
        scores.write("\n")
    assert doubt in reproduced_project.run("fullscale", "verdict")


def test_metrics_params_and_plots_are_shown(reproduced_project):
    metrics = json.loads(reproduced_project.run("dvc", "metrics", "show", "--json"))
    names = set(metrics[""]["data"])
    assert {"reports/unet/summary.json", "reports/unet3plus/summary.json"} <= names
    assert "test/dice/liver" in metrics[""]["data"]["reports/unet/summary.json"]["data"]
    reproduced_project.run("dvc", "plots", "show", "--out", "plots-page")
    page = (reproduced_project.root / "plots-page/index.html").read_text()
    assert "val/dice" in page


def test_dvc_tells_the_same_facts_and_what_they_were_before(reproduced_project):
    path, key = "reports/unet/summary.json", "test/dice/liver"
    now = json.loads((reproduced_project.root / path).read_text())[key]
    then = json.loads(reproduced_project.run("git", "show", f"HEAD:{path}"))[key]
    difference = json.loads(reproduced_project.run("dvc", "metrics", "diff", "--json"))[path][key]
    assert (difference["old"], difference["new"]) == (then, now)
    workspace = json.loads(reproduced_project.run("dvc", "exp", "show", "--json"))[0]
    assert workspace["rev"] == "workspace"
    assert workspace["data"]["metrics"][path]["data"][key] == now
    assert workspace["data"]["params"]["params.yaml"]["data"]["train"]["width"] == 4


def test_second_run_does_nothing(reproduced_project):
    assert stages_run(reproduced_project.run("dvc", "repro")) == []
    assert "up to date" in reproduced_project.run("dvc", "status", "data.dvc", "dvc.yaml")


def test_second_machine_makes_the_same_reports_and_registers_too(reproduced_project):
    """A clone elsewhere has reports and dvc.lock from git, but no artefacts and no registry.

    Its commit is another one, and still no file of git changes: a merge is never in the way.
    """
    for step in (("add", "dvc.lock", "reports"), ("commit", "--quiet", "--message", "results")):
        reproduced_project.run("git", *step)
    reports = reproduced_project.root / "reports"
    before = {path: path.read_bytes() for path in reports.rglob("*.*")}
    reproduced_project.run("dvc", "push", "--quiet", "data.dvc")
    for lost in ("artifacts", "mlruns", ".dvc/cache", "data"):
        shutil.rmtree(reproduced_project.root / lost)
    reproduced_project.run("dvc", "pull", "--quiet", "data.dvc")
    ran = stages_run(reproduced_project.run("dvc", "repro"))
    assert {"slice", "split", "train@unet-0", "train@unet3plus-0", "register"} <= set(ran)
    assert {path: path.read_bytes() for path in reports.rglob("*.*")} == before
    assert reproduced_project.run("git", "status", "--porcelain", "--untracked-files=no") == ""
    shown = reproduced_project.run("fullscale", "verdict")
    assert "not in this tracking store" not in shown


def test_learning_rate_changes_training_and_what_follows_only(reproduced_project):
    """DVC reruns what it calls changed here, and what depends on that."""
    reproduced_project.change_params("train", learning_rate=0.0031)
    told = reproduced_project.run("dvc", "status", "--json", "data.dvc", "dvc.yaml")
    assert sorted(json.loads(told)) == ["train@unet-0", "train@unet3plus-0"]
    following = reproduced_project.run("dvc", "dag", "--dot", "register")
    edges = {tuple(line.strip(' ;"').split('" -> "')) for line in following.splitlines()}
    for network in ("unet", "unet3plus"):
        assert {
            (f"train@{network}-0", f"evaluate@{network}"),
            (f"train@{network}-0", "register"),
            (f"evaluate@{network}", "register"),
        } <= edges


@pytest.fixture
def bare_project(tmp_path):
    return clone_project(tmp_path / "project")


def failed(project, *command):
    """The lines that begin with error, of a program that must fail without a traceback."""
    output = project.run(*command, code=None)
    assert "Traceback" not in output
    return [line for line in output.splitlines() if line.lower().startswith("error: ")]


def test_bad_params_are_named_once(bare_project):
    bare_project.change_params("slice", size_pixels=96)
    (error,) = failed(bare_project, "python", "-m", "tasks.slice")
    assert (
        error
        == "error: params.yaml: slice.size_pixels: unknown key; remove it or correct its spelling"
    )


def test_missing_data_says_pull(bare_project):
    (error,) = failed(bare_project, "python", "-m", "tasks.slice")
    assert "data" in error
    assert "dvc pull" in error


def test_missing_remote_is_named(bare_project):
    shutil.rmtree(bare_project.root / "sample-remote")
    errors = failed(bare_project, "dvc", "pull", "data.dvc")
    assert errors
    assert "data" in " ".join(errors)


def test_truncated_scan_is_named(bare_project):
    bare_project.run("dvc", "pull", "--quiet", "data.dvc")
    path = read_cohort(bare_project.root / "data").cases[3].image
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(EOFError):
        gzip.decompress(path.read_bytes())
    (error,) = failed(bare_project, "python", "-m", "tasks.slice")
    assert path.name in error
    assert not (bare_project.root / "artifacts/slices/store.json").exists()


def test_published_result_belongs_to_this_code_and_data(bare_project):
    """dvc.lock was written by the code, parameters and data that stand beside it."""
    status = json.loads(bare_project.run("dvc", "status", "--json", "--with-deps", "register"))
    changed = {
        stage: entry
        for stage, entries in status.items()
        for entry in entries
        if isinstance(entry, dict) and "changed deps" in entry
    }
    stale = {
        stage: {name: why for name, why in entry["changed deps"].items() if why != "deleted"}
        for stage, entry in changed.items()
    }
    assert not {stage: deps for stage, deps in stale.items() if deps}
    assert ROOT.joinpath("dvc.lock").is_file()
