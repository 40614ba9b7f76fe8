"""Sources whose names, tables and files are written in a way that other programs write them."""

from __future__ import annotations

import json
import os
from unicodedata import normalize

import numpy as np
import pydicom
import pytest
from bodies import LABELS, make_body
from cohorts import (
    write_dataset_json,
    write_dicom_seg,
    write_ircadb,
    write_lits,
    write_msd,
    write_nnunet,
    write_seg,
    write_series,
    write_totalsegmentator,
)
from pydicom.uid import ImplicitVRLittleEndian, JPEGLSLossless, RLELossless

from fullscale.ingestion.ingest import ingest
from fullscale.ingestion.layouts import read_source
from fullscale.runtime.errors import ScanError
from fullscale.scans.cohort import read_cohort

MUELLER = "Müller"


def rename(folder, image, label):
    """Rename the files of the only case of an nnU-Net folder."""
    (folder / "imagesTr/case_00_0000.nii.gz").rename(folder / f"imagesTr/{image}_0000.nii.gz")
    (folder / "labelsTr/case_00.nii.gz").rename(folder / f"labelsTr/{label}.nii.gz")


@pytest.mark.parametrize(
    ("image", "label", "row"),
    [("NFC", "NFD", "NFC"), ("NFD", "NFC", "NFD"), ("NFD", "NFD", "NFC"), ("NFC", "NFC", "NFD")],
)
def test_accents_stored_in_two_ways_are_one_name(tmp_path, image, label, row):
    write_nnunet(tmp_path, 1, cases_csv=f"{normalize(row, MUELLER)},p1,liver;spleen\n")
    rename(tmp_path, normalize(image, MUELLER), normalize(label, MUELLER))
    source = read_source(tmp_path)
    assert (source.refused, source.findings) == ((), ())
    assert [(case.patient, case.doubts) for case in source.cases] == [("p1", ())]
    assert source.cases[0].load()[1].values_ZYX.any()


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("separator", ["/", "\\"])
def test_listed_paths_are_found_as_other_systems_write_them(tmp_path, form, separator):
    write_msd(tmp_path, 1)
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    for path in tmp_path.glob("*Tr/*"):
        path.rename(path.with_name(f"{normalize(form, MUELLER)}.nii.gz"))
    table = tmp_path / "dataset.json"
    pair = {
        part: f"./{part}sTr/{normalize(other, MUELLER)}.nii.gz".replace("/", separator)
        for part in ("image", "label")
    }
    table.write_text(json.dumps({**json.loads(table.read_text()), "training": [pair]}))
    source = read_source(tmp_path)
    assert (source.refused, source.findings) == ((), ())
    assert source.cases[0].load()[1].values_ZYX.any()


def test_listed_path_with_backslashes_stays_in_its_folder(tmp_path):
    write_msd(tmp_path / "in", 1)
    (tmp_path / "out.nii.gz").write_bytes(b"")
    table = tmp_path / "in/dataset.json"
    pair = {"image": "..\\out.nii.gz", "label": "./labelsTr/spleen_0.nii.gz"}
    table.write_text(json.dumps({**json.loads(table.read_text()), "training": [pair]}))
    assert [error.code for _, error in read_source(tmp_path / "in").refused] == ["path_outside"]


def test_listed_pair_that_is_no_two_paths_is_refused(tmp_path):
    write_msd(tmp_path, 1)
    table = tmp_path / "dataset.json"
    pair = {"image": ["a_0000.nii.gz", "a_0001.nii.gz"], "label": "a.nii.gz"}
    table.write_text(json.dumps({**json.loads(table.read_text()), "training": [pair]}))
    with pytest.raises(ScanError, match=r"dataset_json: .* training entry .*a_0001"):
        read_source(tmp_path)


@pytest.mark.parametrize("ending", ["nii.gz", ".NII.GZ", None])
def test_file_ending_is_read_with_or_without_its_dot(tmp_path, ending):
    write_nnunet(tmp_path, 1)
    write_dataset_json(tmp_path, file_ending=ending)
    assert [case.name for case in read_source(tmp_path).cases] == ["case_00"]


def test_columns_of_cases_csv_may_be_in_capitals(tmp_path):
    write_nnunet(tmp_path, 1)
    table = "\ufeffCase, Patient ,ANNOTATED\ncase_00,p1,liver;liver; spleen\n"
    (tmp_path / "cases.csv").write_text(table, encoding="utf-8")
    (case,) = read_source(tmp_path).cases
    assert (case.patient, case.annotated) == ("p1", ("liver", "spleen"))


@pytest.mark.parametrize(
    "table",
    [
        'case,patient,annotated\ncase_00,"p1,liver;spleen\n',
        "case,patient,annotated,Patient\ncase_00,p1,liver;spleen,p2\n",
    ],
    ids=["a quote that does not end", "a column twice"],
)
def test_cases_csv_that_can_be_read_in_two_ways_is_refused(tmp_path, table):
    write_nnunet(tmp_path, 1)
    (tmp_path / "cases.csv").write_text(table)
    with pytest.raises(ScanError, match="cases_csv"):
        read_source(tmp_path)


@pytest.mark.parametrize(("name", "label"), [("liver;left", "liver left"), ("a  b ", "a b")])
def test_names_of_masks_make_labels_that_cases_csv_can_hold(tmp_path, name, label):
    """A cohort with another label could never be read again."""
    source = write_totalsegmentator(tmp_path / "in", 1)
    masks = source / "s0000/segmentations"
    (masks / "liver.nii.gz").rename(masks / f"{name}.nii.gz")
    ingest(source, tmp_path / "data")
    assert read_cohort(tmp_path / "data").cases[0].annotated == (label, "spleen")


def test_names_of_folders_of_masks_make_labels_that_cases_csv_can_hold(tmp_path):
    source = write_ircadb(tmp_path / "in", 1)
    masks = source / "3Dircadb1.1/MASKS_DICOM"
    (masks / "liver").rename(masks / "liver; left")
    assert "liver_left" in read_source(source).labels


def test_background_is_no_organ(tmp_path):
    write_totalsegmentator(tmp_path / "masks", 1)
    masks = tmp_path / "masks/s0000/segmentations"
    (masks / "spleen.nii.gz").rename(masks / "background.nii.gz")
    hu, labels = make_body()
    write_series(tmp_path / "seg/s/ct", hu)
    both = np.stack([labels == 0, labels == 1], axis=-1).astype(np.uint8)
    write_seg(tmp_path / "seg/s/seg.dcm", tmp_path / "seg/s/ct", both, ("Background", "Liver"))
    for folder in ("masks", "seg"):
        source = read_source(tmp_path / folder)
        assert source.labels == {"liver": 1}
        assert source.cases[0].annotated == ("liver",)


def test_mask_with_the_name_of_unjudged_voxels_is_refused(tmp_path):
    write_totalsegmentator(tmp_path, 1)
    masks = tmp_path / "s0000/segmentations"
    (masks / "spleen.nii.gz").rename(masks / "ignore.nii.gz")
    with pytest.raises(ScanError, match=r"segment_unnamed: .* label 'ignore'"):
        read_source(tmp_path)


def test_files_in_folders_of_their_names_are_read(tmp_path):
    """As Kaggle unpacks LiTS."""
    write_lits(tmp_path, (0,))
    for path in list(tmp_path.rglob("*.nii")):
        path.rename(tmp_path / "moved")
        path.mkdir()
        (tmp_path / "moved").rename(path / path.name)
    source = read_source(tmp_path)
    assert (source.refused, source.findings) == ((), ())
    assert [case.name for case in source.cases] == ["lits_000"]


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": {**LABELS, "liver": 1.5}},
        {"labels": {**LABELS, "liver": float("inf")}},
        {"labels": {**LABELS, "liver": None}},
    ],
)
def test_ids_that_are_no_whole_numbers_are_refused(tmp_path, changes):
    write_nnunet(tmp_path, 1)
    write_dataset_json(tmp_path, **changes)
    with pytest.raises(ScanError, match="dataset_json"):
        read_source(tmp_path)


@pytest.mark.parametrize(
    ("region", "order"), [([[1], 2], [1, 2]), ([1, 2], [[1], [2]]), ([1.5, 2], [1, 2]), ([], "12")]
)
def test_regions_of_what_is_no_id_are_refused(tmp_path, region, order):
    write_nnunet(tmp_path, 1)
    labels = {"background": 0, "whole": region, "spleen": 2}
    write_dataset_json(tmp_path, labels=labels, regions_class_order=order)
    with pytest.raises(ScanError, match="label_regions"):
        read_source(tmp_path)


def test_regions_of_ids_that_are_written_as_text_are_read(tmp_path):
    write_nnunet(tmp_path, 1)
    labels = {"background": "0", "the  whole": ["1", "2"], "spleen": "2"}
    write_dataset_json(tmp_path, labels=labels, regions_class_order=["1", "2"])
    source = read_source(tmp_path)
    assert source.labels == {"the whole": 1, "spleen": 2}
    assert [finding.found for finding in source.findings] == ["the whole: [the whole, spleen]"]


def test_series_whose_files_are_compressed_differently_is_read(tmp_path):
    write_dicom_seg(tmp_path, 1)
    before = read_source(tmp_path).cases[0].load()[0].values_ZYX
    for k, path in enumerate((tmp_path / "subject-1/ct").iterdir()):
        ds = pydicom.dcmread(path)
        if syntax := (None, RLELossless, JPEGLSLossless, None)[k % 4]:
            ds.compress(syntax, generate_instance_uid=False)
        elif k % 4:
            ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        ds.save_as(path, implicit_vr=k % 4 == 3, little_endian=True)
    np.testing.assert_array_equal(read_source(tmp_path).cases[0].load()[0].values_ZYX, before)


def test_pipes_are_named_and_never_opened(tmp_path):
    """Opening one would wait for a program that writes into it."""
    write_dicom_seg(tmp_path, 1)
    for name in ("subject-1/ct/pipe.dcm", "subject-1/pipe"):
        os.mkfifo(tmp_path / name)
    source = read_source(tmp_path)
    assert len(source.cases) == 1
    assert {path.name for path in source.unread} == {"pipe.dcm", "pipe"}


def test_segmentation_of_slices_that_are_not_there_says_so(tmp_path):
    write_dicom_seg(tmp_path, 1)
    for path in sorted((tmp_path / "subject-1/ct").iterdir())[:2]:
        path.unlink()
    with pytest.raises(ScanError, match=r"^slices_missing: .* drawn on \d slices"):
        read_source(tmp_path).cases[0].load()


def test_segmentation_without_pixels_is_unreadable(tmp_path):
    write_dicom_seg(tmp_path, 1)
    path = tmp_path / "subject-1/seg.dcm"
    ds = pydicom.dcmread(path)
    del ds.PixelData
    ds.save_as(path)
    with pytest.raises(ScanError, match=r"^unreadable"):
        read_source(tmp_path).cases[0].load()


def test_series_without_directions_is_refused_for_its_header(tmp_path):
    write_dicom_seg(tmp_path, 1)
    for path in (tmp_path / "subject-1/ct").iterdir():
        ds = pydicom.dcmread(path)
        ds.ImageOrientationPatient = [0] * 6
        ds.save_as(path)
    with pytest.raises(ScanError, match=r"^affine: .* ImageOrientationPatient \[0\.0"):
        read_source(tmp_path).cases[0].load()
