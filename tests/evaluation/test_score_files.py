import json
import math

import pandas as pd
import pytest

from fullscale.evaluation.score_files import (
    read_calibration,
    read_deployed_scores,
    read_out_of_fold,
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
}


@pytest.fixture
def workspace(tmp_path):
    return open_workspace(tmp_path)


def test_scores_are_read_as_written_to_6_digits(workspace):
    scores = pd.DataFrame(
        {"case": ["01", "02"], "patient": ["1", "2"], "organ": "liver", "dice": [1 / 3, math.nan]}
    )
    write_scores(workspace, "unet", {3: scores})
    assert workspace.scores("unet").read_text().splitlines()[1] == "3,01,1,liver,0.333333"
    read = read_scores(workspace, "unet")
    assert read.pop("seed").tolist() == [3, 3]
    pd.testing.assert_frame_equal(read, scores.round(6))


def test_scores_of_an_ensemble_are_kept_apart_from_those_of_its_members(workspace):
    def scores(dice):
        return pd.DataFrame({"case": ["01"], "patient": ["1"], "organ": "liver", "dice": [dice]})

    write_scores(workspace, "unet", {0: scores(0.5), 10: scores(0.6)}, scores(0.7))
    trainings = read_scores(workspace, "unet")
    assert trainings[["seed", "dice"]].to_numpy().tolist() == [[0, 0.5], [10, 0.6]]
    for members, dice in (([0, 10], 0.7), ([10], 0.6)):
        deployed = read_deployed_scores(workspace, "unet", {"members": members})
        pd.testing.assert_frame_equal(deployed, scores(dice))
    with pytest.raises(StageError, match=r"has no scores of seed 4, which .* `dvc repro evalu"):
        read_deployed_scores(workspace, "unet", {"members": [4]})


def test_out_of_fold_scores_are_kept_apart_from_those_of_test_cases(workspace):
    def scores(case, dice):
        return pd.DataFrame({"case": [case], "patient": [case], "organ": "liver", "dice": [dice]})

    tested = {seed: scores("01", 0.5 + seed / 10) for seed in (0, 1)}
    validated = {0: scores("02", 0.8), 1: scores("03", 0.9)}
    write_scores(workspace, "unet", tested, scores("01", 0.7), validated)
    columns = ["seed", "case", "dice"]
    trainings = read_scores(workspace, "unet")
    assert trainings[columns].to_numpy().tolist() == [[0, "01", 0.5], [1, "01", 0.6]]
    deployed = read_deployed_scores(workspace, "unet", {"members": [0, 1]})
    pd.testing.assert_frame_equal(deployed, scores("01", 0.7))
    left = read_out_of_fold(workspace, "unet")
    assert left[columns].to_numpy().tolist() == [[0, "02", 0.8], [1, "03", 0.9]]


def test_there_are_no_out_of_fold_scores_without_cross_validation(workspace):
    one = pd.DataFrame({"case": ["01"], "patient": ["1"], "organ": "liver", "dice": [0.5]})
    write_scores(workspace, "unet", {0: one})
    assert "fold" not in workspace.scores("unet").read_text()
    assert read_out_of_fold(workspace, "unet").empty


def test_scores_of_an_older_version_are_those_of_its_only_training(workspace):
    path = workspace.scores("unet")
    path.parent.mkdir(parents=True)
    path.write_text("case,patient,organ,dice\n01,1,liver,0.5\n")
    for read in (read_scores(workspace, "unet"), read_deployed_scores(workspace, "unet", {})):
        assert read.to_dict("records") == [
            {"case": "01", "patient": "1", "organ": "liver", "dice": 0.5}
        ]


def test_calibration_is_read_as_written(workspace):
    curves = pd.DataFrame({"organ": ["liver"], "mean_probability": [0.25], "fraction_true": [0.5]})
    write_calibration(workspace, "unet", curves)
    pd.testing.assert_frame_equal(read_calibration(workspace, "unet"), curves)


def test_summary_is_read_as_written_to_6_digits(workspace):
    content = write_summary(workspace, "unet", "ab", {"test/dice/liver": 2 / 3}, (0, 1), (1,))
    assert read_summary(workspace, "unet") == content
    assert content == {
        "test_set": "ab", "seeds": [0, 1], "members": [1], "test/dice/liver": 0.666667,
    }  # fmt: skip


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
