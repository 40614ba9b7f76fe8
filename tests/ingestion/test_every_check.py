"""Each check with an input that causes it, and with the same input after its cure.

A maker writes an input into an empty folder and yields; then it does what the cure says. It yields
a function to look with where `fullscale validate FOLDER` is not what finds the problem. The maker
of a note has no second part: its cure is to do nothing.
"""

from __future__ import annotations

import json
import shutil

import nibabel as nib
import numpy as np
import pydicom
import pytest
from bodies import LABELS, TRUNK_MM, lps_affine, make_body, make_trunk, save_nifti
from cohorts import (
    SPACING_MM,
    save_structure_set,
    structure_set,
    write_chaos,
    write_dataset_json,
    write_dicom_seg,
    write_ircadb,
    write_msd,
    write_nnunet,
    write_seg,
    write_series,
    write_totalsegmentator,
)
from scipy.ndimage import zoom
from test_layouts import leave_unjudged

from fullscale.ingestion.ingest import ingest
from fullscale.ingestion.validate import validate
from fullscale.label_names import resolve_organs
from fullscale.runtime.errors import ScanError
from fullscale.scans.checks import CHECKS, Finding
from fullscale.scans.cohort import read_cohort
from fullscale.scans.parallel import Compute, map_cases
from fullscale.scans.slice_store import SliceStore
from fullscale.scans.slice_writer import SliceRecipe, write_case, write_tables

MAKERS = {}
NO_CURE_HERE = {"cluster"}  # tests/tasks/test_slice.py starts a scheduler
RECIPE = SliceRecipe({"liver": (1,), "spleen": (2,)}, 40, 10.0, (-160.0, 240.0), -300.0)


def makes(code, found):
    """Register the maker of an input for a check, and a text that the finding must have."""

    def register(maker):
        assert code not in MAKERS
        MAKERS[code] = maker, found
        return maker

    return register


def validated(folder):
    """Return a function that returns the findings of `fullscale validate FOLDER`."""

    def look():
        report = validate(folder)
        return [*report.findings, *(finding for row in report.rows for finding in row.findings)]

    return look


def ingested(source, data, **options):
    def look():
        report = ingest(source, data, **options)
        return [*report.refused, *report.warnings]

    return look


def cohort_of(data):
    def look():
        read_cohort(data)
        return []

    return look


def sliced(data, root, recipe):
    def look():
        for case in read_cohort(data).cases:
            write_case(root, case, ("liver", "spleen"), recipe)
        return []

    return look


def look_for(code, look):
    """Return the findings of one check, also if it raises."""
    try:
        found = look()
    except ScanError as error:
        found = [Finding.from_error("", error)]
    return [finding for finding in found if finding.code == code]


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
@pytest.mark.parametrize("code", CHECKS)
def test_check_is_caused_by_its_input_and_cured_by_its_cure(code, tmp_path):
    maker, named = MAKERS[code]
    folder = tmp_path / "in"
    folder.mkdir()
    steps = maker(folder)
    look = next(steps) or validated(folder)
    found = look_for(code, look)
    assert found
    assert named in "; ".join(finding.found for finding in found)
    check = CHECKS[code]
    assert {(f.severity, f.wanted) for f in found} == {(check.severity, check.wanted)}
    assert all(finding.cure.startswith(check.cure) for finding in found)
    if check.severity == "note" or code in NO_CURE_HERE:
        assert next(steps, None) is None
        assert code in NO_CURE_HERE or check.cure.startswith("nothing to do")
    else:
        assert not look_for(code, next(steps, None) or look)


def test_each_check_has_a_maker():
    assert set(MAKERS) == set(CHECKS)


def pair(folder):
    """Write one case of nnU-Net; return the paths of image and label."""
    write_nnunet(folder, 1)
    return folder / "imagesTr/case_00_0000.nii.gz", folder / "labelsTr/case_00.nii.gz"


def rewrite(path, change=None, affine=None, dtype=None):
    """Write a NIfTI file again with other voxels, in Z, Y, X, or another affine."""
    image = nib.load(path)
    values = np.asarray(image.dataobj)
    if change is not None:
        values = np.ascontiguousarray(np.asarray(change(values.T)).T)
    if dtype is not None:
        values = values.astype(dtype)
    nib.save(nib.Nifti1Image(values, image.affine if affine is None else affine), path)


def changes_image(code, found, change, **kwargs):
    """Register a maker: the voxels of the image are changed, and the cure is to export it again."""

    @makes(code, found)
    def _(folder):
        path, _ = pair(folder)
        kept = path.read_bytes()
        rewrite(path, change, **kwargs)
        yield
        path.write_bytes(kept)


def changes_label(code, found, change, **kwargs):
    """Register a maker: the voxels of the label are changed, and the cure is to export it again."""

    @makes(code, found)
    def _(folder):
        _, path = pair(folder)
        kept = path.read_bytes()
        rewrite(path, change, **kwargs)
        yield
        path.write_bytes(kept)


def changes_series(code, found, change):
    """Register a maker: the slices of a series are changed, and the cure is to export it again."""

    @makes(code, found)
    def _(folder):
        write_chaos(folder, 1)
        series = folder / "CT/1/DICOM_anon"
        shutil.copytree(series, folder.with_name("kept"))
        for k, path in enumerate(sorted(series.iterdir(), reverse=True)):
            ds = pydicom.dcmread(path)
            change(ds, k)
            ds.save_as(path)
        yield
        shutil.rmtree(series)
        shutil.copytree(folder.with_name("kept"), series)


def moved(ds, k, mm):
    ds.ImagePositionPatient = [*ds.ImagePositionPatient[:2], 30 + 8 * k + mm]


def compress_badly(ds, k):
    if k == 3:
        ds.file_meta.TransferSyntaxUID = pydicom.uid.JPEGExtended12Bit
        ds.PixelData = pydicom.encaps.encapsulate([b"\0" * 64])
        ds["PixelData"].is_undefined_length = True


def halve(ds, k):
    if k % 2:
        ds.Rows, ds.Columns = ds.Rows // 2, ds.Columns // 2
        ds.PixelData = ds.PixelData[: len(ds.PixelData) // 4]


def tilt(ds, k):
    x, y, z = ds.ImagePositionPatient
    ds.ImagePositionPatient = [x, float(y) + 3 * k, z]


changes_series("compressed", "JPEG Extended", compress_badly)
changes_series("slices_twice", "38", lambda ds, k: moved(ds, k, -8 if k == 2 else 0))
changes_series(
    "slices_mixed",
    "2 values of AcquisitionNumber",
    lambda ds, k: setattr(ds, "AcquisitionNumber", str(k % 2)),
)
changes_series("slices_missing", "2 slices missing", lambda ds, k: moved(ds, k, 16 * (k > 4)))
changes_series("slices_uneven", "steps of 8 mm", lambda ds, k: moved(ds, k, 3 * (k > 4)))
changes_series("slices_differ", "chaos_1", halve)
changes_series("gantry_tilt", "tilt of 20.6 degrees", tilt)

changes_image("not_hu", "values from 0 to", lambda hu: hu + 1024)
changes_image("slices_repeated", "", lambda hu: np.repeat(hu[::2], 2, axis=0))
changes_image("not_finite", "NaN", lambda hu: np.where(hu > 400, np.nan, hu), dtype=np.float32)
changes_image("voxel_type", "complex", None, dtype=np.complex64)
changes_image("not_3d", "(48, 40, 16, 2)", lambda hu: np.stack([hu, hu]))

changes_label("shape_differs", "(48, 40, 15)", lambda ids: ids[:15])
changes_label("label_not_integer", "not whole", lambda ids: ids * 0.5, dtype=np.float32)
changes_label("label_range", "0 to 300", lambda ids: ids.astype(int) * 150, dtype=np.int16)
changes_label("label_unknown", "[7]", lambda ids: np.where(ids == 2, 7, ids), dtype=np.uint8)
changes_label("label_full", "100%", lambda ids: np.ones_like(ids))
changes_label("label_empty", "no voxel of liver, spleen", lambda ids: ids * 0)

TURNED = lps_affine((16, 40, 48), SPACING_MM)
changes_label("spacing_differs", "off by", None, affine=TURNED * np.diag([1, 1, 1.2, 1]))
changes_label("direction_differs", "LPI", None, affine=TURNED @ np.diag([1, 1, -1, 1]))
changes_label("origin_differs", "off by 1.00 mm", None, affine=TURNED + np.eye(4)[:, [3, 3, 3, 0]])


@makes("data_missing", "no folder")
def _(folder):
    yield cohort_of(folder / "data")
    ingest(write_nnunet(folder / "source", 1), folder / "data")


@makes("not_a_cohort", "without cases.csv")
def _(folder):
    (folder / "data").mkdir()
    write_dataset_json(folder / "data")
    yield cohort_of(folder / "data")
    ingest(write_nnunet(folder / "source", 1), folder / "data")


@makes("cohort_incomplete", "2 cases, 1 outcomes")
def _(folder):
    write_nnunet(folder / "source", 2)
    lose_one = ingested(
        folder / "source", folder / "data", progress=lambda items, *_: list(items)[:1]
    )
    yield lose_one
    yield ingested(folder / "source", folder / "data")


@makes("source_missing", "no folder")
def _(folder):
    yield validated(folder / "sorce")
    write_nnunet(folder / "source", 1)
    yield validated(folder / "source")


@makes("layout_unknown", "files *.nii.gz")
def _(folder):
    image, _ = pair(folder / "made")
    image.rename(folder / "scan.nii.gz")
    shutil.rmtree(folder / "made")
    yield
    write_nnunet(folder, 1)


@makes("dataset_json_missing", "imagesTr")
def _(folder):
    pair(folder)
    (folder / "dataset.json").unlink()
    yield
    write_dataset_json(folder)


@makes("folder_above", "layout nnunet")
def _(folder):
    pair(folder / "one/source")
    yield
    yield validated(folder / "one/source")


@makes("folder_below", "layout nnunet")
def _(folder):
    pair(folder)
    yield validated(folder / "imagesTr")
    yield validated(folder)


@makes("still_packed", "3Dircadb1.1/MASKS_DICOM.zip, 3Dircadb1.1/PATIENT_DICOM.zip")
def _(folder):
    write_ircadb(folder, 1)
    for path in list((folder / "3Dircadb1.1").iterdir()):
        shutil.make_archive(str(path), "zip", path.parent, path.name)
        shutil.rmtree(path)
    yield
    for path in list((folder / "3Dircadb1.1").iterdir()):
        shutil.unpack_archive(path, path.parent)
        path.unlink()


@makes("dataset_json", "'liver': 'one'")
def _(folder):
    pair(folder)
    write_dataset_json(folder, labels={**LABELS, "liver": "one"})
    yield
    write_dataset_json(folder)


@makes("cases_csv", "without columns case")
def _(folder):
    pair(folder)
    table = "case;patient;annotated\ncase_00;p1;liver\n"
    (folder / "cases.csv").write_text(table)
    yield
    (folder / "cases.csv").write_text(table.replace(";", ","))


@makes("label_regions", "'whole': [1, 2]")
def _(folder):
    pair(folder)
    regions = {"background": 0, "whole": [1, 2], "spleen": 2}
    write_dataset_json(folder, labels=regions)
    yield
    write_dataset_json(folder, labels=regions, regions_class_order=[1, 2])


@makes("labels_too_many", "255 labels")
def _(folder):
    pair(folder / "source")
    many = {f"organ {k}": k for k in range(3, 256)}
    write_dataset_json(folder / "source", labels=LABELS | many)
    yield ingested(folder / "source", folder / "data")
    del many["organ 255"]
    write_dataset_json(folder / "source", labels=LABELS | many)


@makes("modality", "'T1'")
def _(folder):
    pair(folder)
    write_dataset_json(folder, channel_names={"0": "T1"})
    yield
    write_dataset_json(folder, channel_names={"0": "CT"})


@makes("file_missing", "case_00.nii.gz")
def _(folder):
    _, label = pair(folder)
    label.rename(folder.with_name("moved"))
    yield
    folder.with_name("moved").rename(label)


@makes("path_outside", "'../out.nii.gz'")
def _(folder):
    write_msd(folder, 1)
    table = folder / "dataset.json"
    content = json.loads(table.read_text())
    image = content["training"][0]["image"]
    content["training"][0]["image"] = "../out.nii.gz"
    shutil.copy(folder / image, folder.parent / "out.nii.gz")
    table.write_text(json.dumps(content))
    yield
    content["training"][0]["image"] = image
    table.write_text(json.dumps(content))


@makes("file_twice", "case_00_0000.NII.GZ")
def _(folder):
    image, _ = pair(folder)
    other = image.with_name("case_00_0000.NII.GZ")
    shutil.copy(image, other)
    rewrite(image, lambda hu: hu + 1)
    yield
    other.unlink()


@makes("unreadable", "case_00_0000.nii.gz")
def _(folder):
    image, _ = pair(folder)
    whole = image.read_bytes()
    image.write_bytes(whole[:-100])
    yield
    image.write_bytes(whole)


@makes("affine", "from orthogonal")
def _(folder):
    image, label = pair(folder)
    sheared = TURNED.copy()
    sheared[0, 1] = 3
    for path in (image, label):
        rewrite(path, affine=sheared)
    yield
    for path in (image, label):
        rewrite(path, affine=TURNED)


@makes("spacing", "7, 7, 80 mm")
def _(folder):
    image, label = pair(folder)
    for path in (image, label):
        rewrite(path, affine=TURNED @ np.diag([1, 1, 10, 1]))
    yield
    for path in (image, label):
        rewrite(path, affine=TURNED)


@makes("segment_unnamed", "segment 1")
def _(folder):
    hu, labels = make_body()
    write_series(folder / "s/ct", hu)
    write_seg(folder / "s/seg.dcm", folder / "s/ct", (labels == 1).astype(np.uint8), ["Segment_1"])
    yield
    write_seg(folder / "s/seg.dcm", folder / "s/ct", (labels == 1).astype(np.uint8), ["Liver"])


@makes("contour", "on every 2. slice only")
def _(folder):
    write_series(folder / "subject/ct", make_body()[0])
    drawn = structure_set(folder)
    region = drawn.ROIContourSequence[0]
    whole = list(region.ContourSequence)
    region.ContourSequence = whole[::2]
    save_structure_set(folder, drawn)
    yield
    region.ContourSequence = whole
    save_structure_set(folder, drawn)


@makes("label_interpolated", "id 1 as a seam")
def _(folder):
    image, label = pair(folder)
    steps, finer = (1, 1.5, 1.5), TURNED @ np.diag([1 / 1.5, 1 / 1.5, 1, 1])
    rewrite(image, lambda hu: zoom(hu.astype(np.float32), steps, order=1), finer, np.int16)
    spleen = np.where(make_body()[1] == 2, 2.0, 0)
    rewrite(label, lambda _: np.rint(zoom(spleen, steps, order=1)), finer, np.uint8)
    yield
    rewrite(label, lambda _: zoom(spleen, steps, order=0), finer, np.uint8)


@makes("mask_values", "5, 9")
def _(folder):
    write_totalsegmentator(folder, 1)
    _, labels = make_body(seed=300)
    mask = folder / "s0000/segmentations/liver.nii.gz"
    save_nifti(mask, np.choose(labels, [0, 5, 9]).astype(np.uint8), SPACING_MM)
    yield
    save_nifti(mask, (labels == 1).astype(np.uint8), SPACING_MM)


@makes("label_twice", "liver in subject-1/second.dcm, subject-1/seg.dcm")
def _(folder):
    write_dicom_seg(folder, 1)
    second = folder / "subject-1/second.dcm"
    liver = np.roll(make_body(seed=600)[1] == 1, 1, axis=1)
    write_seg(second, folder / "subject-1/ct", liver.astype(np.uint8), ["Liver"])
    yield
    second.rename(folder.with_name("second.dcm"))


@makes("label_joined", "lesion in 2 segments")
def _(folder):
    hu, labels = make_body()
    write_series(folder / "s/ct", hu)
    both = np.stack([labels == 1, labels == 2], axis=-1).astype(np.uint8)
    write_seg(folder / "s/seg.dcm", folder / "s/ct", both, ["Lesion", "lesion "])
    yield
    write_seg(folder / "s/seg.dcm", folder / "s/ct", both, ["Lesion", "other lesion"])


@makes("label_region", "whole: [whole, spleen]")
def _(folder):
    pair(folder)
    regions = {"background": 0, "whole": [1, 2], "spleen": 2}
    write_dataset_json(folder, labels=regions, regions_class_order=[1, 2])
    yield
    labels = validate(folder).labels

    def used():
        """The finding stays, and the organ has the voxels of its region."""
        assert resolve_organs({"whole": ["whole", "spleen"]}, labels) == {"whole": (1, 2)}
        return []

    yield used


@makes("label_overlap", "voxels went to spleen")
def _(folder):
    write_totalsegmentator(folder, 1)
    _, labels = make_body(seed=300)
    liver = (labels > 0).astype(np.uint8)
    save_nifti(folder / "s0000/segmentations/liver.nii.gz", liver, SPACING_MM)
    yield


@makes("region_empty", "heart of plan.dcm")
def _(folder):
    write_series(folder / "subject/ct", make_body()[0])
    save_structure_set(folder, structure_set(folder, ("liver", "spleen", "heart")))
    yield


@makes("label_spelling", "'Liver', which is 'liver' here")
def _(folder):
    ingest(write_nnunet(folder / "first", 1), folder / "data")
    other = write_nnunet(folder / "second", 1, prefix="other", seed=5)
    write_dataset_json(other, labels={"background": 0, "Liver": 1, "spleen": 2})
    yield ingested(other, folder / "data")


@makes("label_ignored", "25.0% of the voxels with the id 3")
def _(folder):
    _, label = pair(folder)
    leave_unjudged(label, 3)
    write_dataset_json(folder, labels={**LABELS, "ignore": 3})
    yield


def cuts_both(code, found, box):
    """Register a maker: image and label are cut, and the cure is to export the whole scan."""

    @makes(code, found)
    def _(folder):
        kept = {path: path.read_bytes() for path in pair(folder)}
        for path in kept:
            rewrite(path, lambda values: values[box])
        yield
        for path, content in kept.items():
            path.write_bytes(content)


cuts_both("few_slices", "7 axial slices", np.s_[4:11])
cuts_both("no_air", "values from -1", np.s_[:, 6:33, 22:26])


@makes("orientation_missing", "sform_code 0 and qform_code 0")
def _(folder):
    for path in pair(folder):
        volume = nib.load(path)
        volume.set_sform(TURNED, 0)
        volume.set_qform(TURNED, 0)
        nib.save(volume, path)
    yield
    pair(folder)


@makes("forms_differ", "in its qform")
def _(folder):
    image, _ = pair(folder)
    scan = nib.load(image)
    right = scan.affine
    scan.set_qform(right @ np.diag([-1, 1, 1, 1]), 1)
    nib.save(scan, image)
    yield
    scan.set_qform(right, 1)
    nib.save(scan, image)


@makes("label_mirrored", "mirrored from left to right")
def _(folder):
    image, label = pair(folder)
    mask = np.zeros((16, 40, 48), dtype=bool)
    mask[10:15, 22:34, 8:18] = True
    hu = np.where(mask, 110, make_body()[0])
    hu[~mask & (hu > 0)] = -80
    rewrite(image, lambda _: hu, dtype=np.int16)
    rewrite(label, lambda _: mask[..., ::-1], dtype=np.uint8)
    yield
    rewrite(label, lambda ids: ids[..., ::-1])


@makes("content_twice", "case_00")
def _(folder):
    pair(folder)
    for part, end in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        shutil.copy(folder / part / f"case_00{end}", folder / part / f"again{end}")
    yield
    for path in folder.glob("*/again*"):
        path.unlink()


@makes("content_alike", "with slices of")
def _(folder):
    pair(folder)
    for part, end in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        shutil.copy(folder / part / f"case_00{end}", folder / part / f"cut{end}")
        rewrite(folder / part / f"cut{end}", lambda values: values[2:])
    yield
    for path in folder.glob("*/cut*"):
        path.unlink()


@makes("series_split", "chaos_1, chaos_2")
def _(folder):
    write_chaos(folder, 1)
    first, second = folder / "CT/1", folder / "CT/2"
    for part in ("DICOM_anon", "Ground"):
        (second / part).mkdir(parents=True)
        for path in sorted((first / part).iterdir())[8:]:
            path.rename(second / part / path.name)
    yield
    for path in second.glob("*/*"):
        path.rename(first / path.relative_to(second))
    shutil.rmtree(second)


@makes("label_not_annotated", "spleen; annotated are ['liver']")
def _(folder):
    pair(folder)
    (folder / "cases.csv").write_text("case,patient,annotated\ncase_00,p,liver\n")
    yield
    (folder / "cases.csv").write_text("case,patient,annotated\ncase_00,p,liver;spleen\n")


def mirrored_trunk(folder, axis):
    hu, labels = make_trunk()
    for path, values in zip(pair(folder), (hu, labels), strict=True):
        save_nifti(path, np.flip(values, axis), TRUNK_MM)
    yield
    for path, values in zip(pair(folder), (hu, labels), strict=True):
        save_nifti(path, values, TRUNK_MM)


@makes("axis", "head and feet look swapped")
def _(folder):
    yield from mirrored_trunk(folder, 0)


@makes("liver_on_left", "left and right look swapped")
def _(folder):
    yield from mirrored_trunk(folder, 2)


@makes("patient_shared", "patient p with cases case_00, case_01")
def _(folder):
    write_nnunet(folder, 2, cases_csv="case_00,p,liver;spleen\ncase_01,p,liver;spleen\n")
    yield


@makes("private_text", "PatientName")
def _(folder):
    write_chaos(folder, 1)
    yield


@makes("case_name", "'../case'")
def _(folder):
    ingest(write_nnunet(folder / "source", 1), folder / "data")
    table = folder / "data/cases.csv"
    kept = table.read_text()
    table.write_text(kept.replace("case_00", "../case", 1))
    yield cohort_of(folder / "data")
    table.write_text(kept)


@makes("file_unused", "more.nrrd")
def _(folder):
    pair(folder)
    more = folder / "imagesTr/more.nrrd"
    more.write_bytes(b"NRRD0004")
    yield
    more.rename(folder.with_name("more.nrrd"))


@makes("file_ignored", "README.txt")
def _(folder):
    pair(folder)
    (folder / "README.txt").write_text("About these scans.")
    yield


@makes("row_twice", "2 rows of case case_00 that differ")
def _(folder):
    write_nnunet(folder, 1, cases_csv="case_00,p,liver;spleen\ncase_00,q,liver;spleen\n")
    yield
    (folder / "cases.csv").write_text("case,patient,annotated\ncase_00,p,liver;spleen\n")


@makes("row_missing", "case case_01 without a row")
def _(folder):
    row = "case_00,p,liver;spleen\n"
    write_nnunet(folder, 2, cases_csv=row)
    yield
    more = "case_01,q,liver;spleen\n"
    (folder / "cases.csv").write_text(f"case,patient,annotated\n{row}{more}")


@makes("row_unused", "'case_0'")
def _(folder):
    rows = "case_00,p,liver;spleen\ncase_0,q,liver;spleen\n"
    write_nnunet(folder, 1, cases_csv=rows)
    yield
    (folder / "cases.csv").write_text("case,patient,annotated\ncase_00,p,liver;spleen\n")


@makes("name_twice", "'S0000' and 's0000'")
def _(folder):
    write_totalsegmentator(folder)
    (folder / "s0001").rename(folder / "S0000")
    yield
    (folder / "S0000").rename(folder / "s0001")


@makes("case_renamed", "'patient 1', here patient_1_")
def _(folder):
    write_nnunet(folder, 1, prefix="patient 1")
    for path in folder.glob("*Tr/*"):
        path.rename(path.with_name(path.name.replace("_00", "", 1)))
    yield


@makes("case_exists", "case_00")
def _(folder):
    ingest(write_nnunet(folder / "first", 1), folder / "data")
    other = write_nnunet(folder / "second", 1, seed=5)
    yield ingested(other, folder / "data")
    for path in other.glob("*Tr/*"):
        path.rename(path.with_name(path.name.replace("case", "other")))


@makes("annotated_unknown", "kidney")
def _(folder):
    write_nnunet(folder, 1, cases_csv="case_00,p,liver;kidney\n")
    yield
    (folder / "cases.csv").write_text("case,patient,annotated\ncase_00,p,liver;spleen\n")


@makes("no_body", "no part of the scan above 4000 HU")
def _(folder):
    ingest(write_nnunet(folder / "source", 1), folder / "data")
    high = SliceRecipe(RECIPE.organs, 40, 10.0, RECIPE.window_hu, 4000.0)
    yield sliced(folder / "data", folder / "slices", high)
    yield sliced(folder / "data", folder / "slices", RECIPE)


@makes("trunk_too_large", "slices of 160 mm")
def _(folder):
    ingest(write_nnunet(folder / "source", 1), folder / "data")
    small = SliceRecipe(RECIPE.organs, 16, 10.0, RECIPE.window_hu, -300.0)
    yield sliced(folder / "data", folder / "slices", small)
    yield sliced(folder / "data", folder / "slices", RECIPE)


@makes("checksum_differs", "case_00.nii.gz")
def _(folder):
    ingest(write_nnunet(folder / "source", 1), folder / "data")
    label = folder / "data/labelsTr/case_00.nii.gz"
    kept = label.read_bytes()
    rewrite(label, lambda ids: np.roll(ids, 1, axis=0))
    yield validated(folder / "data")
    label.write_bytes(kept)


@makes("case_unlisted", "files of other_00")
def _(folder):
    ingest(write_nnunet(folder / "source", 1), folder / "data")
    other = write_nnunet(folder / "other", 1, prefix="other", seed=5)
    for path in other.glob("*Tr/*"):
        shutil.copy(path, folder / "data" / path.relative_to(other))
    yield validated(folder / "data")
    ingest(other, folder / "data")


@makes("cluster", "no answer from a scheduler at tcp")
def _(folder):
    yield lambda: list(map_cases(str, [1, 2], Compute("dask", "tcp")))


@makes("store_missing", "store.json")
def _(folder):
    ingest(write_nnunet(folder / "source", 1), folder / "data")
    yield lambda: SliceStore(folder / "slices") and []
    sliced(folder / "data", folder / "slices", RECIPE)()
    write_tables(folder / "slices", ["case_00"], RECIPE)
