from __future__ import annotations

import json
import shutil
import subprocess

import pytest
import yaml

from fullscale.evaluation.published_result import compare_with_published
from fullscale.workspace import open_workspace

NETWORKS = ("unet", "unet3plus")


def write_results(folder, md5, dice):
    stages = {
        f"train@{name}-0": {"outs": [{"path": f"artifacts/train/{name}/0", "md5": md5[name]}]}
        for name in NETWORKS
    }
    stages["register"] = {"outs": [{"path": "artifacts/register", "md5": str(dice)}]}
    (folder / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
    for name in NETWORKS:
        (folder / "reports" / name).mkdir(parents=True, exist_ok=True)
        summary = {"test_set": "abc", "test/dice": dice, "test/dice/liver": dice}
        (folder / "reports" / name / "summary.json").write_text(json.dumps(summary))


def run_git(folder, *arguments):
    identity = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True)


@pytest.fixture
def committed(tmp_path):
    """A repository with a committed result."""
    run_git(tmp_path, "init", "--quiet")
    write_results(tmp_path, {"unet": "1", "unet3plus": "2"}, 0.9)
    run_git(tmp_path, "add", "--all")
    run_git(tmp_path, "commit", "--quiet", "--message", "result")
    return tmp_path


def compare(folder):
    return compare_with_published(open_workspace(folder), NETWORKS)


def test_same_outputs_are_the_published_result_whatever_the_register_stage_left(committed):
    write_results(committed, {"unet": "1", "unet3plus": "2"}, 0.8)
    (line,) = compare(committed)
    assert line == "Published result: the same weights and scores, bit for bit"


def test_other_outputs_are_named_with_the_difference_in_dice(committed):
    write_results(committed, {"unet": "1", "unet3plus": "3"}, 0.8912)
    heading, line = compare(committed)
    assert "not the same" in heading
    assert line == "  unet3plus, liver: Dice 0.8912, published 0.9000 (-0.0088)"


def test_a_network_without_a_committed_result_is_named(committed):
    found = compare_with_published(open_workspace(committed), ("unet",))
    assert "bit for bit" in found[0]
    run_git(committed, "rm", "-r", "--quiet", "--cached", "reports")
    run_git(committed, "commit", "--quiet", "--message", "no reports")
    write_results(committed, {"unet": "4", "unet3plus": "2"}, 0.9)
    assert compare(committed)[1] == "  unet: reports/unet/summary.json is not committed"


def test_without_a_committed_result_there_is_nothing_to_compare_with(committed, tmp_path):
    shutil.rmtree(committed / ".git")
    (line,) = compare(committed)
    assert "none is committed" in line
