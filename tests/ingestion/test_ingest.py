from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from bodies import make_body, save_nifti
from cohorts import (
    SPACING_MM,
    leave_unjudged,
    write_dataset_json,
    write_dicom_seg,
    write_lits,
    write_msd,
    write_nnunet,
    write_seg,
    write_series,
    write_totalsegmentator,
)
from test_layouts import WRITERS

from fullscale.ingestion.cohort_writer import IngestOptions
from fullscale.ingestion.ingest import ingest
from fullscale.ingestion.validate import validate
from fullscale.runtime.errors import ScanError
from fullscale.runtime.files import file_sha256
from fullscale.scans.cohort import IGNORED_ID, image_path, label_path, read_cohort

ROOT = Path(__file__).parents[2]


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("layout", WRITERS)
def test_ingest_takes_every_layout_and_leaves_the_source_alone(tmp_path, layout):
    source = WRITERS[layout](tmp_path / "in")
    before = tree(source)
    report = ingest(source, tmp_path / "data")
    assert report.layout == layout
    assert report.refused == []
    cohort = read_cohort(tmp_path / "data")
    assert [case.name for case in cohort.cases] == sorted(report.accepted)
    assert len(cohort.cases) >= 2
    assert tree(source) == before


def test_ingest_keeps_voxels_axes_and_affine(tmp_path):
    source = write_nnunet(tmp_path / "in", 4)
    ingest(source, tmp_path / "data")
    for case in read_cohort(tmp_path / "data").cases:
        for ours, theirs in (
            (case.image, source / "imagesTr" / case.image.name),
            (case.label, source / "labelsTr" / case.label.name),
        ):
            written, given = nib.load(ours), nib.load(theirs)
            np.testing.assert_array_equal(
                np.asanyarray(written.dataobj), np.asanyarray(given.dataobj)
            )
            np.testing.assert_allclose(written.affine, given.affine, atol=1e-4)
        assert nib.load(case.image).get_data_dtype() == np.int16
        assert nib.load(case.label).get_data_dtype() == np.uint8


@pytest.mark.slow
def test_ingest_gives_the_same_bytes_again_and_for_any_number_of_workers(tmp_path):
    source = write_nnunet(tmp_path / "in", 3)
    ingest(source, tmp_path / "first/data")
    ingest(source, tmp_path / "second/data", num_workers=2)
    assert tree(tmp_path / "first/data") == tree(tmp_path / "second/data")


def test_ingest_keeps_the_voxels_that_nobody_judged(tmp_path):
    """Under one id, whatever id they have in a source, so that later labels find theirs free."""
    source = write_nnunet(tmp_path / "in", 1)
    path = source / "labelsTr/case_00.nii.gz"
    leave_unjudged(path, 3)
    write_dataset_json(source, labels={"background": 0, "liver": 1, "spleen": 2, "ignore": 3})
    report = ingest(source, tmp_path / "data")
    assert [finding.code for finding in report.warnings] == ["label_ignored"]
    ingest(write_lits(tmp_path / "lits"), tmp_path / "data")
    cohort = read_cohort(tmp_path / "data")
    assert cohort.labels == {"background": 0, "liver": 1, "spleen": 2, "tumour": 3}
    dataset = json.loads((tmp_path / "data/dataset.json").read_text())
    assert dataset["labels"] == {**cohort.labels, "ignore": IGNORED_ID}
    given, kept = (np.asarray(nib.load(each).dataobj) for each in (path, cohort.cases[0].label))
    np.testing.assert_array_equal(kept, np.where(given == 3, IGNORED_ID, given))
    assert ingest(source, tmp_path / "data").skipped == ["case_00"]
    assert not validate(tmp_path / "data").num_refused
    again = ingest(tmp_path / "data", tmp_path / "copy/data")
    assert len(again.accepted) == len(cohort.cases)
    assert read_cohort(tmp_path / "copy/data").cases[0].label_sha256 == cohort.cases[0].label_sha256


def test_ingest_again_skips_what_is_there(tmp_path):
    source = write_nnunet(tmp_path / "in", 3)
    ingest(source, tmp_path / "data")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    report = ingest(source, tmp_path / "data")
    assert report.accepted == []
    assert report.skipped == ["case_00", "case_01", "case_02"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == before


def test_ingest_of_nnunet_rules_lets_nnunet_train_on_the_folder(tmp_path):
    ingest(write_lits(tmp_path / "lits"), tmp_path / "data")
    ingest(write_msd(tmp_path / "msd"), tmp_path / "data")
    ingest(write_totalsegmentator(tmp_path / "ts"), tmp_path / "data")
    data = tmp_path / "data"
    dataset = json.loads((data / "dataset.json").read_text())
    assert {"channel_names", "labels", "numTraining", "file_ending"} <= set(dataset)
    assert dataset["channel_names"] == {"0": "CT"}
    assert dataset["labels"]["background"] == 0
    assert sorted(dataset["labels"].values()) == list(range(len(dataset["labels"])))
    ending = dataset["file_ending"]
    images = sorted(path.name for path in (data / "imagesTr").iterdir())
    labels = sorted(path.name for path in (data / "labelsTr").iterdir())
    assert len(images) == dataset["numTraining"] == 6
    assert images == [name.removesuffix(ending) + "_0000" + ending for name in labels]
    for name in labels:
        label = nib.load(data / "labelsTr" / name)
        image = nib.load(data / "imagesTr" / (name.removesuffix(ending) + "_0000" + ending))
        assert label.shape == image.shape
        np.testing.assert_array_equal(label.affine, image.affine)
        assert set(np.unique(label.dataobj)) <= set(dataset["labels"].values())
    assert {path.name for path in data.iterdir()} == {
        "dataset.json",
        "cases.csv",
        "imagesTr",
        "labelsTr",
    }


def test_ingest_maps_labels_by_name_and_says_so(tmp_path):
    ingest(write_lits(tmp_path / "lits"), tmp_path / "data")
    report = ingest(write_msd(tmp_path / "msd"), tmp_path / "data")
    assert report.remapped == {"spleen": (1, 3)}
    cohort = read_cohort(tmp_path / "data")
    assert cohort.labels == {"background": 0, "liver": 1, "tumour": 2, "spleen": 3}
    by_name = {case.name: case for case in cohort.cases}
    spleen = np.asanyarray(nib.load(by_name["spleen_0"].label).dataobj)
    given = np.asanyarray(nib.load(tmp_path / "msd/labelsTr/spleen_0.nii.gz").dataobj)
    np.testing.assert_array_equal(spleen, 3 * given)
    organs = {"liver": (1, 2), "spleen": (3,)}
    assert cohort.annotated_organs(by_name["spleen_0"], organs) == ("spleen",)
    assert cohort.annotated_organs(by_name["lits_000"], organs) == ("liver",)


def test_ingest_takes_the_spelling_of_the_cohort(tmp_path):
    ingest(write_nnunet(tmp_path / "in", 1), tmp_path / "data")
    later = write_nnunet(tmp_path / "later", 1, prefix="late", seed=50)
    write_dataset_json(later, labels={"background": 0, "SPLEEN ": 2, "Liver": 1})
    report = ingest(later, tmp_path / "data")
    cohort = read_cohort(tmp_path / "data")
    assert cohort.labels == {"background": 0, "liver": 1, "spleen": 2}
    assert [case.annotated for case in cohort.cases] == [("liver", "spleen")] * 2
    told = [finding.found for finding in report.warnings if finding.code == "label_spelling"]
    assert "'Liver', which is 'liver' here" in told
    assert ingest(later, tmp_path / "data").skipped == ["late_00"]


def test_ingest_honours_patients_and_annotation(tmp_path):
    rows = "case_00,p1,liver\ncase_01,p1,liver;spleen\n"
    source = write_nnunet(tmp_path / "in", 2, cases_csv=rows)
    report = ingest(source, tmp_path / "data")
    cohort = read_cohort(tmp_path / "data")
    assert [case.patient for case in cohort.cases] == ["p1", "p1"]
    assert [case.annotated for case in cohort.cases] == [("liver",), ("liver", "spleen")]
    codes = {(finding.case, finding.code) for finding in report.warnings}
    assert ("case_01", "patient_shared") in codes
    assert ("case_00", "label_not_annotated") in codes


def test_ingest_leaves_bad_pairs_out_and_says_why(tmp_path):
    source = write_nnunet(tmp_path / "in", 4)
    image = source / "imagesTr/case_01_0000.nii.gz"
    image.write_bytes(image.read_bytes()[:-30])
    (source / "labelsTr/case_02.nii.gz").unlink()
    report = ingest(source, tmp_path / "data")
    assert report.accepted == ["case_00", "case_03"]
    assert [(r.case, r.code) for r in report.refused] == [
        ("case_01", "unreadable"),
        ("case_02", "file_missing"),
    ]
    assert {case.name for case in read_cohort(tmp_path / "data").cases} == {"case_00", "case_03"}
    quarantine = json.loads((tmp_path / "quarantine.json").read_text())
    assert [entry["code"] for entry in quarantine["refused"]] == ["unreadable", "file_missing"]
    assert all(entry["wanted"] and entry["cure"] for entry in quarantine["refused"])
    assert not list((tmp_path / "data").rglob("*case_01*"))


def test_ingest_goes_on_after_a_file_the_disk_does_not_give(tmp_path, monkeypatch):
    source = write_nnunet(tmp_path / "in", 2)

    def broken_disk(path):
        if path.name.startswith("case_00"):
            raise OSError(5, "Input/output error")
        return file_sha256(path)

    monkeypatch.setattr("fullscale.scans.cohort.file_sha256", broken_disk)
    report = ingest(source, tmp_path / "data")
    assert report.accepted == ["case_01"]
    assert report.refused[0].code == "unreadable"
    assert "Input/output error" in report.refused[0].found


def test_ingest_of_nothing_usable_makes_no_cohort(tmp_path):
    source = write_nnunet(tmp_path / "in", 2)
    for path in (source / "imagesTr").iterdir():
        path.write_bytes(b"")
    report = ingest(source, tmp_path / "data")
    assert report.num_usable == 0
    assert len(report.refused) == 2
    assert not (tmp_path / "data/cases.csv").exists()


def test_ingest_dry_run_writes_nothing(tmp_path):
    source = write_nnunet(tmp_path / "in", 3)
    (source / "imagesTr/case_02_0000.nii.gz").write_bytes(b"")
    report = ingest(source, tmp_path / "data", IngestOptions(dry_run=True))
    assert report.accepted == ["case_00", "case_01"]
    assert [finding.case for finding in report.refused] == ["case_02"]
    assert not (tmp_path / "data").exists()
    assert not (tmp_path / "quarantine.json").exists()


def test_ingest_refuses_the_same_scan_under_another_name_and_orientation(tmp_path):
    ingest(write_nnunet(tmp_path / "in", 2), tmp_path / "data")
    again = write_nnunet(tmp_path / "again", 1, prefix="other", seed=1)
    report = ingest(again, tmp_path / "data")
    assert report.accepted == []
    (finding,) = report.refused
    assert finding.code == "content_twice"
    assert "other_00 with the voxels of case_01" in finding.found


def test_ingest_refuses_new_content_under_an_old_name_unless_told(tmp_path):
    ingest(write_nnunet(tmp_path / "in", 2), tmp_path / "data")
    before = tree(tmp_path / "data")
    other = write_nnunet(tmp_path / "other", 2, seed=50)
    report = ingest(other, tmp_path / "data")
    assert [finding.code for finding in report.refused] == ["case_exists"] * 2
    assert tree(tmp_path / "data") == before
    report = ingest(other, tmp_path / "data", IngestOptions(replace_changed=True))
    assert report.accepted == ["case_00", "case_01"]
    ingest(other, tmp_path / "fresh/data")
    kept = tmp_path / "data" / "imagesTr/case_00_0000.nii.gz"
    assert kept.read_bytes() == image_path(tmp_path / "fresh/data", "case_00").read_bytes()


@pytest.mark.parametrize(
    ("sent", "accepted"),
    [
        ({"a": 2, "b": 1}, ["a", "b"]),
        ({"a": 2, "b": 3, "c": 1}, ["a", "b", "c"]),
        ({"0": 1, "a": 4}, ["0", "a"]),
        ({"0": 4, "a": 4}, ["a"]),
        ({"0": 1, "a": 2}, []),
    ],
    ids=["exchanged", "in a ring", "moved", "twice", "old content stays"],
)
def test_replaced_cases_are_compared_with_what_stands_at_the_end(tmp_path, sent, accepted):
    def write(folder, seeds):
        for name, seed in seeds.items():
            hu, labels = make_body(seed=seed)
            save_nifti(folder / f"imagesTr/{name}_0000.nii.gz", hu, SPACING_MM)
            save_nifti(folder / f"labelsTr/{name}.nii.gz", labels, SPACING_MM)
        write_dataset_json(folder)
        return folder

    data = tmp_path / "data"
    ingest(write(tmp_path / "one", {"a": 1, "b": 2, "c": 3}), data)
    report = ingest(write(tmp_path / "two", sent), data, IngestOptions(replace_changed=True))
    assert sorted(report.accepted) == accepted
    assert {finding.code for finding in report.refused} <= {"content_twice"}
    voxels = [case.voxels_sha256 for case in read_cohort(data).cases]
    assert len(set(voxels)) == len(voxels)


def test_ingest_gives_safe_names_and_says_so(tmp_path):
    source = write_nnunet(tmp_path / "in", 1)
    for seed, name in enumerate(("a b", "a.b", "-x", "a" * 70), start=9):
        hu, labels = make_body(seed=seed)
        save_nifti(source / f"imagesTr/{name}_0000.nii.gz", hu, SPACING_MM)
        save_nifti(source / f"labelsTr/{name}.nii.gz", labels, SPACING_MM)
    report = ingest(source, tmp_path / "data")
    assert len(set(report.accepted)) == 5
    told = [finding.found for finding in report.warnings if finding.code == "case_renamed"]
    assert len(told) == 4
    assert any(found.startswith("'a b', here a_b_") for found in told)
    assert ingest(source, tmp_path / "data").skipped == report.accepted


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize(
    "names", [("patient 1", "patient_1"), ("张三01", "李四01"), ("Müller", "Möller")]
)
def test_ingest_keeps_folders_of_similar_names_apart(tmp_path, names, num_workers):
    source = write_totalsegmentator(tmp_path / "in", 2)
    for number, name in enumerate(names):
        (source / f"s{number:04d}").rename(source / name)
    report = ingest(source, tmp_path / "data", num_workers=num_workers)
    assert report.num_found == len(report.accepted) == 2
    for case in read_cohort(tmp_path / "data").cases:
        assert file_sha256(case.image) == case.image_sha256
        assert file_sha256(case.label) == case.label_sha256


def test_ingest_refuses_a_name_that_differs_from_a_case_in_letter_case_only(tmp_path):
    ingest(write_nnunet(tmp_path / "in", 1), tmp_path / "data")
    other = write_nnunet(tmp_path / "other", 1, prefix="CASE", seed=50)
    report = ingest(other, tmp_path / "data", IngestOptions(replace_changed=True))
    assert [finding.code for finding in report.refused] == ["case_exists"]
    assert "CASE_00; case_00 came from" in report.refused[0].found


def test_ingest_counts_each_case_once_however_many_findings_refuse_it(tmp_path):
    source = write_nnunet(tmp_path / "in", 2)
    hu = np.zeros((4, 24, 28), np.int16)
    save_nifti(source / "imagesTr/case_00_0000.nii.gz", hu, SPACING_MM)
    save_nifti(source / "labelsTr/case_00.nii.gz", hu.astype(np.uint8), SPACING_MM)
    report = ingest(source, tmp_path / "data")
    assert len(report.refused) > 1
    assert (report.num_found, len(report.accepted), report.num_refused) == (2, 1, 1)


def test_ingest_that_loses_a_case_fails(tmp_path):
    source = write_nnunet(tmp_path / "in", 2)

    def forgetful(items, *_):
        yield from list(items)[:1]

    with pytest.raises(ScanError, match="cohort_incomplete: found 2 cases, 1 outcomes"):
        ingest(source, tmp_path / "data", progress=forgetful)
    assert ingest(source, tmp_path / "data").num_usable == 2


@pytest.mark.slow  # two other programs ingest
def test_two_ingests_at_once_keep_the_cases_of_both(tmp_path):
    sources = [
        write_nnunet(tmp_path / name, 4, prefix=name, seed=seed)
        for name, seed in (("first", 0), ("second", 50))
    ]
    command = (
        "import sys; from pathlib import Path; from fullscale.ingestion.ingest import ingest;"
        "ingest(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", command, str(source), str(tmp_path / "data")],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for source in sources
    ]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    assert len(read_cohort(tmp_path / "data").cases) == 8


def test_ingest_leaves_private_text_behind_and_lists_it(tmp_path):
    source = write_nnunet(tmp_path / "in", 1)
    path = source / "imagesTr/case_00_0000.nii.gz"
    image = nib.load(path)
    image.header["descrip"], image.header["db_name"] = b"Jane Doe 1950", b"clinic"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe"))
    nib.save(image, path)
    report = ingest(source, tmp_path / "data")
    (note,) = report.warnings
    assert (note.code, note.severity) == ("private_text", "note")
    assert "descrip" in note.found
    assert "extension" in note.found
    content = nib.load(image_path(tmp_path / "data", "case_00"))
    assert b"Jane" not in content.header.binaryblock
    assert len(content.header.extensions) == 0
    assert "Jane" not in (tmp_path / "quarantine.json").read_text()


def test_ingest_of_dicom_keeps_no_patient_data(tmp_path):
    report = ingest(write_dicom_seg(tmp_path / "in"), tmp_path / "data")
    assert any("PatientName" in finding.found for finding in report.warnings)
    text = (tmp_path / "data/cases.csv").read_text() + (tmp_path / "quarantine.json").read_text()
    for private in ("Doe", "Jane", "ID-17", "Roe"):
        assert private not in text


def header_ids(folder, header_id):
    for path in folder.rglob("*.dcm"):
        ds = pydicom.dcmread(path)
        ds.PatientID = header_id
        ds.save_as(path)


def test_ingest_joins_the_studies_of_one_patient_over_several_runs(tmp_path):
    data = tmp_path / "data"
    first, second, third = (write_dicom_seg(tmp_path / name, 1) for name in ("a", "b", "c"))
    for number, source in enumerate((first, second, third)):
        (source / "subject-1").rename(source / f"study-{number}")
        hu_shift(source, number)
    header_ids(third, "ID-99")
    for source in (first, second, third):
        assert len(ingest(source, data).accepted) == 1
    patients = {case.name: case.patient for case in read_cohort(data).cases}
    assert patients == {"study-0": "study-0", "study-1": "study-0", "study-2": "study-2"}
    before = tree(data)
    assert ingest(second, data).skipped == ["study-1"]
    assert tree(data) == before
    text = (data / "patients.json").read_text() + (data / "cases.csv").read_text()
    for private in ("ID-17", "ID-99", hashlib.sha256(b"ID-17").hexdigest()):
        assert private not in text


def hu_shift(source, number):
    """Make the scan another one: raise each voxel by a few HU."""
    for path in (source / f"study-{number}/ct").iterdir():
        ds = pydicom.dcmread(path)
        ds.RescaleIntercept = str(-1024 + number)
        ds.save_as(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda hu: hu[1:],
        lambda hu: hu[:9],
        lambda hu: hu[::-1],
        lambda hu: hu[:, ::-1, ::-1],
        lambda hu: hu[2:, :, ::-1],
    ],
    ids=["one slice less", "cut", "upside down", "turned", "turned and cut"],
)
@pytest.mark.parametrize("at_once", [True, False], ids=["one run", "two runs"])
def test_a_scan_that_comes_again_changed_joins_its_patient(tmp_path, change, at_once):
    def write(folder, **scans):
        for name, (hu, labels) in scans.items():
            save_nifti(folder / f"imagesTr/{name}_0000.nii.gz", hu, SPACING_MM)
            save_nifti(folder / f"labelsTr/{name}.nii.gz", labels, SPACING_MM)
        write_dataset_json(folder)
        return folder

    body, other, data = make_body(seed=1), make_body(seed=2), tmp_path / "data"
    changed = [np.ascontiguousarray(change(values)) for values in body]
    first = write(tmp_path / "one", a=body, b=other)
    second = write(tmp_path / ("one" if at_once else "two"), c=changed)
    reports = [ingest(folder, data) for folder in dict.fromkeys((first, second))]
    patients = {case.name: case.patient for case in read_cohort(data).cases}
    assert patients == {"a": "a", "b": "b", "c": "a"}
    told = [(f.case, f.found) for f in reports[-1].warnings if f.code == "content_alike"]
    assert told == [("c", "c with slices of a")]


def test_ingest_keeps_patients_of_one_name_and_two_header_ids_apart(tmp_path):
    data = tmp_path / "data"
    ingest(write_nnunet(tmp_path / "in", 1, cases_csv="case_00,subject-1,liver\n"), data)
    ingest(write_dicom_seg(tmp_path / "dicom", 1), data)
    first, second = [case.patient for case in read_cohort(data).cases]
    assert first == "subject-1"
    assert second.startswith("subject-1_")


def test_ingest_joins_patients_that_differ_in_letter_case_only(tmp_path):
    data = tmp_path / "data"
    ingest(write_nnunet(tmp_path / "in", 1, cases_csv="case_00,Patient A,liver\n"), data)
    rows = "late_00,patient a,liver\nlate_01,PATIENT A,liver\n"
    later = write_nnunet(tmp_path / "later", 2, prefix="late", seed=40, cases_csv=rows)
    report = ingest(later, data)
    assert {case.patient for case in read_cohort(data).cases} == {"Patient A"}
    assert sum(finding.code == "patient_shared" for finding in report.warnings) == 2
    assert ingest(later, data).skipped == report.accepted


def test_ingest_dry_run_of_dicom_writes_no_key(tmp_path):
    ingest(write_dicom_seg(tmp_path / "in", 1), tmp_path / "data", IngestOptions(dry_run=True))
    assert not (tmp_path / "data").exists()


def test_ingest_into_a_folder_that_is_no_cohort_is_refused(tmp_path):
    source = write_nnunet(tmp_path / "in", 1)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/thesis.docx").write_text("mine")
    with pytest.raises(ScanError, match=r"not_a_cohort: found .* holding thesis.docx"):
        ingest(source, tmp_path / "data")
    assert (tmp_path / "data/thesis.docx").read_text() == "mine"


def test_ingest_reports_progress_over_every_case(tmp_path):
    calls = []

    def progress(items, description, total):
        calls.append((description, total))
        for item in items:
            calls.append(item.case)
            yield item

    ingest(write_nnunet(tmp_path / "in", 2), tmp_path / "data", progress=progress)
    assert calls == [("ingest", 2), "case_00", "case_01"]


def test_ingest_survives_leftovers_of_a_killed_run(tmp_path):
    source = write_nnunet(tmp_path / "in", 2)
    ingest(source, tmp_path / "whole/data")
    data = tmp_path / "data"
    (data / ".incoming").mkdir(parents=True)
    (data / ".incoming/case_00-ct.nii.gz.part").write_bytes(b"half")
    label_path(data, "case_01").parent.mkdir()
    label_path(data, "case_01").write_bytes(b"half")
    (data / "dataset.json").write_text("{}")
    ingest(source, data)
    assert tree(data) == tree(tmp_path / "whole/data")


@pytest.mark.slow
def test_ingest_killed_at_any_moment_ends_in_the_same_cohort(tmp_path):
    source = write_nnunet(tmp_path / "in", 12)
    ingest(source, tmp_path / "whole/data")
    command = (
        "import sys; from pathlib import Path; from fullscale.ingestion.ingest import ingest;"
        "ingest(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    data, num_killed = tmp_path / "data", 0
    for attempt in range(40):
        process = subprocess.Popen(
            [sys.executable, "-c", command, str(source), str(data)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        deadline = time.monotonic() + 60
        before = _num_rows(data)
        while process.poll() is None and _num_rows(data) < before + 1:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(0.0007 * attempt)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            num_killed += 1
        process.wait()
        if (data / "cases.csv").exists():
            for case in read_cohort(data).cases:
                assert file_sha256(case.image) == case.image_sha256
                assert file_sha256(case.label) == case.label_sha256
        if process.returncode == 0:
            break
    assert num_killed >= 3
    ingest(source, data)
    assert tree(data) == tree(tmp_path / "whole/data")


def _num_rows(data: Path) -> int:
    path = data / "cases.csv"
    return len(path.read_text().splitlines()) - 1 if path.exists() else 0


def test_ingest_marks_new_cases_as_for_training_only_and_leaves_old_ones(tmp_path):
    ingest(write_nnunet(tmp_path / "in", 2), tmp_path / "data")
    write_nnunet(tmp_path / "in", 3)
    report = ingest(tmp_path / "in", tmp_path / "data", IngestOptions(training_only=True))
    assert report.accepted == ["case_02"]
    flags = {case.name: case.training_only for case in read_cohort(tmp_path / "data").cases}
    assert flags == {"case_00": False, "case_01": False, "case_02": True}
    write_nnunet(tmp_path / "in", 4)
    ingest(tmp_path / "in", tmp_path / "data")
    flags = [case.training_only for case in read_cohort(tmp_path / "data").cases]
    assert flags == [False, False, True, False]


def test_reference_of_a_source_is_named_once_also_with_a_semicolon_in_it(tmp_path):
    source = write_nnunet(tmp_path / "source", 3)
    write_dataset_json(source, licence="CC-BY-SA 4.0; see LICENSE", reference="A; B")
    ingest(source, tmp_path / "data")
    later = write_nnunet(tmp_path / "later", 2, prefix="later", seed=50)
    write_dataset_json(later, licence="CC-BY", reference="B")
    ingest(later, tmp_path / "data")
    content = json.loads((tmp_path / "data/dataset.json").read_text())
    assert content["licence"] == "CC-BY-SA 4.0; see LICENSE; CC-BY"
    assert content["reference"] == "A; B"


def test_ingest_accepts_a_refusal_of_judgement_and_remembers_it(tmp_path):
    source, data = write_nnunet(tmp_path / "in", 2), tmp_path / "data"
    path = source / "imagesTr/case_00_0000.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) + np.int16(1024), image.affine), path)
    assert ingest(source, data).num_refused == 1
    report = ingest(source, data, IngestOptions(accepted=("not_hu",), strict=True))
    assert report.accepted == ["case_00"]
    assert [f.code for f in report.warnings if f.severity == "warning"] == ["not_hu"]
    accepted = {case.name: case.accepted for case in read_cohort(data).cases}
    assert accepted == {"case_00": ("not_hu",), "case_01": ()}


def test_tilted_series_is_ingested_only_if_asked_for(tmp_path):
    hu, labels = make_body()
    folder = write_series(tmp_path / "in/case/ct", hu, tilt_mm=SPACING_MM[1])
    masks = (labels[..., None] == 1).astype(np.uint8)
    write_seg(tmp_path / "in/case/seg.dcm", folder, masks, ["Liver"])
    report = ingest(tmp_path / "in", tmp_path / "data")
    assert [finding.code for finding in report.refused] == ["gantry_tilt"]
    assert "--accept gantry_tilt" in report.refused[0].cure
    options = IngestOptions(accepted=("gantry_tilt",))
    assert ingest(tmp_path / "in", tmp_path / "data", options).accepted == ["case"]
    drawn = nib.load(tmp_path / "data/labelsTr/case.nii.gz").get_fdata().transpose(2, 1, 0)
    for k, plane in enumerate(drawn):
        np.testing.assert_array_equal(plane[k : k + 40], labels[k] == 1)
