import math
import shutil

import pandas as pd
import pytest
from project import ROOT

from fullscale.evaluation.paired import Gain
from fullscale.prediction.network_files import build, describe_network
from fullscale.reporting.paper_rows import (
    CLAIMS,
    Claim,
    PaperRow,
    Setting,
    measure_claims,
    read_rows,
)
from fullscale.reporting.paper_table import draw_table, tabulate_rows, write_markdown
from fullscale.versioning.provenance import Provenance
from fullscale.workspace import Workspace, open_workspace
from tasks.paper_table import choose_timed
from tasks.split import split_cases


@pytest.fixture(scope="module")
def params():
    return open_workspace(ROOT, "paper/sample").load_params()


@pytest.fixture
def setting(params):
    return Setting(
        "Phantoms", ("liver", "spleen"), 9, False, params, 50, Provenance("c0ffee", "d1.dir")
    )


SUMMARY = {
    "test/dice/liver": 0.9,
    "test/dice_low/liver": 0.85,
    "test/dice_high/liver": 0.93,
    "test/num_cases/liver": 8,
    "test/slice_fpr/liver": 0.0125,
    "test/voxel_fpr/liver": 0.0003,
    "test/false_closings/liver": 0.02,
    "test/closed_volume/liver": 0.001,
}
RUN = PaperRow(
    "unet", "UNet", "plain", {"liver": 0.9206, "spleen": 0.9023}, SUMMARY, 617_506, 39.39, 0.25, 1.5
)
REASON = "artifacts/reports/unet-crf/summary.json is missing"
CRF = PaperRow(
    "unet-crf",
    "UNet + dense CRF",
    "plain",
    {"liver": math.nan, "spleen": math.nan},
    reason=REASON,
)


def lines_of(text, heading):
    part = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [line for line in part.splitlines() if line.startswith("|")]


def test_markdown_holds_published_and_measured(setting):
    text = write_markdown([RUN, CRF], [], setting)
    liver = lines_of(text, "liver")[2]
    for part in ("0.9206", "0.9000", "0.8500", "0.9300", "| 8 |", "0.0125", "0.00030", "0.0200"):
        assert part in liver
    assert liver.endswith("| not run |")
    spleen = lines_of(text, "spleen")[2]
    assert "0.9023" in spleen
    assert "not measured" in spleen
    assert "Not run on LiTS" in text
    assert "Commit c0ffee, data version d1.dir." in text


def test_markdown_of_lits_says_so(setting):
    text = write_markdown([RUN], [], Setting(**{**vars(setting), "is_lits": True}))
    assert "Dice on LiTS (95% interval)" in text
    assert lines_of(text, "liver")[2].endswith("| 0.9000 |")
    assert "Not run on LiTS" not in text


def test_row_that_was_not_run_says_why(setting):
    text = write_markdown([RUN, CRF], [], setting)
    assert lines_of(text, "liver")[3] == ("| UNet + dense CRF | plain | none |" + " not run |" * 6)
    assert f"- UNet + dense CRF (plain): {REASON}." in text


def test_markdown_tells_what_networks_cost(setting):
    cost = lines_of(write_markdown([RUN, CRF], [], setting), "What they cost")
    assert cost[2] == "| UNet | plain | 0.62 | 39.39 | 0.25 | 1.50 |"
    assert cost[3] == "| UNet + dense CRF | plain | not run | none | not run | not run |"


def test_markdown_tells_how_sure_a_claim_is(setting):
    gain = Gain(0.01, -0.02, 0.04, 0.15, 0.3, 8, 17)
    text = write_markdown([RUN], [Claim("CGM", "with", "without", gain, 0.9)], setting)
    (line,) = lines_of(text, "What the paper says is better")[2:]
    for part in ("CGM", "+0.0100", "-0.0200", "+0.0400", "| 0.3 |", "| 0.9 |", "| 8 |"):
        assert part in line


def test_table_has_a_line_for_each_row_and_organ(setting):
    table = tabulate_rows([RUN, CRF], setting)
    assert list(zip(table["network"], table["organ"], strict=True)) == [
        ("unet", "liver"), ("unet", "spleen"), ("unet-crf", "liver"), ("unet-crf", "spleen"),
    ]  # fmt: skip
    assert table.loc[0, "dice"] == 0.9
    assert math.isnan(table.loc[1, "dice"])
    assert table.loc[2, "not_run_because"] == REASON
    assert math.isnan(table.loc[2, "parameters"])
    assert set(table["on_lits"]) == {"not run"}


def test_picture_shows_every_row(setting):
    figure = draw_table([RUN, CRF], setting)
    panels = figure.axes
    assert [axes.get_xlabel() for axes in panels] == ["Dice, liver", "Dice, spleen"]
    labels = [label.get_text() for label in panels[0].get_yticklabels()]
    assert labels == ["UNet, plain", "UNet + dense CRF, plain"]
    assert [text.get_text() for text in panels[0].texts] == ["not run"]


@pytest.fixture(scope="module")
def btcv():
    return open_workspace(ROOT, "btcv/cpu").load_params()


def test_claims_are_about_rows_that_are_trained(params, btcv):
    for better, worse, _ in CLAIMS:
        settings = next(each for each in (params, btcv) if {better, worse} <= set(each.networks))
        ours, theirs = (settings.recipes[name].model_dump() for name in (better, worse))
        differs = {key for key in ours if ours[key] != theirs[key]}
        assert differs <= {"architecture", "deep_supervision", "cgm"} or differs == {"loss_terms"}


def test_row_of_btcv_is_the_papers_row_of_that_name(params, btcv):
    for name in set(params.networks) & set(btcv.networks):
        assert btcv.recipes[name] == params.recipes[name]


def test_rows_of_btcv_are_built_and_carry_every_claim_of_the_plain_encoder(btcv, tmp_path):
    for name in btcv.networks:
        build(describe_network(name, btcv.model_copy(update={"organs": {"liver": (1,)}})))
    assert sum({better, worse} <= set(btcv.networks) for better, worse, _ in CLAIMS) == 6
    (tmp_path / "paper").mkdir()
    shutil.copy(ROOT / "paper/published.csv", tmp_path / "paper/published.csv")
    workspace = Workspace(tmp_path, (), tmp_path / "a", tmp_path / "r", tmp_path / "w", "btcv/cpu")
    rows = read_rows(workspace, btcv, None)
    assert {row.network for row in rows} == {*btcv.networks, "unet-crf"}


def test_split_of_btcv_tests_six_patients_and_validates_on_three(btcv):
    numbers = (5, 6, 7, 9, 10, 21, 23, 24, 26, 27, 28, 30, 31, 33, 34, 37, 39, 40)
    names = [f"btcv_{number:04d}" for number in numbers]
    cases = pd.DataFrame({"case": names, "patient": names, "training_only": False})
    folds = split_cases(cases, btcv.split)["fold"].value_counts().to_dict()
    assert folds == {"train": 9, "test": 6, "val": 3}


def test_rows_without_results_are_not_run(params, tmp_path):
    (tmp_path / "paper").mkdir()
    published = (ROOT / "paper/published.csv").read_text()
    (tmp_path / "paper/published.csv").write_text(published)
    workspace = Workspace(tmp_path, (), tmp_path / "a", tmp_path / "r", tmp_path / "w", "paper/x")
    rows = read_rows(workspace, params, None)
    assert len(rows) == 17
    assert all(row.reason for row in rows)
    assert "summary.json" in rows[0].reason
    assert rows[0].published == {"liver": 0.9206, "spleen": 0.9023}
    assert measure_claims(workspace, params, rows) == []


def test_claims_are_paired_and_corrected(params, tmp_path):
    workspace = Workspace(tmp_path, (), tmp_path, tmp_path, tmp_path, "paper/x")
    for network, dice in {"unet": 0.8, "unetplusplus": 0.85, "unet3plus": 0.9}.items():
        (tmp_path / network).mkdir()
        rows = [
            {"case": f"c{i}", "patient": f"p{i}", "organ": "liver", "dice": dice + i / 200}
            for i in range(8)
        ]
        pd.DataFrame(rows).to_csv(tmp_path / network / "cases.csv", index=False)
    rows = [
        PaperRow(network, network, "plain", {}, SUMMARY)
        for network in ("unet", "unetplusplus", "unet3plus")
    ]
    claims = measure_claims(workspace, params, rows)
    assert [claim.worse for claim in claims] == ["unet (plain)", "unetplusplus (plain)"]
    assert [round(claim.gain.mean, 6) for claim in claims] == [0.1, 0.05]
    assert all(claim.p_holm >= claim.gain.p_value for claim in claims)


def test_timed_scan_is_of_middle_size(tiny_cohort):
    sizes = sorted(case.image.stat().st_size for case in tiny_cohort.cases)
    assert choose_timed(tiny_cohort.cases).image.stat().st_size == sizes[len(sizes) // 2]
    assert choose_timed(tiny_cohort.cases[:1]) == tiny_cohort.cases[0]
