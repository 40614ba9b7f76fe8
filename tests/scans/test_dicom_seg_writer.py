from __future__ import annotations

import shutil
import subprocess

import highdicom
import numpy as np
import pydicom
import pytest
from bodies import make_body
from cohorts import write_series

from fullscale.ingestion.dicom_seg_layout import read_dicom_seg
from fullscale.runtime.errors import ScanError
from fullscale.scans.dicom import dicom_files, order_series, read_series
from fullscale.scans.dicom_seg_writer import (
    Maker,
    check_referable,
    write_segmentation,
    write_structure_set,
)

MAKER = Maker("fullscale-organs", "3", "ab" * 32, "0.1.0")
ORGANS = {"liver": 1, "spleen": 7}
IDENTITY = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID",
            "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName",
            "FrameOfReferenceUID")  # fmt: skip


@pytest.fixture(scope="module")
def body():
    hu, labels = make_body()
    return hu, np.array([0, 1, 7], dtype=np.uint8)[labels]


@pytest.fixture
def series(tmp_path, body):
    return write_series(tmp_path / "case/ct", body[0])


def write(folder, label_ZYX, organs=ORGANS):
    order = order_series(dicom_files(folder), "case")
    path = folder.parent / "seg.dcm"
    write_segmentation(path, label_ZYX, order, organs, MAKER)
    return path, order


def complaints(path):
    """Return the errors that dciodvfy, an independent checker, finds."""
    done = subprocess.run(
        ["dciodvfy", "-new", path], capture_output=True, text=True, check=False, timeout=60
    )
    return [line for line in (done.stderr + done.stdout).splitlines() if line.startswith("Error")]


needs_checker = pytest.mark.skipif(
    shutil.which("dciodvfy") is None, reason="dciodvfy, of dicom3tools, is not installed"
)


def test_segments_are_read_back_by_highdicom_on_their_slices(series, body):
    path, order = write(series, body[1])
    seg = highdicom.seg.segread(path)
    pixels = seg.get_pixels_by_source_instance(
        list(order.instance_uids), assert_missing_frames_are_empty=True
    )
    for number, label_id in enumerate(ORGANS.values()):
        np.testing.assert_array_equal(pixels[..., number] > 0, body[1] == label_id)


def test_segmentation_and_series_are_a_case_that_can_be_ingested(series, body):
    write(series, body[1])
    source = read_dicom_seg(series.parent)
    scan, labels = source.cases[0].load()
    np.testing.assert_array_equal(scan.values_ZYX, body[0])
    for organ, label_id in ORGANS.items():
        found = labels.values_ZYX == source.labels[organ]
        np.testing.assert_array_equal(found, body[1] == label_id)


@pytest.mark.parametrize(
    "orientation", [[-1, 0, 0, 0, -1, 0], [1, 0, 0, 0, 1, 0]], ids=["prone", "supine"]
)
def test_segments_lie_on_the_series_whatever_its_orientation(tmp_path, body, orientation):
    stored = body[0][:, ::-1, ::-1] if orientation[0] < 0 else body[0]
    folder = write_series(tmp_path / "case/ct", stored, ImageOrientationPatient=orientation)
    path, order = write(folder, body[1])
    np.testing.assert_array_equal(read_series(order, "case").values_ZYX, body[0])
    seg = highdicom.seg.segread(path)
    pixels = seg.get_pixels_by_source_instance(
        list(order.instance_uids), segment_numbers=[1], assert_missing_frames_are_empty=True
    )[..., 0]
    wanted = order.geometry.to_own_grid(body[1] == 1).transpose(2, 1, 0)
    np.testing.assert_array_equal(pixels > 0, wanted)


def test_header_is_of_the_patient_and_study_and_says_what_made_it(series, body):
    path, order = write(series, body[1])
    seg, source = pydicom.dcmread(path), pydicom.dcmread(order.files[0])
    for tag in IDENTITY:
        assert seg[tag].value == source[tag].value, tag
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == source.SeriesInstanceUID
    assert seg.SeriesInstanceUID != source.SeriesInstanceUID
    assert (seg.Manufacturer, seg.ManufacturerModelName) == ("Fullscale", "fullscale-organs")
    assert seg.DeviceSerialNumber == "ab" * 32
    liver, spleen = seg.SegmentSequence
    assert liver.SegmentAlgorithmType == "AUTOMATIC"
    algorithm = liver.SegmentationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("fullscale-organs", "3")
    codes = [each.SegmentedPropertyTypeCodeSequence[0].CodeValue for each in (liver, spleen)]
    assert codes == ["10200004", "78961009"]  # SNOMED CT


@pytest.mark.parametrize(
    ("organ", "code", "side"),
    [
        ("kidney_left", "64033007", "7771000"),
        ("Right Lung", "39607008", "24028007"),
        ("Liver", "10200004", None),
        ("urinary_bladder", "89837001", None),
        ("inferior_vena_cava", "64131007", None),
        ("liver_tumour", "91772007", None),
        ("glomus", "91772007", None),
    ],
)
def test_organ_has_a_code_of_its_kind_and_side(series, body, organ, code, side):
    path, _ = write(series, body[1], {organ: 1})
    (segment,) = pydicom.dcmread(path).SegmentSequence
    kind = segment.SegmentedPropertyTypeCodeSequence[0]
    assert (kind.CodingSchemeDesignator, kind.CodeValue) == ("SCT", code)
    sides = [each.CodeValue for each in kind.get("SegmentedPropertyTypeModifierCodeSequence", [])]
    assert sides == ([side] if side else [])


def test_segments_have_colours_that_differ(series, body):
    path, _ = write(series, body[1], {"liver": 1, "kidney_left": 7, "a": 2, "b": 3})
    segments = pydicom.dcmread(path).SegmentSequence
    assert len({tuple(each.RecommendedDisplayCIELabValue) for each in segments}) == 4


@needs_checker
def test_standard_is_kept_for_an_organ_with_a_side(series, body):
    path, _ = write(series, body[1], {"kidney_left": 1, "kidney_right": 7})
    assert complaints(path) == []


@pytest.mark.parametrize(
    ("organ", "name"), [("liver", "liver"), ("kidney_left", "kidney_left"), ("glomus", None)]
)
def test_segment_whose_label_is_a_number_is_named_by_its_code(series, body, organ, name):
    path, _ = write(series, body[1], {organ: 1})
    ds = pydicom.dcmread(path)
    ds.SegmentSequence[0].SegmentLabel = "Segment_1"
    ds.save_as(path)
    source = read_dicom_seg(series.parent)
    assert list(source.labels) == ([name] if name else [])
    assert [error.code for _, error in source.refused] == ([] if name else ["segment_unnamed"])


@needs_checker
@pytest.mark.parametrize("kept", [(1, 7), (1,), ()], ids=["both", "one", "none"])
def test_standard_is_kept_whatever_was_found(series, body, kept):
    path, _ = write(series, np.where(np.isin(body[1], kept), body[1], 0))
    assert complaints(path) == []


def test_structure_set_gives_the_label_map_back_also_of_slices_in_one_file(series, body, tmp_path):
    sources = [pydicom.dcmread(path) for path in series.iterdir()]
    uid = pydicom.uid.generate_uid
    whole = highdicom.legacy.LegacyConvertedEnhancedCTImage(sources, uid(), 7, uid(), 1)
    (tmp_path / "one/ct").mkdir(parents=True)
    whole.save_as(tmp_path / "one/ct/all.dcm")
    for folder in (series, tmp_path / "one/ct"):
        order = order_series(dicom_files(folder), "case")
        write_structure_set(folder.parent / "rt.dcm", body[1], order, ORGANS, MAKER)
        source = read_dicom_seg(folder.parent)
        _, labels = source.cases[0].load()
        for organ, label_id in ORGANS.items():
            found = labels.values_ZYX == source.labels[organ]
            np.testing.assert_array_equal(found, body[1] == label_id)


@needs_checker
@pytest.mark.parametrize("kept", [(1, 7), ()], ids=["both", "none"])
def test_structure_set_keeps_the_standard_and_the_patient(series, body, kept):
    order = order_series(dicom_files(series), "case")
    path = series.parent / "rt.dcm"
    found = np.where(np.isin(body[1], kept), body[1], 0)
    write_structure_set(path, found, order, ORGANS, MAKER)
    assert complaints(path) == []
    made, source = pydicom.dcmread(path), pydicom.dcmread(order.files[0])
    for tag in IDENTITY:
        assert made[tag].value == source[tag].value, tag


@needs_checker
def test_standard_is_kept_for_a_series_without_names(tmp_path, body):
    removed = dict.fromkeys(("PatientName", "PatientID", "PatientBirthDate", "AccessionNumber"), "")
    folder = write_series(tmp_path / "case/ct", body[0], **removed)
    path, _ = write(folder, body[1])
    assert complaints(path) == []


@needs_checker
def test_checker_does_complain_of_a_broken_file(series, body):
    path, _ = write(series, body[1])
    seg = pydicom.dcmread(path)
    del seg.SegmentSequence
    seg.save_as(path)
    assert complaints(path)


def test_series_without_identity_is_refused(series, body):
    for path in dicom_files(series):
        header = pydicom.dcmread(path)
        del header.FrameOfReferenceUID
        header.save_as(path)
    with pytest.raises(ScanError, match="no_segmentation: found a series that no segmentation"):
        write(series, body[1])
    assert not (series.parent / "seg.dcm").exists()


@pytest.mark.parametrize("tag", ["FrameOfReferenceUID", "StudyInstanceUID"])
def test_a_series_that_nothing_can_refer_to_is_refused_before_the_work(series, tag):
    order = order_series(dicom_files(series), "case")
    check_referable(order)
    for path in series.iterdir():
        ds = pydicom.dcmread(path)
        delattr(ds, tag)
        ds.save_as(path)
    with pytest.raises(ScanError, match="no segmentation can refer to"):
        check_referable(order_series(dicom_files(series), "case"))


def test_segments_of_slices_in_one_file_lie_on_their_slices(series, body):
    sources = [pydicom.dcmread(path) for path in series.iterdir()]
    uid = pydicom.uid.generate_uid
    whole = highdicom.legacy.LegacyConvertedEnhancedCTImage(sources, uid(), 7, uid(), 1)
    folder = series.parent.parent / "one/ct"
    folder.mkdir(parents=True)
    whole.save_as(folder / "all.dcm")
    write(folder, body[1])
    _, labels = read_dicom_seg(folder.parent).cases[0].load()
    assert np.array_equal(labels.values_ZYX > 0, body[1] > 0)
