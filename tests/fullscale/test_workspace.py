import shutil
from pathlib import Path

import pytest
import yaml
from project import ROOT

from fullscale.params import load_params
from fullscale.runtime.errors import StageError
from fullscale.workspace import (
    open_workspace,
    parse_command,
    parse_evaluate_command,
    parse_training_command,
)

PROFILES = ("paper/sample", "paper/paper", "btcv/cpu")


@pytest.fixture
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_main_pipeline_has_the_top_level_folders():
    found = open_workspace(Path("p"))
    assert found.params_files == (Path("p/params.yaml"),)
    assert found.slices == Path("p/artifacts/slices")
    assert found.split == Path("p/artifacts/split.csv")
    assert found.trained("unet", 2) == Path("p/artifacts/train/unet/2")
    assert found.trainings("unet", (10, 2)) == [found.trained("unet", 2), found.trained("unet", 10)]
    assert found.reports == Path("p/reports")
    assert found.summary("unet") == Path("p/reports/unet/summary.json")
    assert found.verdict == Path("p/reports/gate.json")
    assert found.lock == Path("p/dvc.lock")
    assert found.training_work("unet", 2) == Path("p/.cache/train/unet/2")
    assert found.tracking("unet", 2) == Path("p/.cache/train/unet/2/tracking")
    assert found.profile == ""


@pytest.mark.parametrize("profile", PROFILES)
def test_profile_shares_nothing_it_writes_with_another(profile):
    found = open_workspace(ROOT, profile)
    for other in (None, *(set(PROFILES) - {profile})):
        strange = open_workspace(ROOT, other)
        for one in (found.slices, found.split, found.trained("unet", 0), found.work, found.reports):
            for two in (strange.slices, strange.split, strange.trained("unet", 0), strange.work):
                assert not one.is_relative_to(two)
                assert not two.is_relative_to(one)


@pytest.mark.parametrize("profile", PROFILES)
def test_profile_joins_two_files(profile):
    params = open_workspace(ROOT, profile).load_params()
    assert len(params.networks) == (7 if profile == "btcv/cpu" else 15)
    assert set(params.networks) == set(params.recipes)


@pytest.mark.parametrize("profile", ["paper/other", "sample", "../paper/sample", "/paper/sample"])
def test_profile_that_is_none_is_refused(profile):
    with pytest.raises(StageError, match="wanted PIPELINE/PROFILE such as paper/sample"):
        open_workspace(ROOT, profile)


def test_sections_in_two_files_are_refused(tmp_path):
    for name in ("params.yaml", "sample.yaml"):
        shutil.copy(ROOT / "paper" / name, tmp_path)
    content = yaml.safe_load((tmp_path / "sample.yaml").read_text())
    content["evaluate"] = {"batch_size": 1}
    (tmp_path / "sample.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(StageError, match=r"sample\.yaml has evaluate, and so has another file"):
        load_params(tmp_path / "params.yaml", tmp_path / "sample.yaml")


def test_command_names_profile_and_network(in_root):
    named = ["pspnet", "--profile", "paper/sample"]
    workspace, params, network, reports = parse_evaluate_command(named)
    assert workspace.profile == "paper/sample"
    assert (network, reports, params.evaluate.refine) == ("pspnet", "pspnet", "none")
    _, params, network, reports = parse_evaluate_command([*named, "--refine", "crf"])
    assert (network, reports, params.evaluate.refine) == ("pspnet", "pspnet-crf", "crf")
    assert params.recipes[network].architecture == "pspnet"
    assert parse_command("slice", []).profile == ""
    profile = ["--profile", "paper/sample"]
    _, _, network, seed = parse_training_command(["pspnet", "0", *profile])
    assert (network, seed) == ("pspnet", 0)


@pytest.mark.parametrize("arguments", [[], ["pspnet"]])
def test_command_with_no_network_of_the_pipeline_is_refused(in_root, arguments):
    with pytest.raises(StageError, match=r"python -m tasks\.evaluate NETWORK, one of unet, unet3p"):
        parse_evaluate_command(arguments)


@pytest.mark.parametrize("arguments", [["unet"], ["unet", "7"], ["unet", "-0"], ["pspnet", "0"]])
def test_command_with_no_training_of_the_pipeline_is_refused(in_root, arguments):
    wanted = r"tasks\.train NETWORK SEED, one of unet, .*one of 0, 1, 2$"
    with pytest.raises(StageError, match=wanted):
        parse_training_command(arguments)


def test_paper_profile_is_the_papers_split_and_size(in_root):
    params = open_workspace(ROOT, "paper/paper").load_params()
    lits = [name for name in params.split.test_patients if name.startswith("lits_")]
    assert (len(lits), len(params.split.test_patients) - len(lits)) == (28, 9)
    assert (params.train.width, params.slice.size_px, params.train.optimizer) == (64, 320, "sgd")


def test_command_of_a_stage_names_the_pipeline_and_the_item():
    ours, papers = open_workspace(ROOT), open_workspace(ROOT, "paper/sample")
    assert ours.command("register") == "dvc repro register"
    assert ours.command("train", "unet", 0) == "dvc repro train@unet-0"
    assert ours.command("evaluate", "unet") == "dvc repro evaluate@unet"
    assert papers.command("slice") == "dvc repro paper/dvc.yaml:slice@sample"
    assert papers.command("train", "unet", 0) == "dvc repro paper/dvc.yaml:train@sample-unet-0"
    assert papers.lock == ROOT / "paper/dvc.lock"


@pytest.mark.parametrize("profile", PROFILES)
def test_commands_of_a_profile_name_items_of_its_pipeline(profile):
    pipeline = ROOT / Path(profile).parent / "dvc.yaml"
    lock = yaml.safe_load(pipeline.read_text())["stages"]
    for stage in ("slice", "train"):
        name = open_workspace(ROOT, profile).command(stage).rpartition(":")[2]
        assert name.partition("@")[0] in lock
        assert name.partition("@")[2] in lock[stage]["matrix"]["profile"]
