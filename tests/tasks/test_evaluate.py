import math

import numpy as np
import pandas as pd
import pytest
import torch

from scans.volume import read_image, read_labels
from tasks.console import StageError
from tasks.evaluate import draw_case, evaluate_network, picture_cases, score_cases, summarise
from tasks.predict import Predictor, Segmentation
from tasks.trained import Trained, build, describe

SETTINGS = {"threshold": 0.5, "batch_size": 8, "min_false_positive_px": 2}


@pytest.fixture(scope="module")
def trained(tiny_params):
    torch.manual_seed(0)
    description = describe("unet3plus", tiny_params)
    return Trained(build(description).eval(), description)


@pytest.fixture
def predictor(trained):
    return Predictor(trained, 0.5, 8, torch.device("cpu"))


class Annotator:
    """Stands where a network would: returns the annotation itself, or an edit of it."""

    def __init__(self, predictor, cohort, edit=lambda organ, mask: mask):
        self.description = predictor.description
        self._labels = {}
        self._edit = edit
        for case in cohort.cases:
            self._labels[read_image(case.image).values_ZYX.tobytes()] = read_labels(case.label)

    def segment(self, scan):
        labels = self._labels[scan.values_ZYX.tobytes()].values_ZYX
        masks = {
            organ: self._edit(organ, np.isin(labels, ids))
            for organ, ids in self.description.organs.items()
        }
        open_ = dict.fromkeys(masks, np.ones(len(labels), dtype=bool))
        return Segmentation(masks, open_, labels)


def test_perfect_prediction_scores_one(predictor, tiny_cohort):
    scores = score_cases(Annotator(predictor, tiny_cohort), tiny_cohort.cases, tiny_cohort, 2)
    assert (scores["dice"] == 1).all()
    assert (scores["num_false_positive_slices"] == 0).all()
    summary = summarise(scores, ["liver", "spleen"])
    assert summary["test/dice"] == summary["test/dice/liver"] == 1
    assert summary["test/slice_fpr/spleen"] == 0


def test_only_annotated_organs_are_scored(predictor, tiny_cohort):
    scores = score_cases(Annotator(predictor, tiny_cohort), tiny_cohort.cases, tiny_cohort, 2)
    organs = scores.groupby("case")["organ"].apply(set)
    assert organs["case_00"] == {"liver", "spleen"}
    assert organs["case_06"] == {"liver"}
    assert organs["case_07"] == {"spleen"}


def test_missed_organ_scores_zero_and_counts(predictor, tiny_cohort):
    missing = Annotator(predictor, tiny_cohort, lambda organ, mask: mask & (organ != "spleen"))
    summary = summarise(
        score_cases(missing, tiny_cohort.cases, tiny_cohort, 2), ["liver", "spleen"]
    )
    assert summary["test/dice/spleen"] == 0
    assert summary["test/num_cases/spleen"] == 7


def make_rows(**columns):
    counts = {
        "num_organ_slices": 4,
        "num_free_slices": 6,
        "num_false_positive_slices": 0,
        "num_false_positive_voxels": 0,
        "num_free_voxels": 100,
        "num_false_closings": 0,
        "num_closed_voxels": 0,
        "num_true_voxels": 50,
    }
    return pd.DataFrame({"organ": "liver", "dice": [0.5, math.nan, 0.7], **counts, **columns})


def test_summary_leaves_empty_pairs_out_of_the_mean_and_says_so():
    summary = summarise(make_rows(), ["liver"])
    assert summary["test/dice/liver"] == pytest.approx(0.6)
    assert summary["test/num_cases/liver"] == 2


def test_summary_pools_rates_over_cases():
    rows = make_rows(
        num_free_slices=[1, 9, 10],
        num_false_positive_slices=[1, 0, 1],
        num_false_closings=[1, 0, 2],
        num_closed_voxels=[5, 0, 10],
    )
    summary = summarise(rows, ["liver"])
    assert summary["test/slice_fpr/liver"] == pytest.approx(2 / 20)
    assert summary["test/false_closings/liver"] == pytest.approx(3 / 12)
    assert summary["test/closed_volume/liver"] == pytest.approx(15 / 150)


def test_summary_leaves_out_what_cannot_be_measured():
    summary = summarise(make_rows(num_free_slices=0), ["liver"])
    assert "test/slice_fpr/liver" not in summary


def test_evaluation_names_missing_cases(trained, tiny_cohort):
    with pytest.raises(StageError, match=r"data/ lacks test cases case_98, case_99"):
        evaluate_network(trained, tiny_cohort, ["case_00", "case_99", "case_98"], **SETTINGS)


def test_evaluation_refuses_empty_test_set(trained, tiny_cohort):
    with pytest.raises(StageError, match="the split holds no test cases"):
        evaluate_network(trained, tiny_cohort, [], **SETTINGS)


def test_segmentation_lies_on_the_scan(predictor, tiny_cohort):
    for case in tiny_cohort.cases[:4]:
        scan = read_image(case.image)
        found = predictor.segment(scan)
        assert found.label_map.shape == scan.values_ZYX.shape
        assert set(np.unique(found.label_map)) <= {0, 1, 2}
        claimed = found.masks["liver"] | found.masks["spleen"]
        assert np.array_equal(found.label_map > 0, claimed)


def test_closed_gate_leaves_slices_empty(tiny_params, tiny_cohort):
    description = describe("unet3plus", tiny_params)
    network = build(description).eval()
    with torch.no_grad():
        network.classifier.conv.bias.copy_(torch.tensor([-100.0, 100.0, 100.0, -100.0]))
    predictor = Predictor(Trained(network, description), 0.001, 8, torch.device("cpu"))
    found = predictor.segment(read_image(tiny_cohort.cases[0].image))
    assert found.gate_open["liver"].all()
    assert not found.gate_open["spleen"].any()
    assert found.masks["liver"].any()
    assert not found.masks["spleen"].any()


def test_more_probable_organ_has_a_disputed_voxel(trained, tiny_cohort):
    found = Predictor(trained, 0.001, 8, torch.device("cpu")).segment(
        read_image(tiny_cohort.cases[1].image)
    )
    disputed = found.masks["liver"] & found.masks["spleen"]
    assert set(np.unique(found.label_map[disputed])) <= {1, 2}


def test_picture_cases_are_worst_median_and_best():
    scores = pd.DataFrame({"case": list("aabbc"), "dice": [0.1, 0.3, 0.9, 0.9, 0.5]})
    assert picture_cases(scores) == {"worst": "a", "median": "c", "best": "b"}
    assert picture_cases(scores.assign(dice=math.nan)) == {}


def test_picture_is_a_png(predictor, tiny_cohort, tmp_path):
    path = tmp_path / "pictures" / "case.png"
    draw_case(predictor, tiny_cohort.cases[0], tiny_cohort, "a heading", path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    again = tmp_path / "again.png"
    draw_case(predictor, tiny_cohort.cases[0], tiny_cohort, "a heading", again)
    assert path.read_bytes() == again.read_bytes()
