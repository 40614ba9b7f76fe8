import json
import math

import pandas as pd
import pytest

from fullscale.evaluation.score_files import (
    read_calibration,
    read_scores,
    read_summary,
    read_verdict,
    write_calibration,
    write_scores,
    write_summary,
    write_verdict,
)
from fullscale.runtime.errors import StageError
from fullscale.workspace import open_workspace

VERDICT = {
    "status": "pass",
    "candidate": "unet3plus",
    "baseline": "unet",
    "criteria": [{"name": "dice_gain", "passed": True, "value": 1 / 3}],
    "test_set": "0" * 16,
    "data_version": "aaaa.dir",
    "git_commit": "c" * 40,
}


@pytest.fixture
def workspace(tmp_path):
    return open_workspace(tmp_path)


def test_scores_are_read_as_written_to_6_digits(workspace):
    scores = pd.DataFrame(
        {"case": ["01", "02"], "patient": ["1", "2"], "organ": "liver", "dice": [1 / 3, math.nan]}
    )
    write_scores(workspace, "unet", scores)
    assert workspace.scores("unet").read_text().splitlines()[1] == "01,1,liver,0.333333"
    pd.testing.assert_frame_equal(read_scores(workspace, "unet"), scores.round(6))


def test_calibration_is_read_as_written(workspace):
    curves = pd.DataFrame({"organ": ["liver"], "mean_probability": [0.25], "fraction_true": [0.5]})
    write_calibration(workspace, "unet", curves)
    pd.testing.assert_frame_equal(read_calibration(workspace, "unet"), curves)


def test_summary_is_read_as_written_to_6_digits(workspace):
    content = write_summary(workspace, "unet", "ab", {"test/dice/liver": 2 / 3})
    assert read_summary(workspace, "unet") == content
    assert content == {"test_set": "ab", "test/dice/liver": 0.666667}


def test_verdict_is_read_as_written_with_null_for_what_json_lacks(workspace):
    content = write_verdict(workspace, {**VERDICT, "dice_gain": {"mean": math.nan}})
    assert read_verdict(workspace) == content
    assert content["dice_gain"] == {"mean": None}
    assert content["criteria"][0]["value"] == 0.333333


def test_older_scores_and_summary_get_the_present_names(workspace):
    """Older versions called the slice classifier a gate."""
    folder = workspace.report("unet3plus")
    folder.mkdir(parents=True)
    workspace.scores("unet3plus").write_text(
        "case,organ,dice_no_gate,num_false_positive_slices_soft_gate,gate_sensitivity\n"
        "01,liver,0.5,3,0.75\n"
    )
    assert list(read_scores(workspace, "unet3plus")) == [
        "case",
        "organ",
        "dice_no_classifier",
        "num_false_positive_slices_soft_classifier",
        "classifier_sensitivity",
    ]
    older = {"test/dice_no_gate_low/liver": 0.5, "test/gate_specificity/liver": 0.75}
    workspace.summary("unet3plus").write_text(json.dumps(older))
    assert read_summary(workspace, "unet3plus") == {
        "test/dice_no_classifier_low/liver": 0.5,
        "test/classifier_specificity/liver": 0.75,
    }


def test_older_verdict_has_its_criteria_under_the_key_clauses(workspace):
    workspace.reports.mkdir()
    older = {("clauses" if key == "criteria" else key): value for key, value in VERDICT.items()}
    workspace.verdict.write_text(json.dumps(older))
    assert read_verdict(workspace)["criteria"] == VERDICT["criteria"]


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (read_scores, r"unet/cases\.csv is missing; run `dvc repro evaluate@unet`"),
        (read_calibration, r"unet/calibration\.csv is missing; run `dvc repro evaluate@unet`"),
        (read_summary, r"unet/summary\.json is missing; run `dvc repro evaluate@unet`"),
    ],
)
def test_missing_file_is_named_with_the_command_that_makes_it(workspace, read, message):
    with pytest.raises(StageError, match=message):
        read(workspace, "unet")


def test_damaged_verdict_is_named_with_what_it_lacks(workspace):
    workspace.reports.mkdir()
    workspace.verdict.write_text('{"status": "pass"}')
    with pytest.raises(StageError, match=r"gate\.json cannot be read \(it lacks baseline, cand"):
        read_verdict(workspace)
