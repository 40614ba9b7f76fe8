from __future__ import annotations

import pytest
from bodies import make_body, save_nifti
from cohorts import SPACING_MM, write_series

from fullscale.runtime.errors import StageError
from fullscale.serving.prediction_jobs import plan_jobs


@pytest.fixture
def scans(tmp_path):
    """in/a.nii.gz, in/deep/ct (DICOM)."""
    hu = make_body()[0]
    save_nifti(tmp_path / "in/a.nii.gz", hu, SPACING_MM)
    write_series(tmp_path / "in/deep/ct", hu)
    return tmp_path / "in"


def test_single_scan_has_files(scans, tmp_path):
    out = tmp_path / "out.nii.gz"
    (job,) = plan_jobs(
        scans / "a.nii.gz", out, preview=tmp_path / "p.png", statistics=tmp_path / "s.json"
    )
    assert job.paths.label_map == out
    assert job.paths.preview == tmp_path / "p.png"
    assert job.paths.statistics == tmp_path / "s.json"
    assert job.paths.dicom_seg is None
    assert job.paths.probability("liver") == tmp_path / "out_liver_probability.nii.gz"


def test_folder_of_scans_has_a_file_for_each_in_folders(scans, tmp_path):
    out = tmp_path / "out"
    first, second = plan_jobs(
        scans, out, preview=out, statistics=tmp_path / "s", dicom_seg=tmp_path / "seg"
    )
    assert [each.source.name for each in (first, second)] == ["a", "deep/ct"]
    assert second.paths.label_map == out / "deep/ct.nii.gz"
    assert second.paths.preview == out / "deep/ct.png"
    assert second.paths.statistics == tmp_path / "s/deep/ct.json"
    assert second.paths.dicom_seg == tmp_path / "seg/deep/ct.dcm"
    assert first.paths.dicom_seg is None
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "out"}, r"found OUT .*out; .* wanted a file named \.nii\.gz or \.nii"),
        ({"preview": "p.jpg"}, r"found --preview .*p\.jpg; .* named \.png"),
        ({"statistics": "s"}, r"found --statistics .*s; .* named \.json"),
        ({"dicom_seg": "s.dcm"}, r"--dicom-seg refers to a DICOM series"),
        ({"target": "in/a.nii.gz"}, r"IN and OUT are both .*a\.nii\.gz"),
    ],
)
def test_names_that_do_not_suit_a_single_scan_are_refused(scans, tmp_path, options, message):
    paths = {"target": "o.nii", **options}
    with pytest.raises(StageError, match=message):
        plan_jobs(scans / "a.nii.gz", **{key: tmp_path / name for key, name in paths.items()})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "out.nii.gz"}, r"found OUT .*out\.nii\.gz; for a folder of scans wanted a f"),
        ({"preview": "p.png"}, r"found --preview .*p\.png; for a folder of scans wanted a folder"),
        ({"target": "in/out"}, r"OUT .*in/out lies in .*; name a folder outside"),
        ({"target": "in"}, r"OUT .* lies in .*; name a folder outside"),
        ({"statistics": "in/s"}, r"--statistics .* lies in "),
    ],
)
def test_names_that_do_not_suit_a_folder_are_refused(scans, tmp_path, options, message):
    paths = {"target": "out", **options}
    with pytest.raises(StageError, match=message):
        plan_jobs(scans, **{key: tmp_path / name for key, name in paths.items()})


def test_dicom_seg_of_a_series_is_a_file(scans, tmp_path):
    (job,) = plan_jobs(scans / "deep/ct", tmp_path / "o.nii.gz", dicom_seg=tmp_path / "o.dcm")
    assert job.paths.dicom_seg == tmp_path / "o.dcm"
    with pytest.raises(StageError, match=r"found --dicom-seg .* named \.dcm"):
        plan_jobs(scans / "deep/ct", tmp_path / "o.nii.gz", dicom_seg=tmp_path / "o")


def test_folder_of_one_series_may_have_a_folder_as_output(scans, tmp_path):
    (job,) = plan_jobs(scans / "deep/ct", tmp_path / "out", preview=tmp_path / "pictures")
    assert job.paths.label_map == tmp_path / "out/ct.nii.gz"
    assert job.paths.preview == tmp_path / "pictures/ct.png"
