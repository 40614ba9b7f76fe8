import base64
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from mlflow import MlflowClient
from project import ROOT
from tiny import TINY, changed
from typer.testing import CliRunner

from fullscale.evaluation.calibration import ReliabilityCurve
from fullscale.evaluation.promotion_gate import Trial, judge
from fullscale.evaluation.score_files import write_calibration, write_scores, write_summary
from fullscale.evaluation.slice_pictures import choose_slices
from fullscale.evaluation.summary import (
    picture_cases,
    summarise,
    summarise_calibration,
    tabulate_calibration,
)
from fullscale.params import Params, load_params
from fullscale.prediction.network_files import build, describe_network, save_trained
from fullscale.reporting.charts import (
    draw_bars,
    draw_boxes,
    draw_gains,
    draw_histories,
    draw_reliability,
)
from fullscale.reporting.numbers import (
    Metric,
    count,
    number,
    p_value,
    part_of,
    percent,
    with_interval,
)
from fullscale.reporting.overlays import STYLES, crop, draw_galleries, draw_slice
from fullscale.reporting.page import render
from fullscale.reporting.provenance_section import (
    changed_parameters,
    find_changes,
    provenance_section,
)
from fullscale.reporting.results import read_results
from fullscale.reporting.sections import (
    gain_charts,
    score_section,
    surface_section,
    verdict_section,
    verdict_words,
)
from fullscale.reporting.style import (
    DARK,
    SERIES_STYLES,
    assign_styles,
    new_chart,
    to_png_uri,
    to_svg_uri,
)
from fullscale.reporting.tables import (
    ablation_table,
    calibration_table,
    classifier_table,
    comparison_table,
    criteria_table,
    false_slice_table,
    score_table,
    surface_table,
)
from fullscale.runtime.errors import StageError
from fullscale.runtime.files import file_sha256
from fullscale.scans.cohort import read_cohort
from fullscale.tracking.run_record import RunDescription
from fullscale.tracking.runs import training_run
from fullscale.tracking.store import WEIGHTS_TAG
from fullscale.training.history import write_history
from fullscale.versioning.provenance import Provenance, library_versions
from fullscale.workspace import open_workspace
from tasks.cli import app
from tasks.register import record_verdict
from tasks.report import track_report, write_report

ORGANS = ("liver", "spleen")
NETWORKS = ("unet", "unet3plus")
TEST_SET = "1234567890abcdef"
CASES = [f"case_{place:02d}" for place in range(8)]
ABSENT = {"case_06": "spleen", "case_07": "liver"}
PROVENANCE = Provenance("c" * 40, "aaaa.dir")
NAN = math.nan
TIED = "\u00a0"


class Page(HTMLParser):
    """The page's text by section, its pictures and every tag with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.pictures, self.text = [], [], {"": ""}
        self._section = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag == "section":
            self._section = attributes["id"]
            self.text[self._section] = ""
        if tag == "img":
            self.pictures.append((self._section, attributes))

    def handle_data(self, data):
        self.text[self._section] += data


def scores_of(dice, *, classifier):
    """Rows as stage evaluate writes them; `dice` is the first case's, later ones are lower."""
    rows = []
    for place, case in enumerate(CASES):
        for organ in ORGANS:
            if ABSENT.get(case) == organ:
                continue
            score = dice - 0.01 * place
            row = {
                "case": case,
                "patient": case.replace("case", "patient"),
                "organ": organ,
                "dice": score,
                "iou": score / (2 - score),
                "hd95_mm": 5.0 + place,
                "mean_surface_distance_mm": 1.0 + 0.1 * place,
                "surface_dice_1mm": score - 0.2,
                "surface_dice_3mm": score - 0.1,
                "area_surface_dice_1mm": score - 0.25,
                "area_surface_dice_3mm": score - 0.15,
                "volume_difference_ml": 2.0 * place - 5,
                "num_true_voxels": 1000,
                "num_predicted_voxels": 990,
                "num_organ_slices": 20,
                "num_free_slices": 10,
                "num_near_free_slices": 4,
                "num_remote_free_slices": 6,
                "num_false_positive_slices": place % 2,
                "num_near_false_positive_slices": place % 2,
                "num_remote_false_positive_slices": 0,
                "num_false_positive_voxels": 30,
                "num_free_voxels": 50000,
            }
            if classifier:
                row |= {
                    "num_false_closings": place % 3,
                    "num_closed_voxels": 7,
                    "num_false_openings": 1,
                    "dice_no_classifier": score - 0.05,
                    "num_false_positive_slices_no_classifier": 3,
                    "dice_soft_classifier": score - 0.02,
                    "num_false_positive_slices_soft_classifier": 2,
                    "dice_slab_classifier": score + 0.01,
                    "num_false_positive_slices_slab_classifier": 2,
                }
            rows.append(row)
    return pd.DataFrame(rows)


def curve_of(offset):
    curve = ReliabilityCurve()
    probability = np.linspace(0.05, 0.95, 64, dtype=np.float32).reshape(4, 4, 4)
    curve.add(probability, probability > 0.5 + offset, (1.0, 1.0, 1.0))
    return curve


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_params):
    """A project after its stages: reports by the stages' own writers, tiny trained networks."""
    root = tmp_path_factory.mktemp("finished")
    (root / "params.yaml").write_text(yaml.safe_dump(changed(TINY), sort_keys=False))
    (root / "data.dvc").write_text("outs:\n- md5: aaaa.dir\n  path: data\n")
    tables, workspace = {}, open_workspace(root)
    for seed, (name, dice) in enumerate(zip(NETWORKS, (0.8, 0.9), strict=True)):
        torch.manual_seed(seed)
        description = describe_network(name, tiny_params)
        save_trained(root / "artifacts/train" / name / "0", build(description), description)
        write_history(
            root / "artifacts/train" / name / "0/history.csv",
            [{"epoch": n, "val/dice": dice * n / 3, "train/total": 1 / n} for n in (1, 2, 3)],
        )
        tables[name] = scores_of(dice, classifier=name == "unet3plus")
        write_scores(workspace, name, {0: tables[name]})
        curves = {organ: curve_of(0.1 * seed) for organ in ORGANS}
        write_calibration(workspace, name, tabulate_calibration(curves))
        metrics = summarise(tables[name], ORGANS, tiny_params.register_)
        metrics |= summarise_calibration(curves)
        write_summary(workspace, name, TEST_SET, metrics, (0,), (0,))
    trial = Trial(ORGANS, TEST_SET)
    verdict = judge(tables["unet3plus"], tables["unet"], None, trial, tiny_params.register_)
    record_verdict(verdict, tiny_params, workspace, PROVENANCE.data_version)
    return root


@pytest.fixture
def project(finished, tmp_path):
    """A copy to change."""
    return shutil.copytree(finished, tmp_path / "project")


@pytest.fixture
def results(project, tiny_params):
    return read(project, tiny_params)


def read(project, params):
    return read_results(open_workspace(project), params)


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def page(finished):
    """The page of the run as it is, for who only assign_styles at it."""
    return written(finished)[0]


def rendered(results, *sections):
    """A page of some sections only."""
    return Page(render(list(sections), "title", results.notes, "none", verdict_words(results)))


def written(project, **options):
    """The page, and what its writer has to tell."""
    output = project / "page.html"
    params = load_params(project / "params.yaml")
    results = read(project, params)
    report = write_report(results, params, output, **{"with_overlays": False, **options})
    return Page(output.read_text()), list(report.notes)


def cells(table, *names):
    """The row that starts with these names, by heading."""
    (row,) = [row for row in table.rows if row[: len(names)] == names]
    return dict(zip(table.headings, row, strict=True))


# Numbers as text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (number(0.12345, 3), "0.123"),
        (number(0.5, 2, sign=True), "+0.50"),
        (number(-0.5, 2, sign=True), "-0.50"),
        (number(NAN, 3), "not measured"),
        (number(None, 3), "not measured"),
        (number(math.inf, 3), "not measured"),
        (count(12345), "12,345"),
        (count(NAN), "not measured"),
        (p_value(0.03125), "0.031"),
        (p_value(None), "not measured"),
        (percent(0.95), "95%"),
        (part_of(3, 160), f"3{TIED}of{TIED}160 (0.0187)"),
        (part_of(0, 0), f"0{TIED}of{TIED}0"),
        (with_interval(0.5, 0.4, 0.6, 2), f"0.50 (0.40{TIED}to{TIED}0.60)"),
        (with_interval(0.5, NAN, NAN, 2), "0.50"),
        (with_interval(0.5, None, 0.6, 2), "0.50"),
        (with_interval(-1.0, -2.0, 3.0, 1, sign=True), f"-1.0 (-2.0{TIED}to{TIED}+3.0)"),
    ],
)
def test_number_as_text(text, wanted):
    assert text == wanted


def test_metric_reads_its_key_of_a_summary():
    metric = Metric("dice", "Dice", 2)
    summary = {"test/dice/liver": 0.5, "test/dice_low/liver": 0.25, "test/dice_high/liver": None}
    assert metric.read(summary, "liver") == 0.5
    assert metric.read(summary, "liver", "_low") == 0.25
    assert math.isnan(metric.read(summary, "liver", "_high"))
    assert metric.write(summary, "spleen") == "not measured"


# What is read


def test_complete_run_is_read_without_a_note(results):
    assert results.notes == []
    assert results.networks == NETWORKS
    assert (results.candidate, results.baseline) == ("unet3plus", "unet")
    assert results.verdict["status"] == "pass"
    for kept in (results.scores, results.calibration, results.histories):
        assert tuple(kept) == NETWORKS


@pytest.mark.parametrize(
    ("file", "note"),
    [
        ("reports/gate.json", "is missing: run `dvc repro register`."),
        ("reports/unet/summary.json", "is missing: run `dvc repro evaluate@unet`."),
        ("reports/unet/cases.csv", "is missing: run `dvc repro evaluate@unet`."),
        ("reports/unet3plus/calibration.csv", "is missing: run `dvc repro evaluate@unet3plus`."),
        ("artifacts/train/unet/0/history.csv", "is missing: run `dvc repro train@unet-0`."),
    ],
)
def test_missing_file_is_a_note(project, tiny_params, file, note):
    (project / file).unlink()
    (found,) = read(project, tiny_params).notes
    assert found == f"{file} {note}"


def test_page_of_one_summary_alone_is_written(project):
    shutil.rmtree(project / "artifacts")
    for path in (project / "reports").rglob("*.*"):
        if path != project / "reports/unet3plus/summary.json":
            path.unlink()
    page, notes = written(project, with_overlays=True)
    assert len(notes) == 8
    assert all(note in page.text[""] for note in notes)
    assert "0.870" in page.text["scores"]
    assert "No box plots" in page.text["scores"]
    assert "No learning curves" in page.text["learning"]
    assert "No pictures of cases: there are no scores of unet3plus" in page.text["cases"]


def test_networks_without_a_summary_are_left_out(project, tiny_params):
    (project / "reports/unet/summary.json").unlink()
    results = read(project, tiny_params)
    assert results.networks == ("unet3plus",)
    section = score_section(results, tiny_params)
    assert [row[1] for row in section.tables[0].rows] == ["unet3plus"] * 2
    assert len(section.pictures) == 3


def test_run_without_any_summary_is_an_error(project, tiny_params):
    for name in NETWORKS:
        (project / "reports" / name / "summary.json").unlink()
    with pytest.raises(StageError, match=r"no summary\.json of any of unet, unet3plus; run `make"):
        read(project, tiny_params)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("reports/gate.json", "{", r"gate\.json cannot be read .*`dvc repro register`"),
        ("reports/gate.json", '{"status": "pass"}', "it lacks baseline, candidate, criteria, "),
        ("reports/unet/summary.json", "[]", "wanted an object, found list"),
        ("reports/unet/cases.csv", "", r"cases\.csv cannot be read .*No columns"),
        ("reports/unet/cases.csv", "case,dice\n", "it lacks organ"),
        ("reports/unet/calibration.csv", "organ\n", "it lacks fraction_true, mean_probability"),
        ("artifacts/train/unet/0/history.csv", "epoch\nmany\n", "history.csv cannot be read"),
        ("artifacts/train/unet/0/history.csv", "dice\n1\n", "history.csv cannot be read"),
    ],
)
def test_damaged_file_is_named_with_its_cure(project, tiny_params, file, content, message):
    (project / file).write_text(content)
    with pytest.raises(StageError, match=message):
        read(project, tiny_params)


def test_scores_of_another_test_set_are_pointed_out(project, tiny_params):
    edit_json(project / "reports/unet/summary.json", lambda each: each.update(test_set="f" * 16))
    (note,) = read(project, tiny_params).notes
    assert f"scores of unet are from test set {'f' * 16}, the verdict" in note


def test_verdict_that_is_older_than_the_scores_is_pointed_out(project, tiny_params):
    scores = project / "reports/unet/cases.csv"
    gate = project / "reports/gate.json"
    edit_json(gate, lambda each: each.update(scores_sha256={"unet": file_sha256(scores)}))
    assert read(project, tiny_params).notes == []
    scores.write_text(scores.read_text() + "\n")
    (note,) = read(project, tiny_params).notes
    assert note == "The verdict was made from other scores of unet than these: run `dvc repro`."


# Tables


def test_criteria_table_says_what_the_verdict_says(results):
    criteria = results.verdict["criteria"]
    criteria[1]["passed"] = False
    table = criteria_table(results)
    assert len(table.rows) == len(criteria) == 9
    for place, (row, criterion) in enumerate(zip(table.rows, criteria, strict=True)):
        assert row == ("FAIL" if place == 1 else "PASS", criterion["found"], criterion["wanted"])


def test_comparison_table_has_every_organ_and_all(results):
    row = cells(comparison_table(results), "unet3plus - unet", "all")
    assert row["difference in Dice"].startswith("+0.1000")
    assert (row["patients"], row["pairs"]) == ("8", "14")
    assert [row[1] for row in comparison_table(results).rows] == ["all", *ORGANS]


def test_score_table_shows_value_interval_and_counts(results):
    row = cells(score_table(results), "liver", "unet3plus")
    summary = results.summaries["unet3plus"]
    low, high = (f"{summary[f'test/dice_{end}/liver']:.3f}" for end in ("low", "high"))
    assert row["Dice"] == f"{summary['test/dice/liver']:.3f} ({low}{TIED}to{TIED}{high})"
    assert (row["cases"], row["missed"], row["organ-free slices"]) == ("7", "0", "70")
    assert row["slice FPR"].startswith(f"{3 / 70:.4f}")
    assert len(score_table(results).rows) == 4


def test_older_summary_loses_a_column_and_gains_a_note(project, tiny_params):
    for name in NETWORKS:
        edit_json(
            project / "reports" / name / "summary.json",
            lambda each: [each.pop(key) for key in list(each) if "iou" in key or "hd95" in key],
        )
    results = read(project, tiny_params)
    table = score_table(results)
    assert "IoU" not in table.headings
    assert table.notes == ("Not in these results: IoU.",)
    page = rendered(results, surface_section(results))
    assert "Not in these results: HD95, mm." in page.text["surfaces"]
    assert page.text["surfaces"].count("HD95, mm") == 1


def test_metric_of_one_network_alone_is_not_measured_for_the_other(project, tiny_params):
    edit_json(project / "reports/unet/summary.json", lambda each: each.pop("test/iou/liver"))
    table = score_table(read(project, tiny_params))
    assert cells(table, "liver", "unet")["IoU"] == "not measured"
    assert cells(table, "liver", "unet3plus")["IoU"] != "not measured"
    assert table.notes == ()


def test_surface_table_has_units_in_its_headings(results):
    table = surface_table(results)
    assert {"HD95, mm", "mean surface distance, mm", "volume difference, ml"} <= {*table.headings}
    assert cells(table, "liver", "unet")["HD95, mm"].startswith("8.0 (")


def test_classifier_table_counts_closings_and_openings(results):
    table = classifier_table(results)
    assert [row[:2] for row in table.rows] == [(organ, "unet3plus") for organ in ORGANS]
    row = cells(table, "liver", "unet3plus")
    assert row["false closings, of organ slices"] == f"6{TIED}of{TIED}140 (0.0429)"
    assert row["voxels lost by them, of the organ"] == f"49{TIED}of{TIED}7,000 (0.0070)"
    assert row["false openings, of organ-free slices"] == f"7{TIED}of{TIED}70 (0.1000)"


def test_ablation_table_has_a_row_for_each_use_of_the_classifier(results):
    table = ablation_table(results)
    assert [row[2] for row in table.rows] == ["none", "soft", "slab", "hard"] * 2
    summary = results.summaries["unet3plus"]
    suffixes = {"none": "_no_classifier", "soft": "_soft_classifier", "slab": "_slab_classifier"}
    for use, suffix in {**suffixes, "hard": ""}.items():
        row = cells(table, "spleen", "unet3plus", use)
        assert row["Dice"].startswith(f"{summary[f'test/dice{suffix}/spleen']:.3f}")
        assert row["slice FPR"].startswith(f"{summary[f'test/slice_fpr{suffix}/spleen']:.4f}")


@pytest.mark.parametrize(
    ("renamed", "gates"),
    [
        ({"_slab_classifier": "_hard_classifier"}, ["none", "soft", "hard", "slab"]),
        ({"_no_classifier": "_hard_classifier"}, ["soft", "slab", "hard", "none"]),
        ({"_slab_classifier": "_unknown"}, ["none", "soft", "hard"]),
    ],
)
def test_ablation_table_names_the_gate_that_was_used(project, tiny_params, renamed, gates):
    path = project / "reports/unet3plus/summary.json"
    text = path.read_text()
    for present, other in renamed.items():
        text = text.replace(present, other)
    path.write_text(text)
    table = ablation_table(read(project, tiny_params))
    assert [row[2] for row in table.rows] == gates * 2


def test_false_positives_next_to_the_organ_have_a_table_of_their_own(results):
    row = cells(false_slice_table(results), "liver", "unet3plus")
    assert row["slice FPR next to the organ"].startswith("0.1")
    assert row["slice FPR elsewhere"].startswith("0.0000")
    assert row["organ-free slices elsewhere"] == "42"


def test_calibration_table_shows_the_summary(results):
    row = cells(calibration_table(results), "liver", "unet")
    assert row["expected calibration error"] == f"{results.summaries['unet']['test/ece/liver']:.4f}"
    assert row["voxels"] == "64"


# Charts


def test_boxes_join_cases_and_dash_where_the_candidate_is_worse():
    scores = {name: scores_of(0.8, classifier=False) for name in NETWORKS}
    scores["unet3plus"].loc[scores["unet3plus"]["case"] == "case_03", "dice"] = 0.3
    figure, alt = draw_boxes(scores, NETWORKS, "liver", ("unet3plus", "unet"))
    joined = [line for line in figure.axes[0].get_lines() if list(line.get_xdata()) == [1, 2]]
    assert len(joined) == 7
    (dashed,) = [line for line in joined if line.get_linestyle() == "--"]
    assert list(dashed.get_ydata()) == pytest.approx([0.77, 0.3])
    assert "unet median 0.770 of 7 cases" in alt
    assert "unet3plus is higher in 0 of 7 pairs" in alt


def test_boxes_leave_out_what_has_no_dice():
    scores = {name: scores_of(0.8, classifier=False) for name in NETWORKS}
    scores["unet"].loc[scores["unet"]["case"] == "case_00", "dice"] = NAN
    _, alt = draw_boxes(scores, NETWORKS, "liver", ("unet3plus", "unet"))
    assert "unet median 0.765 of 6 cases" in alt
    assert "of 6 pairs" in alt
    assert draw_boxes(scores, NETWORKS, "kidney", ("unet3plus", "unet")) is None
    del scores["unet"]
    _, alt = draw_boxes(scores, NETWORKS, "liver", ("unet3plus", "unet"))
    assert alt == "Box plots of Dice, liver: unet3plus median 0.770 of 7 cases."


def test_bars_stand_at_their_values_with_limit_and_interval():
    series = {"unet": [(0.02, 0.01, 0.05), (NAN, NAN, NAN)], "unet3plus": [(0.0, NAN, NAN)] * 2}
    figure, alt = draw_bars("Slice FPR", "slice FPR", ORGANS, series, 4, limit=0.1)
    axes = figure.axes[0]
    assert sorted(bar.get_height() for bar in axes.patches) == [0, 0, 0.02]
    assert axes.get_ylim()[1] > 0.1
    assert [text.get_text() for text in axes.texts] == ["0.0200", "0.0000", "0.0000"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(labels) == ["allowed", "unet", "unet3plus"]
    assert f"liver unet 0.0200 (0.0100{TIED}to{TIED}0.0500)" in alt
    assert "spleen unet 0" not in alt


def test_bars_of_nothing_are_not_drawn():
    nothing = {"unet": [(NAN, NAN, NAN)] * 2}
    assert draw_bars("Slice FPR", "slice FPR", ORGANS, nothing, 4, limit=0.1) is None


def test_gains_are_drawn_where_the_verdict_puts_them(results):
    ((figure, alt),) = gain_charts(results.verdict)
    means = [line for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
    gains = [each["gain"]["mean"] for each in results.verdict["comparisons"]]
    assert [float(line.get_xdata()[0]) for line in means] == gains
    assert alt.startswith("Difference in Dice, unet3plus - unet: all +0.1000")


def test_gain_that_could_not_be_measured_is_left_out():
    nothing = dict.fromkeys(("mean", "low", "high", "p_value"))
    comparison = {"first": "a", "second": "b", "organ": "all", "gain": nothing}
    _, alt = draw_gains([comparison], wanted=0.02)
    assert alt == "Difference in Dice, a - b: all not measured."


def test_wanted_gain_is_drawn_for_candidate_and_baseline_alone(results):
    verdict = results.verdict
    criterion = next(each for each in verdict["criteria"] if each["name"] == "dice_gain")
    criterion["limit"] = 0.03
    champion = [dict(each, second="champion version 1") for each in verdict["comparisons"]]
    verdict["comparisons"] += champion
    (judged, _), (other, _) = gain_charts(verdict)

    def verticals(figure):
        return {
            float(line.get_xdata()[0])
            for line in figure.axes[0].get_lines()
            if list(line.get_ydata()) == [0, 1] and len(set(line.get_xdata())) == 1
        }

    assert verticals(judged) == {0.0, 0.03}
    assert verticals(other) == {0.0}


def test_learning_curves_of_all_networks_share_a_chart(results):
    figure, alt = draw_histories(results.histories, NETWORKS, "val/dice", "Validation Dice", "Dice")
    drawn = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].get_lines()}
    assert drawn == {
        "unet": pytest.approx([0.8 / 3, 1.6 / 3, 0.8], abs=1e-5),
        "unet3plus": pytest.approx([0.3, 0.6, 0.9]),
    }
    assert "unet3plus-0 from 0.300 to 0.900 in 3 epochs" in alt
    assert draw_histories(results.histories, NETWORKS, "val/none", "", "") is None


def test_network_keeps_its_style_where_others_have_no_curve(results):
    def colours(names):
        histories = {name: results.histories[name] for name in names}
        figure, _ = draw_histories(histories, NETWORKS, "val/dice", "", "")
        return {line.get_label(): line.get_color() for line in figure.axes[0].get_lines()}

    assert colours(["unet3plus"])["unet3plus"] == colours(NETWORKS)["unet3plus"]


def test_reliability_curve_is_that_of_the_table(results):
    figure, alt = draw_reliability(results.calibration, results.summaries, NETWORKS, "liver")
    rows = results.calibration["unet"].query("organ == 'liver'")
    lines = {line.get_label().split(",")[0]: line for line in figure.axes[0].get_lines()}
    assert list(lines["unet"].get_ydata()) == list(rows["fraction_true"])
    error = f"{results.summaries['unet']['test/ece/liver']:.4f}"
    assert f"unet in {len(rows)} bins, expected calibration error {error}" in alt
    assert draw_reliability(results.calibration, {}, NETWORKS, "kidney") is None


def test_networks_differ_in_more_than_colour():
    for kind in ("colour", "marker", "line", "hatch"):
        assert len({getattr(style, kind) for style in SERIES_STYLES}) == len(SERIES_STYLES)
    assert len(assign_styles([f"network {place}" for place in range(6)])) == 6


def luminance(colour):
    """Relative luminance of #rrggbb, 0 to 1, as WCAG 2 defines it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("style", SERIES_STYLES)
def test_series_stand_out_from_light_and_dark_pages(style):
    """WCAG 2 asks 3 to 1 of what is drawn."""
    assert 1.05 / (luminance(style.colour) + 0.05) >= 3
    paper = luminance("#14171c")
    assert (luminance(DARK[style.colour]) + 0.05) / (paper + 0.05) >= 3


def test_chart_turns_light_on_a_dark_page_and_is_the_same_each_time():
    def uri():
        figure, axes = new_chart("title")
        axes.bar([0], [1], color=SERIES_STYLES[0].colour)
        return to_svg_uri(figure)

    head, _, content = uri().partition(",")
    assert head == "data:image/svg+xml;base64"
    text = base64.b64decode(content).decode()
    assert "prefers-color-scheme: dark" in text
    assert re.findall(rf"(?<!, ){SERIES_STYLES[0].colour}", text) == []
    assert f", {SERIES_STYLES[0].colour})" in text
    assert uri() == uri()


def test_picture_for_others_is_png_on_white():
    figure, _ = new_chart("title")
    head, _, content = to_png_uri(figure).partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(content).startswith(b"\x89PNG")


# Outlines


def mask_in(slices, num_slices=40):
    """A mask of one organ, larger in later slices."""
    mask = np.zeros((1, num_slices, 4, 16), dtype=bool)
    for place, z in enumerate(slices, 1):
        mask[0, z, 1, :place] = True
    return mask


def test_slices_are_spread_over_what_is_outlined():
    assert choose_slices([mask_in([10]), mask_in([12, 30])]) == [10, 14, 18, 22, 26, 30]
    assert choose_slices([mask_in([], 3)] * 2) == [0, 1, 2]


def test_mask_between_the_slices_adds_where_it_is_largest():
    truth, other = mask_in([10, 30]), mask_in([15, 16])
    assert choose_slices([truth, other, mask_in([])]) == [10, 14, 16, 18, 22, 26, 30]
    assert choose_slices([truth, truth, mask_in([14, 15])]) == [10, 14, 18, 22, 26, 30]


def test_crop_keeps_a_margin_in_mm_and_stays_inside():
    mask = np.zeros((2, 100, 100), dtype=bool)
    mask[0, 50:60, 5:10] = True
    assert crop(mask, (1.0, 2.0)) == (slice(20, 90), slice(0, 25))
    assert crop(np.zeros_like(mask), (1.0, 1.0)) == (slice(None), slice(None))


def test_outlines_differ_in_line_and_lightness():
    assert len({outline.line for outline in STYLES}) == 3
    lightness = sorted(luminance(outline.colour) for outline in STYLES)
    assert lightness[2] - lightness[1] > 0.3


def test_slice_is_drawn_with_its_shape_in_mm():
    masks = [np.zeros((1, 10, 20), dtype=bool) for _ in STYLES]
    masks[1][0, 2:8, 2:8] = True
    figure = draw_slice(np.zeros((10, 20), dtype=np.float32), masks, (-160, 240), aspect=2.0)
    width, height = figure.get_size_inches()
    assert height == pytest.approx(width)
    assert len(figure.axes[0].collections) == 1


def link_data(project, tiny_data):
    (project / "data").symlink_to(tiny_data)


@pytest.mark.slow
def test_overlays_show_best_median_and_worst_case(project, tiny_data):
    link_data(project, tiny_data)
    page, _ = written(project, with_overlays=True)
    text = page.text["cases"]
    table = pd.read_csv(project / "reports/unet3plus/cases.csv")
    for rank, case in picture_cases(table).items():
        dice = table.loc[table["case"] == case, "dice"].mean()
        assert (
            f"{rank.capitalize()}: {case}, Dice unet {dice - 0.1:.3f}, unet3plus {dice:.3f}" in text
        )
    pictures = [attributes for section, attributes in page.pictures if section == "cases"]
    assert 3 <= len(pictures) <= 24
    cohort = {case.name for case in read_cohort(tiny_data).cases}
    for attributes in pictures:
        case, alt = attributes["alt"].split(", ", 1)
        assert case in cohort
        assert re.fullmatch(
            r"slice \d+; outlined pixels: truth \d+, unet \d+, unet3plus \d+\.", alt
        )
        assert attributes["src"].startswith("data:image/png;base64,")


@pytest.mark.parametrize(
    ("gone", "reason"),
    [
        ("data", "data/ holds no scans; fetch them with `dvc pull data.dvc`"),
        ("artifacts/train/unet/0/weights.safetensors", "no trained network in "),
        ("artifacts/train/unet3plus/0/network.json", r"network\.json is missing"),
        ("reports/unet3plus/cases.csv", "there are no scores of unet3plus to choose cases by"),
    ],
)
def test_missing_piece_of_overlays_is_named(project, tiny_data, tiny_params, gone, reason):
    link_data(project, tiny_data)
    (project / gone).unlink()
    with pytest.raises(StageError, match=reason):
        draw_galleries(read(project, tiny_params), tiny_params)


def test_overlays_of_other_weights_than_the_verdicts_are_refused(project, tiny_data, tiny_params):
    link_data(project, tiny_data)
    torch.manual_seed(99)
    description = describe_network("unet3plus", tiny_params)
    save_trained(project / "artifacts/train/unet3plus/0", build(description), description)
    with pytest.raises(StageError, match="are not those of the verdict"):
        draw_galleries(read(project, tiny_params), tiny_params)


# The page


def test_page_needs_nothing_from_elsewhere(page, finished):
    text = (finished / "page.html").read_text()
    assert "http:" not in text
    assert "https:" not in text
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert page.pictures
    for _, attributes in page.pictures:
        assert attributes["src"].startswith("data:image/")
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv"))
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_every_picture_says_in_words_what_it_shows(page):
    alts = [attributes["alt"] for _, attributes in page.pictures]
    assert len(alts) == len(set(alts)) == 1 + 2 + 1 + 2 + 2 + 2
    assert all(len(alt) > 30 for alt in alts)


def test_page_starts_with_the_verdict(page):
    assert "PASS" in page.text[""]
    assert "the candidate may be promoted" in page.text[""]
    assert "at least 2 for each organ" in page.text["verdict"]
    assert f"First candidate judged on test set {TEST_SET}." in page.text["verdict"]
    assert list(page.text) == [
        "", "verdict", "scores", "surfaces", "cases", "classifier", "learning", "calibration",
        "fingerprint", "provenance",
    ]  # fmt: skip
    anchors = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert anchors == {f"#{key}" for key in page.text if key}


def test_page_without_overlays_says_they_were_not_asked_for(page):
    assert "No pictures of cases: they were not requested." in page.text["cases"]


def test_same_run_gives_the_same_bytes(page, finished, project):
    written(project)
    assert (project / "page.html").read_bytes() == (finished / "page.html").read_bytes()


def test_text_from_files_is_escaped(results, finished, tiny_params):
    evil = '<script>alert("x")</script>'
    results.verdict["criteria"][0]["found"] = evil
    results.verdict["test_set"] = f'"><b>{evil}'
    results.verdict["comparisons"][0]["first"] = f'"><img src=x>{evil}'
    text = render(
        [
            verdict_section(results, tiny_params),
            provenance_section(results, tiny_params, PROVENANCE),
        ],
        evil,
        [evil],
        "none",
        f"PASS: {evil}",
    )
    assert "<script" not in text
    assert "<b>&lt;" not in text
    page = Page(text)
    for section in ("", "verdict", "provenance"):
        assert evil in page.text[section]
    assert any(evil in attributes["alt"] for _, attributes in page.pictures)
    assert all(attributes["src"].startswith("data:") for _, attributes in page.pictures)


@pytest.mark.parametrize("status", ["fail", "undecided"])
def test_verdict_that_is_no_pass_says_so(results, tiny_params, status):
    results.verdict["status"] = status
    results.verdict["criteria"][1]["passed"] = False
    page = rendered(results, verdict_section(results, tiny_params))
    assert status.upper() in page.text[""]
    shown = [a["class"] for tag, a in page.tags if tag == "th" and a.get("class")]
    assert shown.count("name fail") == 1
    assert shown.count("name pass") == 8


def test_page_of_an_older_verdict_has_no_notes(results, tiny_params):
    with_notes = rendered(results, verdict_section(results, tiny_params))
    assert "First candidate judged" in with_notes.text["verdict"]
    del results.verdict["notes"]
    older = rendered(results, verdict_section(results, tiny_params))
    assert "First candidate judged" not in older.text["verdict"]
    assert "unet3plus - unet" in older.text["verdict"]


def test_without_a_verdict_the_page_says_how_to_get_one(project, tiny_params):
    (project / "reports/gate.json").unlink()
    results = read(project, tiny_params)
    page = rendered(results, verdict_section(results, tiny_params))
    assert "NO VERDICT" in page.text[""]
    assert "There is none: run `dvc repro register`" in page.text["verdict"]
    assert results.candidate == tiny_params.register_.candidate


def test_results_of_an_older_version_give_a_page_with_notes(project):
    """Verdict without comparisons, summaries with Dice and rates, tables without the rest."""
    kept = {"test_set"} | {
        f"test/{metric}/{organ}"
        for metric in ("dice", "num_cases", "slice_fpr", "num_free_slices", "voxel_fpr")
        for organ in ORGANS
    }
    for name in NETWORKS:
        folder = project / "reports" / name
        edit_json(
            folder / "summary.json",
            lambda each: [each.pop(key) for key in list(each) if key not in kept],
        )
        (folder / "calibration.csv").unlink()
        table = pd.read_csv(folder / "cases.csv")
        table[["case", "patient", "organ", "dice"]].to_csv(folder / "cases.csv", index=False)

    def older(gate):
        del gate["comparisons"], gate["scores_sha256"]
        for criterion in gate["criteria"]:
            del criterion["value"], criterion["limit"]

    edit_json(project / "reports/gate.json", older)
    page, notes = written(project)
    assert len(notes) == 2
    assert "Paired differences by organ: Not available" in page.text["verdict"]
    assert "Not in these results: IoU, organ-free cases, missed." in page.text["scores"]
    assert "Distances: Not available" in page.text["surfaces"]
    assert (
        "Comparison with and without the slice classifier: Not available: an older version"
        in page.text["classifier"]
    )
    assert "No network here has a slice classifier" in page.text["classifier"]
    assert "Calibration: Not available" in page.text["calibration"]
    assert [section for section, _ in page.pictures] == ["scores"] * 3 + ["learning"] * 2


def test_older_names_of_the_slice_classifier_are_read(project, results):
    """Older versions called it a gate, in scores, summaries and histories."""
    older = {"_no_classifier": "_no_gate", "_soft_classifier": "_soft_gate"}
    for name in ("cases.csv", "summary.json"):
        path = project / "reports/unet3plus" / name
        text = path.read_text()
        for present, former in older.items():
            assert present in text
            text = text.replace(present, former)
        path.write_text(text)
    history = project / "artifacts/train/unet3plus/0/history.csv"
    history.write_text("epoch,val/dice,val/gate_accuracy/liver\n1,0.5,0.75\n")
    again = read(project, load_params(project / "params.yaml"))
    assert again.summaries == results.summaries
    assert ablation_table(again) == ablation_table(results)
    assert again.histories["unet3plus"][0] == [
        {"epoch": 1.0, "val/dice": 0.5, "val/classifier_accuracy/liver": 0.75}
    ]


def test_provenance_names_what_it_takes_to_make_it_again(finished, results, tiny_params):
    gate = json.loads((finished / "reports/gate.json").read_text())
    section = provenance_section(results, tiny_params, PROVENANCE)
    text = rendered(results, section).text["provenance"]
    for key in ("data_version", "test_set", "weights_sha256"):
        assert gate[key] in text
    for name, version in library_versions().items():
        assert f"{name}{version}" in text
    assert f"git checkout {'c' * 40}\nmake setup\nmake repro\n" in text
    assert (finished / "params.yaml").read_text() in text


def test_page_written_outside_of_git_has_no_commit_to_check_out(finished, results, tiny_params):
    section = provenance_section(results, tiny_params, Provenance("none", "aaaa.dir"))
    assert dict(section.listings)["How to reproduce"].startswith("make setup")


def test_uncommitted_code_and_newer_scans_are_pointed_out(finished, results, tiny_params):
    assert find_changes(results, PROVENANCE) == []
    newer = Provenance("abc-dirty", "bbbb.dir")
    of_data, of_code = find_changes(results, newer)
    assert "from data version aaaa.dir, the scans are now version bbbb.dir" in of_data
    assert "Code or parameters were not committed" in of_code
    section = provenance_section(results, tiny_params, newer)
    assert dict(section.listings)["How to reproduce"].startswith("git checkout abc\n")


def test_parameters_changed_since_a_stage_ran_are_named(project, results):
    lock = {
        "stages": {
            "train@unet-0": {
                "params": {"params.yaml": {"train": changed(TINY)["train"], "recipes.unet": None}}
            },
            "register": {"params": {"params.yaml": {"register": changed(TINY)["register"]}}},
            "slice": {},
            # Of a version that trained each network once: DVC leaves it in the file.
            "train@unet": {"params": {"params.yaml": {"train": None}}},
        }
    }
    (project / "dvc.lock").write_text(yaml.safe_dump(lock))
    newer = changed({"train": {"num_epochs": 5}}, changed(TINY))
    newer["train"]["augment"]["noise_hu"] = 0
    (project / "params.yaml").write_text(yaml.safe_dump(newer))
    assert changed_parameters(open_workspace(project)) == {
        ("train@unet-0", "params.yaml"): [
            "recipes.unet",
            "train.augment.noise_hu",
            "train.num_epochs",
        ]
    }
    assert find_changes(results, PROVENANCE) == [
        "params.yaml has changed since stage train@unet-0 ran: recipes.unet, "
        "train.augment.noise_hu, train.num_epochs. Run `dvc repro`."
    ]


def test_published_results_are_reported():
    params = Params.model_validate(changed({}))
    results = read(ROOT, params)
    assert score_table(results) is not None
    assert verdict_words(results).split(":")[0] in ("PASS", "FAIL", "UNDECIDED")


@pytest.mark.slow
def test_command_writes_the_page_and_says_where_and_that_no_run_is_known(
    project, empty_store, monkeypatch
):
    monkeypatch.chdir(project)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", empty_store.uri)
    done = CliRunner().invoke(app, ["report", "--no-overlays", "--output", "new/page.html"])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines() == [
        "report: new/page.html",
        "report: MLflow has no run that trained unet3plus",
    ]
    assert (project / "new/page.html").read_text().startswith("<!doctype html>")


@pytest.fixture
def profile(project):
    """The same results as those of a profile: parameters in two files, and no promotion gate."""
    content = yaml.safe_load((project / "params.yaml").read_text())
    (project / "paper").mkdir()
    for name, keys in (("params", ("networks", "recipes", "evaluate", "register")), ("sample", ())):
        own = {key: content.pop(key) for key in keys or tuple(content)}
        (project / f"paper/{name}.yaml").write_text(yaml.safe_dump(own, sort_keys=False))
    artifacts = project / "artifacts"
    artifacts.rename(project / "kept")
    (artifacts / "paper").mkdir(parents=True)
    (project / "kept").rename(artifacts / "paper/sample")
    (project / "reports").rename(artifacts / "paper/sample/reports")
    (artifacts / "paper/sample/reports/gate.json").unlink()
    (project / "params.yaml").unlink()
    return project


@pytest.mark.slow
def test_command_writes_the_page_of_a_profile(profile, tiny_data, monkeypatch):
    link_data(profile, tiny_data)
    monkeypatch.chdir(profile)
    done = CliRunner().invoke(app, ["report", "--profile", "paper/sample", "--no-mlflow"])
    assert done.exit_code == 0, done.output
    assert done.output.endswith("report: artifacts/paper/sample/reports/report.html\n")
    page = Page((profile / "artifacts/paper/sample/reports/report.html").read_text())
    assert "NO VERDICT" in page.text[""]
    assert "this pipeline has no promotion gate" in page.text[""]
    assert "is missing" not in page.text[""]
    assert "paper/sample: unet3plus against unet" in page.text[""]
    assert [section for section, _ in page.pictures].count("cases") >= 3
    assert "fullscale report --profile paper/sample" in page.text["provenance"]
    for name in ("params", "sample"):
        assert (profile / f"paper/{name}.yaml").read_text() in page.text["provenance"]


def test_missing_file_of_a_profile_is_a_note_with_its_own_command(profile):
    workspace = open_workspace(profile, "paper/sample")
    workspace.scores("unet").unlink()
    assert read_results(workspace, workspace.load_params()).notes == [
        "artifacts/paper/sample/reports/unet/cases.csv is missing: run "
        "`dvc repro paper/dvc.yaml:evaluate@sample-unet`."
    ]


def test_parameters_of_a_profile_are_compared_with_its_own_lock(profile):
    workspace = open_workspace(profile, "paper/sample")
    params = {"paper/params.yaml": {"evaluate": {"threshold": 0.25}}}
    other = {"paper/paper.yaml": {"train": {"num_epochs": 100}}}
    stages = {"evaluate@sample-unet": {"params": params}, "train@paper-unet": {"params": other}}
    (profile / "paper/dvc.lock").write_text(yaml.safe_dump({"stages": stages}))
    changed_keys = changed_parameters(workspace)
    assert list(changed_keys) == [("evaluate@sample-unet", "paper/params.yaml")]
    assert "evaluate.threshold" in changed_keys["evaluate@sample-unet", "paper/params.yaml"]


@pytest.mark.slow
def test_page_and_pictures_go_to_the_candidates_run(project, mlflow_store, tmp_path):
    params = load_params(project / "params.yaml")
    weights = project / "artifacts/train/unet3plus/0/weights.safetensors"
    tags = {WEIGHTS_TAG: file_sha256(weights)}
    location = mlflow_store.artifact_location
    run_description = RunDescription(mlflow_store.uri, location, "unet3plus", {}, tags, "d" * 32)
    with training_run(run_description, tmp_path / "run") as run:
        pass
    results = read(project, params)
    report = write_report(results, params, project / "page.html", with_overlays=False)
    assert track_report(report, params, open_workspace(project), mlflow_store) == run.run_id
    client = MlflowClient(mlflow_store.uri)
    folder = Path(client.download_artifacts(run.run_id, "report", str(tmp_path)))
    assert (folder / "report.html").read_bytes() == (project / "page.html").read_bytes()
    names = {path.name for path in folder.iterdir()} - {"report.html"}
    assert names == {f"{name}.svg" for name in report.pictures}
    assert {name.partition("-")[0] for name in report.pictures} >= {"verdict", "scores", "learning"}
    assert (folder / "scores-1.svg").read_bytes().startswith(b"<?xml")
