import math
import re
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
import torch
from random_network import save_random

from fullscale.evaluation.calibration import ReliabilityCurve
from fullscale.evaluation.summary import (
    evaluate_network,
    picture_cases,
    score_cases,
    score_trainings,
    summarise,
    summarise_calibration,
    tabulate_calibration,
)
from fullscale.params import EvaluateParams
from fullscale.prediction.network_files import Trained, build, describe_network
from fullscale.prediction.predictor import Predictor, Slab
from fullscale.prediction.segmentation import segment_scan
from fullscale.reporting.overlays import draw_gallery
from fullscale.runtime.errors import StageError
from fullscale.scans.cohort import IGNORED_ID
from fullscale.scans.volume import read_image, read_labels, write_volume
from model.ensemble import Ensemble, list_members
from model.output import gate_weights
from model.preprocessing import IGNORED_LABEL
from tasks.evaluate import draw_case, score_networks

SETTINGS = EvaluateParams(threshold=0.5, batch_size=8, min_false_positive_mm2=98)
"""98 mm2 are two pixels of the tiny scans."""
ORGANS = ("liver", "spleen")
CPU = torch.device("cpu")
CLASSIFIER_COLUMNS = {
    "num_false_closings",
    "num_closed_voxels",
    "num_false_openings",
    "classifier_sensitivity",
    "classifier_specificity",
}


@pytest.fixture(scope="module")
def trained(tiny_params):
    torch.manual_seed(0)
    description = describe_network("unet3plus", tiny_params)
    return Trained(build(description).eval(), description)


@pytest.fixture
def predictor(trained):
    return Predictor(trained, 0.5, 8, torch.device("cpu"))


@dataclass
class Drawn:
    """The prediction of an `Annotator`."""

    masks: dict[str, np.ndarray]
    present: dict[str, np.ndarray] | None

    @property
    def has_classifier(self):
        return self.present is not None

    def open_slices(self, organ, gating):
        return None if self.present is None else self.present[organ] > 0.5

    def gated(self, gating):
        if self.present is None:
            return self
        present = torch.from_numpy(np.stack(list(self.present.values()), axis=1)).float()
        weight_KZ = gate_weights(present, gating).numpy().T
        found = {
            organ: mask * weight_Z[:, None, None]
            for (organ, mask), weight_Z in zip(self.masks.items(), weight_KZ, strict=True)
        }
        return Drawn(found, self.present)

    def slabs(self):
        found = np.stack([self.restore(organ) for organ in self.masks])
        yield Slab(slice(0, found.shape[1]), found, None)

    def restore(self, organ):
        return self.masks[organ].astype(np.float32)

    def organ_probability(self, organ):
        return None if self.present is None else self.present[organ].astype(np.float32)


def opens_predicted_slices(truth, mask):
    return mask.any(axis=(1, 2))


def opens_true_slices(truth, mask):
    return truth.any(axis=(1, 2))


class Annotator(Predictor):
    """Replacement of a network: returns the annotation itself, or an edit of it."""

    def __init__(self, predictor, cohort, edit, classifier, claims=None):
        self.threshold, self.gate, self.num_members, self.refine = 0.5, "hard", 1, "none"
        self.description = predictor.description
        self._edit, self._classifier, self._claims = edit, classifier, claims
        self._labels = {
            read_image(case.image).values_ZYX.tobytes(): read_labels(case.label).values_ZYX
            for case in cohort.cases
        }

    def slice_scan(self, scan):
        return scan

    def predict(self, scan, gating=None):
        labels = self._labels[scan.values_ZYX.tobytes()]
        truths = {organ: np.isin(labels, ids) for organ, ids in self.description.organs.items()}
        masks = {organ: self._edit(organ, truth) for organ, truth in truths.items()}
        if self._claims is not None:
            masks = self._claims(masks)
        present = None
        if self._classifier is not None:
            present = {
                organ: self._classifier(truths[organ], mask) for organ, mask in masks.items()
            }
        return Drawn(masks, present).gated(gating or self.gate)

    def slabs(self, scan, progress=None):
        return self.predict(scan).slabs()


@pytest.fixture
def score_drawn(predictor, tiny_cohort):
    def score(
        edit=lambda organ, mask: mask,
        classifier=opens_predicted_slices,
        calibration=None,
        claims=None,
        **changes,
    ):
        annotator = Annotator(predictor, tiny_cohort, edit, classifier, claims)
        settings = SETTINGS.model_copy(update=changes)
        return score_cases(annotator, tiny_cohort.cases, tiny_cohort, settings, calibration)

    return score


def without_spleen(organ, mask):
    return mask & (organ != "spleen")


def with_speck(organ, mask):
    """The mask and two voxels in a corner of the scan's first slice, another one for each organ."""
    mask = mask.copy()
    first = 2 * ORGANS.index(organ)
    mask[0, 0, first : first + 2] = True
    return mask


def test_perfect_prediction_is_perfect_in_every_score(score_drawn):
    scores = score_drawn()
    for name in ("dice", "iou", "surface_dice_1mm", "surface_dice_3mm"):
        assert (scores[name] == 1).all()
    for name in ("hd95_mm", "mean_surface_distance_mm", "volume_difference_ml", "voxel_fpr"):
        assert (scores[name] == 0).all()
    for name in ("classifier_sensitivity", "classifier_specificity"):
        assert (scores[name].dropna() == 1).all()
    summary = summarise(scores, ORGANS)
    assert summary["test/dice"] == summary["test/dice/liver"] == 1
    assert summary["test/slice_fpr/spleen"] == 0


@pytest.fixture
def partly_judged(predictor, tiny_cohort, tmp_path):
    """A case with slices that nobody judged, all of which its prediction calls liver.

    Elsewhere the prediction is perfect. The fixture is the predictor, the cohort of this case, its
    label map and where nobody judged.
    """
    case = tiny_cohort.cases[0]
    labels = read_labels(case.label)
    ignored = np.zeros(labels.values_ZYX.shape, dtype=bool)
    ignored[:3] = ignored[7] = True
    partly = np.where(ignored, IGNORED_ID, labels.values_ZYX)
    path = tmp_path / "label.nii.gz"
    write_volume(path, labels.to_own_grid(partly), labels.geometry.own_affine)
    cohort = replace(tiny_cohort, cases=(replace(case, label=path),))

    def everywhere(organ, mask):
        return mask | (ignored if organ == "liver" else False)

    annotator = Annotator(predictor, cohort, everywhere, opens_predicted_slices)
    return annotator, cohort, partly, ignored


def test_what_nobody_judged_changes_no_score(partly_judged):
    annotator, cohort, partly, ignored = partly_judged
    curves = {organ: ReliabilityCurve() for organ in ORGANS}
    settings = SETTINGS.model_copy(
        update={"ablate_slice_classifier": True, "largest_component": True}
    )
    scores = score_cases(annotator, cohort.cases, cohort, settings, curves)
    num_judged = np.count_nonzero(~ignored)
    for row in scores.to_dict("records"):
        true = partly == ("liver", "spleen").index(row["organ"]) + 1
        assert row["num_true_voxels"] == np.count_nonzero(true)
        assert row["num_free_voxels"] == num_judged - np.count_nonzero(true)
        num_organ_slices = np.count_nonzero(true.any(axis=(1, 2)))
        assert row["num_organ_slices"] == num_organ_slices
        assert row["num_free_slices"] == len(true) - 4 - num_organ_slices
        assert (row["dice"], row["hd95_mm"], row["volume_difference_ml"]) == (1, 0, 0)
        assert row["dice_no_classifier"] == 1
        assert row["organ"] == "spleen" or row["dice_cleaned"] == 1  # joined where nobody judged
        assert row["num_false_positive_slices"] == row["num_false_openings"] == 0
    assert not any(curve.expected_error for curve in curves.values())


def test_pictures_leave_out_what_nobody_judged(partly_judged):
    annotator, cohort, _, _ = partly_judged
    gallery = draw_gallery([annotator, annotator], cohort.cases[0], cohort, "a title")
    for picture in gallery.pictures:
        true, *predicted = re.findall(r"(?:truth|unet3plus) (\d+)", picture.alt)
        assert predicted == [true, true]


def test_slices_mark_what_nobody_judged_as_training_reads_it():
    assert IGNORED_ID == IGNORED_LABEL


def test_only_annotated_organs_are_scored(score_drawn):
    organs = score_drawn().groupby("case")["organ"].apply(set)
    assert organs["case_00"] == {"liver", "spleen"}
    assert organs["case_06"] == {"liver"}
    assert organs["case_07"] == {"spleen"}


def test_missed_organ_is_a_diagonal_away_and_counts(score_drawn, tiny_cohort):
    scores = score_drawn(without_spleen)
    summary = summarise(scores, ORGANS)
    assert summary["test/dice/spleen"] == summary["test/surface_dice_3mm/spleen"] == 0
    assert summary["test/num_cases/spleen"] == summary["test/num_missed/spleen"] == 7
    assert summary["test/num_missed/liver"] == 0
    scan = read_image(tiny_cohort.cases[0].image)
    diagonal = math.hypot(*np.multiply(scan.values_ZYX.shape, scan.spacing_mm))
    first = scores[(scores["case"] == "case_00") & (scores["organ"] == "spleen")]
    assert first["hd95_mm"].item() == pytest.approx(diagonal)
    assert first["volume_difference_ml"].item() < 0


def test_scores_use_the_scans_own_spacing(score_drawn, tiny_cohort):
    """A mask moved by one slice is one slice spacing away."""
    scores = score_drawn(lambda organ, mask: np.roll(mask, 1, axis=0))
    slice_mm = {case.name: read_image(case.image).spacing_mm[0] for case in tiny_cohort.cases}
    assert (scores["hd95_mm"] <= scores["case"].map(slice_mm) + 1e-6).all()
    assert (scores["mean_surface_distance_mm"] > 0).all()


def test_network_without_a_classifier_has_no_scores_of_one(score_drawn):
    with_classifier, without = score_drawn(), score_drawn(classifier=None)
    assert set(with_classifier) - set(without) == CLASSIFIER_COLUMNS
    summary = summarise(without, ORGANS)
    assert not [key for key in summary if "classifier" in key or "clos" in key or "opening" in key]
    assert summary["test/dice"] == summarise(with_classifier, ORGANS)["test/dice"]


def test_largest_component_is_scored_beside_the_raw_prediction(score_drawn):
    raw, both = score_drawn(with_speck), score_drawn(with_speck, largest_component=True)
    pd.testing.assert_frame_equal(both[raw.columns], raw)
    assert (both["num_false_positive_voxels"] == 2).all()
    assert (both["dice"] < 1).all()
    assert (both["num_false_positive_voxels_cleaned"] == 0).all()
    assert (both["dice_cleaned"] == 1).all()
    assert (both["mean_surface_distance_mm_cleaned"] == 0).all()
    summary = summarise(both, ORGANS)
    assert summary["test/dice_cleaned/liver"] == 1 > summary["test/dice/liver"]
    assert summary["test/voxel_fpr_cleaned/liver"] == 0 < summary["test/voxel_fpr/liver"]


def test_nothing_is_cleaned_unless_asked(score_drawn):
    assert not [name for name in score_drawn() if name.endswith("_cleaned")]


def test_ablation_scores_variants_of_the_same_prediction(score_drawn):
    """A speck in an organ-free slice, which the slice classifier removes."""
    scores = score_drawn(with_speck, classifier=opens_true_slices, ablate_slice_classifier=True)
    assert (scores["dice"] == 1).all()
    assert (scores["num_false_positive_slices"] == 0).all()
    assert (scores["dice_no_classifier"] < 1).all()
    assert (scores["dice_soft_classifier"] == 1).all()
    assert (scores["num_false_positive_slices_no_classifier"] == 1).all()
    assert (scores["num_false_positive_slices_soft_classifier"] == 0).all()
    summary = summarise(scores, ORGANS)
    assert summary["test/dice_no_classifier/liver"] < summary["test/dice/liver"] == 1
    assert (
        summary["test/slice_fpr_no_classifier/liver"]
        > summary["test/slice_fpr_soft_classifier/liver"]
        == 0
    )


def test_voxel_of_two_organs_is_scored_as_the_label_map_has_it(score_drawn):
    """Liver and spleen both claim the liver; the more probable one has it."""

    def both(organ, mask, truths):
        return mask if organ == "liver" else np.where(truths["liver"], 0.6, mask)

    scores = score_drawn(claims=lambda truths: {k: both(k, v, truths) for k, v in truths.items()})
    assert (scores["dice"] == 1).all()
    swapped = score_drawn(
        claims=lambda truths: {k: both(k, v * 0.55, truths) for k, v in truths.items()}
    )
    liver = swapped[swapped["organ"] == "liver"]
    assert (liver["dice"] == 0).all()
    assert (liver["num_predicted_voxels"] == 0).all()
    spleen = swapped[swapped["organ"] == "spleen"]
    assert (spleen["num_false_positive_voxels"] > 0).any()


@pytest.mark.parametrize("gating", ["hard", "slab", "soft", "none"])
def test_scores_are_those_of_the_label_map_that_predict_writes(tiny_params, tiny_cohort, gating):
    """An untrained network, whose organs overlap in most voxels."""
    torch.manual_seed(5)
    description = describe_network("unet3plus", tiny_params)
    network = build(description).eval()
    predictor = Predictor(Trained(network, description), 0.3, 8, CPU, gate=gating)
    scan = read_image(tiny_cohort.cases[0].image)
    slices = predictor.slice_scan(scan)
    plain = predictor.predict(slices, "none")
    assert (plain.restore("liver") >= 0.3).any()
    assert ((plain.restore("liver") >= 0.3) & (plain.restore("spleen") >= 0.3)).any()
    directly = predictor.label_map(predictor.predict(slices))
    assert set(np.unique(directly)) - {0}
    assert (predictor.label_map(plain.gated(gating)) != directly).mean() < 1e-3
    np.testing.assert_array_equal(directly, segment_scan(predictor, scan).label_ZYX)


def test_network_without_a_classifier_has_nothing_to_ablate(score_drawn):
    plain, ablated = (
        score_drawn(classifier=None),
        score_drawn(classifier=None, ablate_slice_classifier=True),
    )
    pd.testing.assert_frame_equal(plain, ablated)


def test_calibration_counts_annotated_organs_after_the_classifier(score_drawn):
    curves = {organ: ReliabilityCurve() for organ in ORGANS}
    score_drawn(with_speck, classifier=opens_true_slices, calibration=curves)
    table = tabulate_calibration(curves)
    assert set(table["organ"]) == set(ORGANS)
    assert set(table["bin_low"]) == {0.0, 0.9}
    assert (table["fraction_true"] == (table["bin_low"] > 0.5)).all()
    summary = summarise_calibration(curves)
    assert summary["test/ece/liver"] == summary["test/ece/spleen"] == 0
    liver = table.loc[table["organ"] == "liver", "num_voxels"].sum()
    assert summary["test/num_calibration_voxels/liver"] == liver > 0


def test_calibration_of_an_organ_that_was_not_seen_is_left_out():
    curves = {"liver": ReliabilityCurve()}
    assert summarise_calibration(curves) == {}
    assert tabulate_calibration(curves).empty
    assert "fraction_true" in tabulate_calibration(curves)


def test_slices_closed_afterwards_are_what_serving_segments(tiny_params, tiny_cohort):
    """Some slices closed: slices and masks as the path that skips the decoder makes them."""
    description = describe_network("unet3plus", tiny_params)
    torch.manual_seed(3)
    network = build(description).eval()
    cases = tiny_cohort.cases[:3]
    with torch.no_grad():  # bias of the median slice, so that about half of the slices are open
        probe = Predictor(Trained(network, description), 0.5, 8, torch.device("cpu"))
        odds = torch.cat(
            [
                probe.predict(probe.slice_scan(read_image(case.image))).prediction.organ_probability
                for case in cases
            ]
        ).logit()
        network.classifier.conv.bias.view(2, 2)[:, 1] -= odds.quantile(0.5, dim=0)
    predictor = Predictor(Trained(network, description), 0.5, 8, torch.device("cpu"))
    closed = []
    for case in cases:
        scan = read_image(case.image)
        slices = predictor.slice_scan(scan)
        hard, plain = predictor.predict(slices), predictor.predict(slices, "none")
        for organ in ORGANS:
            present = hard.organ_probability(organ)
            assert np.array_equal(present > 0.5, plain.organ_probability(organ) > 0.5)
            probability = plain.restore(organ)
            probability[present <= 0.5] = 0
            assert np.allclose(probability, hard.restore(organ), atol=1e-5)
            closed.append((present <= 0.5).mean())
    assert 0 < np.mean(closed) < 1


def make_rows(**columns):
    counts = {
        "num_organ_slices": 4,
        "num_free_slices": 6,
        "num_false_positive_slices": 0,
        "num_false_positive_voxels": 0,
        "num_free_voxels": 100,
        "num_false_closings": 0,
        "num_closed_voxels": 0,
        "num_false_openings": 0,
        "num_true_voxels": [50, 0, 50],
        "num_predicted_voxels": [40, 0, 60],
        "patient": ["a", "b", "c"],
    }
    dice = [0.5, 1.0, 0.7]
    return pd.DataFrame({"organ": "liver", "dice": dice, **counts, **columns})


def test_summary_counts_organ_free_cases_and_says_so():
    summary = summarise(make_rows(hd95_mm=[3.0, math.nan, 5.0]), ["liver"])
    assert summary["test/dice/liver"] == pytest.approx(2.2 / 3)
    assert summary["test/hd95_mm/liver"] == pytest.approx(4)
    assert summary["test/num_cases/liver"] == summary["test/num_pairs"] == 3
    assert summary["test/num_organ_free/liver"] == 1
    assert summary["test/num_missed/liver"] == 0


def test_annotation_is_read_with_the_label_ids_asked_for(predictor, tiny_cohort, score_drawn):
    """A network whose spleen is label 2, where the annotation now has the spleen as label 1."""
    annotator = Annotator(predictor, tiny_cohort, lambda organ, mask: mask, None)
    scores = score_cases(
        annotator, tiny_cohort.cases, tiny_cohort, SETTINGS, organs={"spleen": (1,)}
    )
    own = score_drawn(classifier=None)
    assert set(scores["organ"]) == {"spleen"}
    liver = own.loc[own["organ"] == "liver", "num_true_voxels"].tolist()
    assert scores["num_true_voxels"].tolist() == liver
    assert (scores["dice"] < 0.1).all()


def test_summary_pools_rates_over_cases():
    rows = make_rows(
        num_free_slices=[1, 9, 10],
        num_false_positive_slices=[1, 0, 1],
        num_false_closings=[1, 0, 2],
        num_closed_voxels=[5, 0, 10],
        num_false_openings=[0, 2, 3],
    )
    summary = summarise(rows, ["liver"])
    assert summary["test/slice_fpr/liver"] == pytest.approx(2 / 20)
    assert summary["test/false_closings/liver"] == pytest.approx(3 / 12)
    assert summary["test/classifier_sensitivity/liver"] == pytest.approx(9 / 12)
    assert summary["test/classifier_specificity/liver"] == pytest.approx(15 / 20)
    assert summary["test/closed_volume/liver"] == pytest.approx(15 / 100)
    assert summary["test/num_free_slices/liver"] == 20
    assert summary["test/num_organ_slices/liver"] == 12


def test_summary_leaves_out_what_cannot_be_measured():
    summary = summarise(make_rows(num_free_slices=0), ["liver"])
    assert "test/slice_fpr/liver" not in summary
    assert "test/classifier_specificity/liver" not in summary


def test_summary_of_an_organ_that_no_case_annotates_says_zero_cases():
    summary = summarise(make_rows(), ["liver", "spleen"])
    assert summary["test/num_cases/spleen"] == 0
    assert "test/dice/spleen" not in summary


def many_rows():
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            **{name: make_rows()[name][0] for name in make_rows()},
            "patient": [f"p{number // 2}" for number in range(20)],
            "dice": rng.beta(12, 2, 20),
            "hd95_mm": rng.lognormal(1, 1, 20),
            "num_false_positive_slices": rng.integers(0, 3, 20),
        }
    )


def test_summary_has_an_interval_for_each_mean_and_rate(tiny_params):
    summary = summarise(many_rows(), ["liver"], tiny_params.register_)
    for metric in ("dice", "hd95_mm", "slice_fpr"):
        low, mean, high = (summary[f"test/{metric}{end}/liver"] for end in ("_low", "", "_high"))
        assert low < mean < high
    assert summary["test/dice_low"] == summary["test/dice_low/liver"]
    assert summary["test/dice_high/liver"] <= 1


def test_intervals_change_no_mean(tiny_params):
    plain = summarise(many_rows(), ["liver"])
    summary = summarise(many_rows(), ["liver"], tiny_params.register_)
    assert {key: summary[key] for key in plain} == plain
    assert {key.split("/")[1].rsplit("_", 1)[1] for key in set(summary) - set(plain)} == {
        "low",
        "high",
    }


def test_interval_without_width_or_end_is_left_out(tiny_params):
    rows = make_rows(dice=[0.8, 0.8, 0.8], hd95_mm=[1.0, math.nan, 2.0])
    summary = summarise(rows, ["liver"], tiny_params.register_)
    assert not [key for key in summary if "_low" in key or "_high" in key]


def test_one_event_gives_a_rate_but_no_interval(tiny_params):
    rows = many_rows().assign(num_false_positive_slices=[1] + [0] * 19)
    summary = summarise(rows, ["liver"], tiny_params.register_)
    assert summary["test/slice_fpr/liver"] == pytest.approx(1 / 120)
    assert "test/slice_fpr_high/liver" not in summary
    assert "test/dice_high/liver" in summary


def test_evaluation_names_missing_cases(trained, tiny_cohort):
    with pytest.raises(StageError, match=r"data/ lacks cases case_98, case_99"):
        evaluate_network(trained, tiny_cohort, ["case_00", "case_99", "case_98"], SETTINGS)


def test_evaluation_refuses_empty_test_set(trained, tiny_cohort):
    with pytest.raises(StageError, match="the split holds no test cases"):
        evaluate_network(trained, tiny_cohort, [], SETTINGS)


def test_segmentation_lies_on_the_scan(predictor, tiny_cohort):
    for case in tiny_cohort.cases[:4]:
        scan = read_image(case.image)
        found = predictor.segment(scan)
        assert found.label_map.shape == scan.values_ZYX.shape
        assert set(np.unique(found.label_map)) <= {0, 1, 2}
        for organ, mask in found.masks.items():
            assert np.array_equal(mask, found.label_map == predictor.description.organs[organ][0])


def test_closed_classifier_leaves_slices_empty(tiny_params, tiny_cohort):
    description = describe_network("unet3plus", tiny_params)
    network = build(description).eval()
    with torch.no_grad():
        network.classifier.conv.bias.copy_(torch.tensor([-100.0, 100.0, 100.0, -100.0]))
    predictor = Predictor(Trained(network, description), 0.001, 8, torch.device("cpu"))
    scan = read_image(tiny_cohort.cases[0].image)
    found = predictor.predict(predictor.slice_scan(scan))
    assert (found.organ_probability("liver") > 0.5).all()
    assert not (found.organ_probability("spleen") > 0.5).any()
    assert found.restore("spleen").max() == 0
    masks = predictor.segment(scan).masks
    assert masks["liver"].any()
    assert not masks["spleen"].any()


def test_restored_probability_is_what_segmentation_thresholds(predictor, tiny_cohort):
    scan = read_image(tiny_cohort.cases[2].image)
    found = predictor.predict(predictor.slice_scan(scan))
    masks = predictor.segment(scan).masks
    for organ in ORGANS:
        probability = found.restore(organ)
        assert probability.dtype == np.float32
        assert 0 <= probability.min() <= probability.max() <= 1 + 1e-6
        other = found.restore(next(each for each in ORGANS if each != organ))
        sure = (probability >= 0.5) & (probability > other)
        assert masks[organ][sure].all()
        assert not masks[organ][probability < 0.5].any()


def test_more_probable_organ_has_a_disputed_voxel(trained, tiny_cohort):
    predictor = Predictor(trained, 0.001, 8, torch.device("cpu"))
    found = predictor.predict(predictor.slice_scan(read_image(tiny_cohort.cases[1].image)))
    liver, spleen = found.restore("liver"), found.restore("spleen")
    disputed = (liver >= 0.001) & (spleen >= 0.001)
    assert disputed.any()
    expected = np.where(spleen >= liver, 2, 1)[disputed]
    assert np.array_equal(predictor.label_map(found)[disputed], expected)


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


@pytest.mark.parametrize("ablate", [True, False])
def test_trainings_and_their_ensemble_have_the_scores_of_each_by_itself(
    tiny_params, tiny_cohort, monkeypatch, ablate
):
    """No training segments a case a second time for the ensemble; all share its slices."""
    description = describe_network("unet3plus", tiny_params)
    trained = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        trained.append(Trained(build(description).eval(), description))
    networks = [network for each in trained for network in list_members(each.network)]
    predictors = [Predictor(each, 0.5, 8, CPU) for each in trained]
    ensemble = Predictor(Trained(Ensemble(networks), description), 0.5, 8, CPU)
    settings = SETTINGS.model_copy(update={"ablate_slice_classifier": ablate})
    cases = tiny_cohort.cases[:3]
    wanted = [score_cases(each, cases, tiny_cohort, settings) for each in (*predictors, ensemble)]
    sliced, segmented = [], []
    slice_scan, predict = Predictor.slice_scan, Predictor.predict

    def count_scans(predictor, scan):
        sliced.append(predictor)
        return slice_scan(predictor, scan)

    def count(predictor, slices, gating=None):
        segmented.append(predictor)
        return predict(predictor, slices, gating)

    monkeypatch.setattr(Predictor, "slice_scan", count_scans)
    monkeypatch.setattr(Predictor, "predict", count)
    curves = [{organ: ReliabilityCurve() for organ in ORGANS} for _ in wanted]
    found = score_trainings(predictors, ensemble, cases, tiny_cohort, settings, curves)
    assert len(sliced) == 3
    assert segmented == predictors * 3
    for table, single in zip(found, wanted, strict=True):
        pd.testing.assert_frame_equal(table, single)
    assert "dice_no_classifier" not in found[-1]
    assert all(curve["liver"].num_voxels for curve in curves)


@pytest.mark.parametrize("calibrated", [[0], [1], [0, 1], []])
def test_voxels_are_counted_for_what_is_registered_alone(
    tiny_params, tiny_cohort, tmp_path, calibrated
):
    folders = [save_random(tmp_path / str(seed), tiny_params, seed=seed) for seed in (0, 1)]
    names = [tiny_cohort.cases[0].name]
    chosen = [folders[index] for index in calibrated]
    found = score_networks(folders, tiny_cohort, names, tiny_params, chosen)
    wanted = [calibrated == members for members in ([0], [1], [0, 1])]
    assert [bool(each.calibration) for each in found] == wanted
    assert all(each.calibration["liver"].num_voxels for each in found if each.calibration)
