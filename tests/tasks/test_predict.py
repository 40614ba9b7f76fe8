from __future__ import annotations

import json

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK
import torch
from bodies import make_body, save_nifti
from cohorts import SPACING_MM, write_series
from PIL import Image
from random_network import random_trained

from fullscale.prediction.network_files import TrainedOn
from fullscale.prediction.predictor import Predictor
from fullscale.prediction.segmentation import Model, segment_scan
from fullscale.serving.prediction_jobs import plan_jobs
from fullscale.serving.scan_files import load_scan
from tasks.predict import predict

NAMES_OF_PERSONS = (b"Doe", b"Jane", b"ID-17", b"Roe", b"19500101", b"20200101")
ELSEWHERE = TrainedOn(
    slice_spacing_mm=(1.0, 2.0),
    pixel_spacing_mm=(7.0, 7.0),
    height_mm=(100.0, 200.0),
    trunk_depth_mm=(200.0, 220.0),
    trunk_width_mm=(250.0, 280.0),
)


@pytest.fixture(scope="module")
def model(tiny_params):
    return Model("organs", "3", "ab" * 32, 0.5, random_trained(tiny_params))


@pytest.fixture(scope="module")
def predictor(model):
    return Predictor(model.trained, model.threshold, 8, torch.device("cpu"))


@pytest.fixture
def scans(tmp_path):
    """Three scans: a.nii.gz in RAS, ct as DICOM, and z.nii, which is not a scan."""
    folder = tmp_path / "in"
    save_nifti(folder / "a.nii.gz", make_body(seed=1)[0], SPACING_MM, "RAS")
    write_series(folder / "ct", make_body(seed=2)[0])
    (folder / "z.nii").write_bytes(b"no scan")
    return folder


def test_every_requested_output_is_written(scans, tmp_path, model, predictor):
    jobs = plan_jobs(
        scans, tmp_path / "out", probabilities=True, preview=tmp_path / "out",
        statistics=tmp_path / "out", dicom_seg=tmp_path / "out", rtstruct=tmp_path / "rt",
    )  # fmt: skip
    outcomes = predict(jobs, predictor, model)
    assert [each.job.source.name for each in outcomes] == ["a", "ct", "z"]
    assert [each.error is None for each in outcomes] == [True, True, False]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {
        *("a.nii.gz", "a_liver_probability.nii.gz", "a_spleen_probability.nii.gz"),
        *("a.png", "a.json", "ct.nii.gz", "ct_liver_probability.nii.gz"),
        *("ct_spleen_probability.nii.gz", "ct.png", "ct.json", "ct.dcm"),
    }
    assert [path.name for path in (tmp_path / "rt").iterdir()] == ["ct.dcm"]
    label = np.asarray(nib.load(tmp_path / "out/ct.nii.gz").dataobj)
    highest = np.zeros(label.shape)
    for label_id, organ in enumerate(("liver", "spleen"), start=1):
        found = nib.load(tmp_path / f"out/ct_{organ}_probability.nii.gz").get_fdata()
        assert found.max() > found[label == label_id].min() >= 0.4999
        highest = np.maximum(highest, found)
    assert highest[label == 0].max() <= 0.5


def test_nothing_names_the_patient_but_the_dicom_segmentation(scans, tmp_path, model, predictor):
    jobs = plan_jobs(
        scans / "ct", tmp_path / "o.nii", probabilities=True, preview=tmp_path / "o.png",
        statistics=tmp_path / "o.json", dicom_seg=tmp_path / "o.dcm", rtstruct=tmp_path / "or.dcm",
    )  # fmt: skip
    predict(jobs, predictor, model)
    for path in tmp_path.glob("o*"):
        named = [name for name in NAMES_OF_PERSONS if name in path.read_bytes()]
        assert bool(named) == (path.suffix == ".dcm"), path
    with Image.open(tmp_path / "o.png") as picture:
        assert picture.info.keys() <= {"dpi"}
        assert min(picture.size) > 200


def test_statistics_hold_measurements_and_model(scans, tmp_path, model, predictor):
    jobs = plan_jobs(scans / "a.nii.gz", tmp_path / "o.nii.gz", statistics=tmp_path / "o.json")
    (outcome,) = predict(jobs, predictor, model)
    content = json.loads((tmp_path / "o.json").read_text())
    assert content["input"] == "a"
    assert content["shape"] == [48, 40, 16]
    assert content["orientation"] == "RAS"
    assert content["spacing_zyx_mm"] == list(SPACING_MM)
    assert content["model"] == {"name": "organs", "version": "3", "weights_sha256": "ab" * 32}
    assert content["threshold"] == 0.5
    assert content["warnings"] == []
    label = np.asarray(nib.load(tmp_path / "o.nii.gz").dataobj)
    for label_id, organ in enumerate(("liver", "spleen"), start=1):
        expected_ml = (label == label_id).sum() * np.prod(SPACING_MM) / 1000
        assert content["organs"][organ]["volume_ml"] == pytest.approx(expected_ml, abs=1e-3)
        assert outcome.organs[organ].volume_ml == pytest.approx(expected_ml)


def test_bad_scan_is_reported_and_the_others_are_segmented(
    scans, tmp_path, model, predictor, capsys
):
    scans.joinpath("a.nii.gz").write_bytes(b"damaged")
    outcomes = predict(plan_jobs(scans, tmp_path / "out"), predictor, model)
    assert [each.error is None for each in outcomes] == [False, True, False]
    shown = capsys.readouterr().err
    assert "error: a: unreadable" in shown
    assert "error: z: unreadable" in shown
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ct.nii.gz"]


def test_file_that_cannot_be_written_fails_its_scan_only(scans, tmp_path, model, predictor):
    (tmp_path / "out/a.nii.gz").mkdir(parents=True)
    outcomes = predict(plan_jobs(scans, tmp_path / "out"), predictor, model)
    assert [each.error is None for each in outcomes] == [False, True, False]
    assert "a.nii.gz" in outcomes[0].error
    assert not list((tmp_path / "out").glob("*.part"))


def unlike(model):
    """The same model with other ranges of training scans."""
    slicing = model.trained.description.slice.model_copy(update={"neighbour_mm": 2.0})
    changes = {"trained_on": ELSEWHERE, "slice": slicing}
    description = model.trained.description.model_copy(update=changes)
    trained = type(model.trained)(model.trained.network, description)
    return Predictor(trained, model.threshold, 8, torch.device("cpu"))


def test_scan_unlike_the_training_scans_gets_a_warning(scans, tmp_path, model, capsys):
    jobs = plan_jobs(scans / "ct", tmp_path / "o.nii.gz", statistics=tmp_path / "o.json")
    (outcome,) = predict(jobs, unlike(model), model)
    assert outcome.error is None
    (warning,) = json.loads((tmp_path / "o.json").read_text())["warnings"]
    assert warning["code"] == "slice_spacing"
    assert warning["found"] == "slices every 8 mm"
    assert warning["wanted"] == "at most 3 mm"
    assert "warning: ct: slice_spacing: found slices every 8 mm" in capsys.readouterr().err


def test_scan_unlike_the_training_scans_is_refused_if_strict(scans, tmp_path, model):
    jobs = plan_jobs(scans / "ct", tmp_path / "o.nii.gz", statistics=tmp_path / "o.json")
    (outcome,) = predict(jobs, unlike(model), model, strict=True)
    assert outcome.error.startswith("slice_spacing: found slices every 8 mm")
    assert "refused by --strict" in outcome.error
    assert not list(tmp_path.glob("o.*"))


def test_label_map_of_a_folder_is_that_of_the_scan_alone(scans, tmp_path, model, predictor):
    predict(plan_jobs(scans, tmp_path / "out"), predictor, model)
    predict(plan_jobs(scans / "a.nii.gz", tmp_path / "alone.nii.gz"), predictor, model)
    predict(plan_jobs(scans / "ct", tmp_path / "series.nii.gz"), predictor, model)
    assert (tmp_path / "out/a.nii.gz").read_bytes() == (tmp_path / "alone.nii.gz").read_bytes()
    assert (tmp_path / "out/ct.nii.gz").read_bytes() == (tmp_path / "series.nii.gz").read_bytes()


def test_dicom_series_and_its_conversion_give_the_same_label_map(tmp_path, model, predictor):
    hu = make_body(seed=3)[0]
    write_series(tmp_path / "ct", hu)
    save_nifti(tmp_path / "scan.nii", hu, SPACING_MM)
    for source in ("ct", "scan.nii"):
        predict(plan_jobs(tmp_path / source, tmp_path / f"{source}.nii.gz"), predictor, model)
    first, second = (nib.load(tmp_path / f"{name}.nii.gz") for name in ("ct", "scan.nii"))
    np.testing.assert_array_equal(first.dataobj, second.dataobj)
    np.testing.assert_allclose(first.affine[:3, :3], second.affine[:3, :3])
    np.testing.assert_allclose(first.affine[:3, 3], [100, 80, 30])


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".hdr", ".NII"])
def test_scan_of_another_program_gets_the_label_map_of_its_conversion(
    tmp_path, model, predictor, ending
):
    scan = save_nifti(tmp_path / "scan.nii", make_body(seed=3)[0], SPACING_MM, "RAS")
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(scan)), str(tmp_path / f"other{ending.lower()}"))
    other = (tmp_path / f"other{ending.lower()}").rename(tmp_path / f"other{ending}")
    for source in (scan, other):
        jobs = plan_jobs(source, tmp_path / f"{source.stem}.nii.gz")
        (outcome,) = predict(jobs, predictor, model)
        assert outcome.error is None
    first, second = (nib.load(tmp_path / f"{name}.nii.gz") for name in ("scan", "other"))
    np.testing.assert_array_equal(first.dataobj, second.dataobj)
    np.testing.assert_allclose(first.affine, second.affine, atol=1e-4)


def test_series_that_no_segmentation_can_refer_to_is_refused_before_the_work(
    tmp_path, model, predictor, monkeypatch
):
    folder = write_series(tmp_path / "ct", make_body()[0])
    for path in folder.iterdir():
        ds = pydicom.dcmread(path)
        del ds.FrameOfReferenceUID
        ds.save_as(path)
    jobs = plan_jobs(folder, tmp_path / "out.nii.gz", dicom_seg=tmp_path / "out.dcm")
    monkeypatch.setattr(type(predictor), "predict", None)  # it is not reached
    (outcome,) = predict(jobs, predictor, model)
    assert "no segmentation can refer to" in outcome.error
    assert not (tmp_path / "out.nii.gz").exists()


def test_label_map_of_a_tilted_gantry_lies_on_its_slices(tmp_path, model, predictor):
    hu = make_body(seed=3)[0]
    drift_mm = SPACING_MM[1]  # a row a slice, so that nothing is interpolated
    folder = write_series(tmp_path / "ct", hu, tilt_mm=drift_mm)
    jobs = plan_jobs(
        folder, tmp_path / "o.nii.gz", probabilities=True, statistics=tmp_path / "o.json",
        dicom_seg=tmp_path / "seg.dcm", rtstruct=tmp_path / "rt.dcm",
    )  # fmt: skip
    (outcome,) = predict(jobs, predictor, model)
    assert outcome.error is None
    (warning,) = json.loads((tmp_path / "o.json").read_text())["warnings"]
    assert warning["code"] == "gantry_tilt"
    upright_ZYX = segment_scan(predictor, load_scan(jobs[0].source).volume).label_ZYX
    written = nib.load(tmp_path / "o.nii.gz")
    label_ZYX = np.asarray(written.dataobj).transpose(2, 1, 0)
    assert label_ZYX.shape == hu.shape
    assert label_ZYX.any()
    for k, plane in enumerate(label_ZYX):
        np.testing.assert_array_equal(plane, upright_ZYX[k, k : k + 40])
    # The last voxel of the last slice, in LPS: -100, -80, 30 mm and its steps.
    last_mm = [-100 + 47 * 7, -80 + 39 * 7 + 15 * drift_mm, 30 + 15 * 8]
    found_mm = written.affine @ [47, 39, 15, 1]
    np.testing.assert_allclose(found_mm[:3], [-last_mm[0], -last_mm[1], last_mm[2]])
    segments = highdicom.seg.segread(tmp_path / "seg.dcm")
    uids = [pydicom.dcmread(path).SOPInstanceUID for path in sorted(folder.iterdir())[::-1]]
    drawn_ZYXK = segments.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    np.testing.assert_array_equal(drawn_ZYXK[..., 0] > 0, label_ZYX == 1)
