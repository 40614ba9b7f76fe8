import os
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from cohorts import write_msd, write_nnunet
from random_network import random_trained

from fullscale.evaluation.summary import score_cases
from fullscale.prediction.predictor import Predictor
from fullscale.prediction.segmentation import Model
from fullscale.runtime.errors import StageError
from fullscale.scans.cohort import read_cohort
from fullscale.workspace import open_workspace
from tasks.commands.score import (
    CASES,
    ORGANS,
    PAGE,
    leave_out_known,
    open_cohort,
    score,
    write_scores,
)

PATIENTS = os.environ.get("FULLSCALE_PATIENT_SCANS", "")


@pytest.fixture(scope="module")
def trained(tiny_params):
    return random_trained(tiny_params)


@pytest.fixture
def predictor(trained):
    return Predictor(trained, 0.5, 8)


@pytest.fixture
def workspace(tmp_path, tiny_data):
    """A project that was trained on the tiny scans."""
    shutil.copytree(tiny_data, tmp_path / "project/data")
    (tmp_path / "project/artifacts").mkdir()
    split = "case,fold\n" + "".join(f"case_0{i},train\n" for i in range(7)) + "case_07,test\n"
    (tmp_path / "project/artifacts/split.csv").write_text(split)
    return open_workspace(tmp_path / "project")


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Scans of three other patients, as their owner keeps them."""
    return write_nnunet(tmp_path_factory.mktemp("others"), 3, prefix="other", seed=50)


def test_scores_are_those_of_the_stage_evaluate(
    predictor, others, tiny_params, workspace, tmp_path, trained
):
    with open_cohort(others) as cohort:
        found = score(predictor, cohort, tiny_params, workspace)
        wanted = score_cases(predictor, cohort.cases, cohort, tiny_params.evaluate)
    pd.testing.assert_frame_equal(found.scores, wanted[found.scores.columns])
    assert found.cohort == "Made"
    assert found.notes == ()
    model = Model("organs", "3", "a" * 64, 0.5, trained)
    write_scores(found, model, tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / ORGANS).set_index("organ")
    assert list(table.index) == ["liver", "spleen"]
    for organ, rows in wanted.groupby("organ"):
        assert table.loc[organ, "dice"] == pytest.approx(rows["dice"].mean(), abs=1e-6)
        assert table.loc[organ, "num_cases"] == 3
    cases = pd.read_csv(tmp_path / "out" / CASES)
    assert list(cases["case"].unique()) == ["other_00", "other_01", "other_02"]
    page = (tmp_path / "out" / PAGE).read_text()
    assert "EXTERNAL</b><span>3 cases of 3 patients" in page
    assert page.count('<th scope="row" class="name">other_01</th>') == 2


def test_scan_and_patient_of_the_project_are_left_out_and_named(
    others, tiny_data, workspace, tmp_path, predictor, tiny_params, caplog
):
    """A copy under other names is known by its voxels, another scan by its patient."""
    source = shutil.copytree(others, tmp_path / "mixed")
    for folder, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        shutil.copy(tiny_data / folder / f"case_07{ending}", source / folder / f"copy{ending}")
    rows = "case,patient,annotated\ncopy,someone,liver;spleen\nother_00,patient_02,liver;spleen\n"
    rows += "other_01,p1,liver\nother_02,p2,liver\n"
    (source / "cases.csv").write_text(rows)
    with open_cohort(source) as cohort:
        kept, notes = leave_out_known(cohort, workspace)
        scored = score(predictor, cohort, tiny_params, workspace)
    assert [case.name for case in kept] == ["other_01", "other_02"]
    assert set(scored.scores["case"]) == {"other_01", "other_02"}
    assert notes[0] == "copy is left out: its scan is case case_07 of data/ (test)."
    assert notes[1].startswith(
        "other_00 is left out: its patient patient_02 is that of case case_02 of data/ (train); if"
    )
    assert scored.notes == tuple(notes)
    assert notes[0] in caplog.text


def test_cohort_of_the_project_itself_is_refused(predictor, tiny_params, workspace):
    with (
        open_cohort(workspace.data) as cohort,
        pytest.raises(StageError, match="every case of cohort Made is in data/; score a cohort of"),
    ):
        score(predictor, cohort, tiny_params, workspace)


def test_without_data_the_page_says_that_this_is_not_known(others, tmp_path):
    with open_cohort(others) as cohort:
        kept, notes = leave_out_known(cohort, open_workspace(tmp_path))
    assert len(kept) == 3
    assert notes[0].startswith("There is no data/ here, so it is not known if the model was tra")


def test_organ_that_a_cohort_does_not_label_has_no_scores(
    predictor, tiny_params, workspace, tmp_path
):
    """Ids are the cohort's own: here the spleen is 1, in the network 2."""
    params = tiny_params.model_copy(
        update={"organs": {"liver": ("liver", "tumour"), "spleen": ("spleen", "tumour")}}
    )
    with open_cohort(write_msd(tmp_path / "msd")) as cohort:
        found = score(predictor, cohort, params, workspace)
    assert set(found.scores["organ"]) == {"spleen"}
    assert (found.scores["num_true_voxels"] > 0).all()


def test_cohort_without_any_of_the_organs_is_refused(predictor, tiny_params, workspace, others):
    with open_cohort(others) as cohort:
        strange = replace(cohort, labels={"background": 0, "kidney": 1, "lung": 2})
        with pytest.raises(StageError, match=r"segments liver, spleen, and cohort Made has .*lung"):
            score(predictor, strange, tiny_params, workspace)


def test_ingested_cohort_is_read_where_it_is(workspace):
    with open_cohort(workspace.data) as cohort:
        assert cohort.root == workspace.data
        assert cohort.cases == read_cohort(workspace.data).cases


@pytest.mark.slow
@pytest.mark.skipif(not PATIENTS, reason="FULLSCALE_PATIENT_SCANS names no folder of scans")
def test_scans_of_patients_are_scored(predictor, tiny_params, workspace, tmp_path, trained):
    """Any annotated scans of patients with liver and spleen, in any layout that ingest takes."""
    with open_cohort(Path(PATIENTS)) as cohort:
        found = score(predictor, cohort, tiny_params, workspace)
        annotated = [
            (case.name, organ)
            for case in cohort.cases
            for organ in ("liver", "spleen")
            if organ in case.annotated
        ]
    rows = found.scores
    assert annotated
    assert list(zip(rows["case"], rows["organ"], strict=True)) == annotated
    assert (rows["num_true_voxels"] > 0).all()
    assert (rows["dice"] < 0.9).all()  # random weights find no organ
    write_scores(found, Model("organs", "3", "a" * 64, 0.5, trained), tmp_path / "out")
    assert set(pd.read_csv(tmp_path / "out" / CASES)["case"]) == set(rows["case"])
