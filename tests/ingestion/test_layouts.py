from __future__ import annotations

import gzip
import shutil

import nibabel as nib
import numpy as np
import pydicom
import pytest
from bodies import LABELS, make_body, save_nifti
from cohorts import (
    SPACING_MM,
    leave_unjudged,
    write_chaos,
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
from PIL import Image
from scipy.ndimage import gaussian_filter

from fullscale.ingestion.case_checks import inspect_case
from fullscale.ingestion.layouts import LAYOUTS, read_source
from fullscale.ingestion.names import safe_name
from fullscale.ingestion.source import paint_masks
from fullscale.runtime.errors import ScanError

WRITERS = {
    "msd": write_msd,
    "nnunet": write_nnunet,
    "lits": write_lits,
    "totalsegmentator": write_totalsegmentator,
    "ircadb": write_ircadb,
    "chaos": write_chaos,
    "dicom-seg": write_dicom_seg,
}


def load(source, name):
    case = next(case for case in source.cases if case.name == name)
    scan, labels = case.load()
    return case, scan.values_ZYX, labels.values_ZYX


def test_every_layout_is_tested():
    assert set(WRITERS) == set(LAYOUTS)


@pytest.mark.parametrize("layout", WRITERS)
def test_read_source_knows_its_own_layout(tmp_path, layout):
    WRITERS[layout](tmp_path)
    source = read_source(tmp_path)
    assert source.layout == layout
    assert len(source.cases) >= 2
    assert source.refused == ()
    assert read_source(tmp_path, layout).labels == source.labels


@pytest.mark.parametrize(
    ("layout", "name", "seed", "labels", "annotated"),
    [
        ("msd", "spleen_1", 101, {"spleen": 2}, ("spleen",)),
        ("nnunet", "case_02", 2, {"liver": 1, "spleen": 2}, ("liver", "spleen")),
        ("totalsegmentator", "s0000", 300, {"liver": 1, "spleen": 2}, ("liver", "spleen")),
        ("totalsegmentator", "s0001", 301, {"liver": 1}, ("liver",)),
        ("ircadb", "ircadb_02", 401, {"liver": 1}, ("liver",)),
        ("chaos", "chaos_2", 501, {"liver": 1}, ("liver",)),
        ("dicom-seg", "subject-2", 601, {"liver": 1, "spleen": 2}, ("liver", "spleen")),
    ],
)
def test_read_source_loads_scan_and_labels_voxel_by_voxel(
    tmp_path, layout, name, seed, labels, annotated
):
    source = read_source(WRITERS[layout](tmp_path))
    case, hu_ZYX, labels_ZYX = load(source, name)
    made_hu, made_labels = make_body(seed=seed)
    np.testing.assert_array_equal(hu_ZYX, made_hu)
    assert hu_ZYX.dtype == np.int16
    assert case.annotated == annotated
    for organ, made_id in labels.items():
        np.testing.assert_array_equal(labels_ZYX == source.labels[organ], made_labels == made_id)


def test_lits_has_liver_and_tumour(tmp_path):
    source = read_source(write_lits(tmp_path))
    case, _, labels_ZYX = load(source, "lits_027")
    assert source.labels == {"liver": 1, "tumour": 2}
    assert case.annotated == ("liver", "tumour")
    assert np.count_nonzero(labels_ZYX == 2) == 1


def test_lits_with_one_number_twice_refuses_that_case(tmp_path):
    write_lits(tmp_path, numbers=(3, 4))
    hu, _ = make_body()
    save_nifti(tmp_path / "batch 2/volume-3.nii", hu, SPACING_MM)
    source = read_source(tmp_path)
    assert [case.name for case in source.cases] == ["lits_004"]
    ((name, error),) = source.refused
    assert (name, error.code) == ("lits_003", "file_twice")
    assert "batch 1/volume-3.nii.gz and batch 2/volume-3.nii" in error.found


def test_ircadb_01_and_02_are_different_patients(tmp_path):
    write_ircadb(tmp_path, 1)
    (tmp_path / "3Dircadb1.1").rename(tmp_path / "3Dircadb2.1")
    write_ircadb(tmp_path, 1)
    first, second = [case.name for case in read_source(tmp_path).cases]
    assert first.startswith("ircadb_")
    assert second.startswith("ircadb_")
    assert "ircadb_01" in (first, second)
    assert first != second


def test_chaos_folders_of_one_number_are_different_cases(tmp_path):
    write_chaos(tmp_path, 1)
    (tmp_path / "CT").rename(tmp_path / "CT2")
    write_chaos(tmp_path, 1)
    names = [case.name for case in read_source(tmp_path).cases]
    assert len(set(names)) == 2
    assert "chaos_1" in names
    assert [case.name for case in read_source(tmp_path / "CT").cases] == ["chaos_1"]


def test_names_alike_but_for_letter_case_refuse_the_second(tmp_path):
    write_totalsegmentator(tmp_path)
    (tmp_path / "s0001").rename(tmp_path / "S0000")
    source = read_source(tmp_path)
    assert [case.name for case in source.cases] == ["S0000"]
    assert [(name, error.code) for name, error in source.refused] == [("s0000", "name_twice")]


def test_dicom_seg_series_of_one_folder_keep_their_names_when_one_is_added(tmp_path):
    write_dicom_seg(tmp_path, 2)
    (tmp_path / "subject-2").rename(tmp_path / "subject-1/second")
    before = [case.name for case in read_source(tmp_path).cases]
    assert len(set(before)) == 2
    assert "subject-1" in before
    write_series(tmp_path / "subject-1/aaa", make_body()[0])
    assert [case.name for case in read_source(tmp_path).cases] == before


def test_ircadb_joins_numbered_tumours_and_keeps_them_on_the_liver(tmp_path):
    source = read_source(write_ircadb(tmp_path))
    case, _, labels_ZYX = load(source, "ircadb_01")
    assert case.annotated == ("liver", "livertumor", "spleen")
    assert np.count_nonzero(labels_ZYX == source.labels["livertumor"]) == 9 + 6
    _, made = make_body(seed=400)
    whole = np.isin(labels_ZYX, [source.labels["liver"], source.labels["livertumor"]])
    np.testing.assert_array_equal(whole, made == 1)


def test_dicom_seg_groups_cases_of_one_patient_without_showing_the_id(tmp_path):
    source = read_source(write_dicom_seg(tmp_path))
    assert [case.patient for case in source.cases] == ["subject-1", "subject-1"]


def test_dicom_seg_without_its_series_is_refused_by_name(tmp_path):
    write_dicom_seg(tmp_path, 2)
    for path in (tmp_path / "subject-1/ct").iterdir():
        path.unlink()
    source = read_source(tmp_path)
    assert [case.name for case in source.cases] == ["subject-2"]
    ((name, error),) = source.refused
    assert name == "subject-1"
    assert error.code == "file_missing"


def test_dicom_seg_names_what_it_leaves_out(tmp_path):
    write_dicom_seg(tmp_path, 2)
    (tmp_path / "subject-2/seg.dcm").unlink()
    write_series(
        tmp_path / "subject-1/scout", make_body()[0][:1], ImageType=["A", "B", "LOCALIZER"]
    )
    kind = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.481.5", "Modality": "RTPLAN"}
    write_series(tmp_path / "subject-1/plan", make_body()[0][:1], **kind)
    source = read_source(tmp_path)
    assert [case.name for case in source.cases] == ["subject-1"]
    assert source.refused == ()
    told = {finding.case: finding.found for finding in source.findings}
    assert "16 files not read (a CT series without a segmentation)" in told["subject-2/ct"]
    assert "(a scout view)" in told["subject-1/scout"]
    assert "(modality RTPLAN)" in told["subject-1/plan"]


def test_dicom_seg_with_a_damaged_file_beside_the_slices_refuses_the_series(tmp_path):
    write_dicom_seg(tmp_path, 2)
    sorted((tmp_path / "subject-1/ct").iterdir())[0].write_bytes(b"")
    source = read_source(tmp_path)
    assert [case.name for case in source.cases] == ["subject-2"]
    assert {error.code for _, error in source.refused} == {"unreadable"}
    assert {name for name, _ in source.refused} == {"subject-1", "subject-1/ct/i00000.dcm"}


def test_dicom_seg_finds_series_without_preamble(tmp_path):
    write_dicom_seg(tmp_path, 1)
    whole, _ = read_source(tmp_path).cases[0].load()
    for path in [*(tmp_path / "subject-1/ct").iterdir(), tmp_path / "subject-1/seg.dcm"]:
        path.write_bytes(path.read_bytes()[132:])
    bare, labels = read_source(tmp_path).cases[0].load()
    np.testing.assert_array_equal(bare.values_ZYX, whole.values_ZYX)
    assert labels.values_ZYX.any()


def test_dicom_seg_drawn_on_slices_that_are_gone_is_refused(tmp_path):
    write_dicom_seg(tmp_path, 1)
    sorted((tmp_path / "subject-1/ct").iterdir())[0].unlink()
    with pytest.raises(ScanError, match=r"slices_missing: found .* drawn on 1 slices that are"):
        read_source(tmp_path).cases[0].load()


def test_ircadb_with_masks_of_a_slice_that_is_gone_is_refused(tmp_path):
    write_ircadb(tmp_path, 2)
    (tmp_path / "3Dircadb1.1/PATIENT_DICOM/image_0").unlink()
    with pytest.raises(ScanError, match="no slice for the masks image_0"):
        read_source(tmp_path).cases[0].load()


def test_nnunet_with_cases_csv_takes_patients_and_annotation(tmp_path):
    write_nnunet(tmp_path, 2, cases_csv="case_00,p1,liver\ncase_01,p1,\n")
    source = read_source(tmp_path)
    assert [case.patient for case in source.cases] == ["p1", "p1"]
    assert [case.annotated for case in source.cases] == [("liver",), ()]


def test_nnunet_with_an_unknown_organ_in_cases_csv_refuses_that_case(tmp_path):
    write_nnunet(tmp_path, 2, cases_csv="case_00,p1,liver\ncase_01,p2,kidney\n")
    source = read_source(tmp_path)
    assert [case.name for case in source.cases] == ["case_00"]
    assert [(name, error.code) for name, error in source.refused] == [
        ("case_01", "annotated_unknown")
    ]


@pytest.mark.parametrize("kept", ["imagesTr", "labelsTr"])
def test_nnunet_with_half_a_pair_still_lists_the_case(tmp_path, kept):
    write_nnunet(tmp_path, 2)
    other = "labelsTr" if kept == "imagesTr" else "imagesTr"
    next(iter((tmp_path / other).glob("case_01*"))).unlink()
    source = read_source(tmp_path)
    assert [case.name for case in source.cases] == ["case_00", "case_01"]
    with pytest.raises(ScanError, match="file_missing"):
        source.cases[1].load()


@pytest.mark.parametrize("write", [write_nnunet, write_totalsegmentator])
def test_hidden_twins_of_archives_are_not_cases(tmp_path, write):
    before = read_source(write(tmp_path))
    for path in list(tmp_path.rglob("*.nii.gz")):
        path.with_name("._" + path.name).write_bytes(b"not a scan")
    after = read_source(tmp_path)
    assert [case.name for case in after.cases] == [case.name for case in before.cases]
    assert after.labels == before.labels


def test_msd_with_a_path_that_escapes_refuses_that_case(tmp_path):
    folder = write_msd(tmp_path / "in")
    text = (folder / "dataset.json").read_text().replace("./imagesTr/spleen_0", "../../etc/x")
    (folder / "dataset.json").write_text(text)
    source = read_source(folder)
    assert [case.name for case in source.cases] == ["spleen_1"]
    assert source.refused[0][1].code == "path_outside"


def test_msd_of_old_nnunet_finds_images_with_a_channel(tmp_path):
    write_msd(tmp_path)
    for path in (tmp_path / "imagesTr").iterdir():
        path.rename(path.with_name(path.name.replace(".nii.gz", "_0000.nii.gz")))
    _, hu_ZYX, _ = load(read_source(tmp_path), "spleen_0")
    np.testing.assert_array_equal(hu_ZYX, make_body(seed=100)[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"channel_names": {"0": "T1"}},
        {"channel_names": {"0": "CT", "1": "PET"}},
        {"channel_names": {}, "modality": {"0": "CT"}},
    ],
)
def test_nnunet_of_another_modality_is_refused(tmp_path, changes):
    write_nnunet(tmp_path, 1)
    write_dataset_json(tmp_path, **changes)
    with pytest.raises(ScanError, match="modality"):
        read_source(tmp_path)


@pytest.mark.parametrize(
    "labels",
    [
        [1, 2],
        {"background": 0},
        {"background": 0, "liver": "one"},
        {"background": 0, "whole": [1, 2]},
        {"background": 0, "liver": 1, "spleen": 1},
        {"background": 0, "liver": -1},
        {"background": 0, "liver": 256},
        {"background": 0, "a;b": 1},
        {"background": 0, "liver": 1, "Liver": 2},
        {"background": 0, "liver": 1, "liver ": 2},
    ],
)
def test_nnunet_with_unusable_labels_is_refused(tmp_path, labels):
    write_nnunet(tmp_path, 1)
    write_dataset_json(tmp_path, labels=labels)
    with pytest.raises(ScanError, match=r"dataset_json|label_regions"):
        read_source(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "\xff"])
def test_nnunet_with_a_broken_dataset_json_is_refused(tmp_path, text):
    write_nnunet(tmp_path, 1)
    (tmp_path / "dataset.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ScanError, match="dataset_json"):
        read_source(tmp_path)


def test_read_source_of_an_unknown_folder_names_the_layouts(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(ScanError, match=r"none of msd, nnunet, lits.* and no scan"):
        read_source(tmp_path)
    with pytest.raises(ScanError, match="no folder"):
        read_source(tmp_path / "absent")
    with pytest.raises(ScanError, match="layout 'bids', not among"):
        read_source(tmp_path, "bids")


def test_paint_masks_puts_the_smaller_on_top():
    large, small = np.ones((2, 4, 5), bool), np.zeros((2, 4, 5), bool)
    small[1, 2, 3] = True
    painted = paint_masks({1: np.packbits(small), 2: np.packbits(large)}, (2, 4, 5))
    assert painted[1, 2, 3] == 1
    assert (painted == 2).sum() == 39


@pytest.mark.parametrize(
    ("text", "name"),
    [("3Dircadb1.1", "3Dircadb1_1"), ("../x", "x"), ("a b/c", "a_b_c"), ("é", ""), ("_x-", "x")],
)
def test_safe_name(text, name):
    assert safe_name(text) == name


def test_labels_of_bodies_are_what_the_tests_assume():
    assert LABELS == {"background": 0, "liver": 1, "spleen": 2}


def write_listed(folder, pairs):
    """Write a Decathlon folder whose files have the names in `pairs`."""
    for seed, (image, label) in enumerate(pairs, start=100):
        hu, labels = make_body(seed=seed)
        save_nifti(folder / image, hu, SPACING_MM)
        if not (folder / label).exists():
            save_nifti(folder / label, (labels == 2).astype(np.uint8), SPACING_MM)
    training = [{"image": f"./{image}", "label": f"./{label}"} for image, label in pairs]
    labels = {"0": "background", "1": "spleen"}
    write_dataset_json(folder, labels=labels, training=training)
    return folder


@pytest.mark.parametrize(
    ("pairs", "names"),
    [
        ([(f"{n}/ct.nii.gz", f"{n}/label.nii.gz") for n in "ab"], ["a_label", "b_label"]),
        ([(f"i/{n}.nii.gz", f"{n}/label.nii.gz") for n in "ab"], ["a", "b"]),
        ([("i/a_0000.nii.gz", "x/l.nii"), ("i/b_0000.nii.gz", "y/l.nii")], ["a", "b"]),
        ([("a.nii.gz", "l.nii.gz"), ("b.nii.gz", "l.nii.gz")], ["a", "b"]),
        ([("x/i.nii.gz", "l.nii.gz"), ("y/i.nii.gz", "l.nii.gz")], ["x_i", "y_i"]),
    ],
)
def test_msd_names_pairs_apart_whose_files_have_one_name(tmp_path, pairs, names):
    source = read_source(write_listed(tmp_path, pairs))
    assert source.refused == ()
    assert len(source.cases) == len(pairs)
    for name, case in zip(names, source.cases, strict=True):
        assert name in case.name
    assert {case.files[0] for case in source.cases} == {tmp_path / image for image, _ in pairs}


def test_msd_with_an_entry_twice_takes_it_once(tmp_path):
    pairs = [("a.nii.gz", "l/a.nii.gz"), ("b.nii.gz", "l/b.nii.gz"), ("a.nii.gz", "l/a.nii.gz")]
    source = read_source(write_listed(tmp_path, pairs))
    assert [case.name for case in source.cases] == ["a", "b"]
    assert source.refused == ()


def unused(source):
    return {
        f"{finding.case}/{finding.code}": finding.found
        for finding in source.findings
        if finding.code in ("file_unused", "file_ignored")
    }


@pytest.mark.parametrize("layout", WRITERS)
def test_layouts_name_nothing_unread_in_a_plain_source(tmp_path, layout):
    assert read_source(WRITERS[layout](tmp_path)).findings == ()


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("extra.nrrd", "file_unused"),
        ("more/scan.NII.GZ", "file_unused"),
        ("more.zip", "file_unused"),
        ("README.txt", "file_ignored"),
        (".DS_Store", "file_ignored"),
        ("__MACOSX/._x.nii", "file_ignored"),
    ],
)
def test_layouts_name_files_that_they_do_not_read(tmp_path, layout, name, code):
    WRITERS[layout](tmp_path)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"something")
    told = unused(read_source(tmp_path))
    place = str(path.parent.relative_to(tmp_path))
    assert path.name in told[f"{place}/{code}"]


@pytest.mark.parametrize("layout", [name for name in WRITERS if name != "msd"])
def test_layouts_read_files_whose_endings_are_in_upper_case(tmp_path, layout):
    before = read_source(WRITERS[layout](tmp_path))
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        stem, dot, ending = path.name.partition(".")
        if ending in ("nii", "nii.gz", "png", "dcm"):
            path.rename(path.with_name(stem + dot + ending.upper()))
    after = read_source(tmp_path)
    assert [case.name for case in after.cases] == [case.name for case in before.cases]
    assert after.labels == before.labels
    assert after.findings == ()
    after.cases[0].load()


def twin_of(path):
    return path.with_name(
        path.name.removesuffix(".gz") if path.suffix == ".gz" else f"{path.name}.gz"
    )


@pytest.mark.parametrize("layout", ["nnunet", "lits", "totalsegmentator"])
@pytest.mark.parametrize("part", [0, 1], ids=["image", "label"])
def test_a_file_and_its_decompressed_copy_are_taken_once(tmp_path, layout, part):
    before = read_source(WRITERS[layout](tmp_path))
    path = before.cases[0].files[part]
    packed = path.read_bytes()
    twin_of(path).write_bytes(
        gzip.decompress(packed) if path.suffix == ".gz" else gzip.compress(packed)
    )
    after = read_source(tmp_path)
    assert [case.name for case in after.cases] == [case.name for case in before.cases]
    assert after.refused == ()
    (told,) = unused(after).values()
    assert path.name in told or twin_of(path).name in told
    after.cases[0].load()


@pytest.mark.parametrize("layout", ["nnunet", "lits", "totalsegmentator"])
@pytest.mark.parametrize("part", [0, 1], ids=["image", "label"])
def test_a_second_file_of_one_part_is_refused_or_named(tmp_path, layout, part):
    path = read_source(WRITERS[layout](tmp_path)).cases[0].files[part]
    twin = twin_of(path)
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj) + 1, image.affine), twin)
    source = read_source(tmp_path)
    if layout == "nnunet":  # dataset.json tells which of the two
        assert source.refused == ()
        assert twin.name in "".join(unused(source).values())
    else:
        ((_, error),) = source.refused
        assert error.code == "file_twice"
        assert path.name in error.found
        assert twin.name in error.found
        assert source.findings == ()


def test_totalsegmentator_folder_without_a_scan_is_refused(tmp_path):
    write_totalsegmentator(tmp_path)
    (tmp_path / "s0001/ct.nii.gz").rename(tmp_path / "s0001/scan.nii.gz")
    source = read_source(tmp_path)
    assert [case.name for case in source.cases] == ["s0000"]
    assert [(name, error.code) for name, error in source.refused] == [("s0001", "file_missing")]


def test_chaos_with_hidden_twins_of_pictures_is_read(tmp_path):
    write_chaos(tmp_path, 1)
    for path in list(tmp_path.rglob("*.png")):
        path.with_name("._" + path.name).write_bytes(b"not a picture")
    source = read_source(tmp_path)
    assert source.cases[0].load()[1].values_ZYX.any()
    assert unused(source)["CT/1/Ground/file_ignored"].startswith("16 files not read")


@pytest.mark.parametrize("layout", ["ircadb", "chaos"])
def test_dicom_layouts_refuse_an_empty_slice(tmp_path, layout):
    WRITERS[layout](tmp_path)
    folder = next(
        path for path in tmp_path.rglob("*") if path.name in ("PATIENT_DICOM", "DICOM_anon")
    )
    sorted(folder.iterdir())[0].write_bytes(b"")
    source = read_source(tmp_path)
    case = next(case for case in source.cases if any(folder in path.parents for path in case.files))
    with pytest.raises(ScanError, match=r"unreadable: found .* an empty file"):
        case.load()


def test_link_to_a_folder_that_is_not_read_is_named(tmp_path):
    write_totalsegmentator(tmp_path / "in")
    write_nnunet(tmp_path / "other", 1)
    (tmp_path / "in/linked").symlink_to(tmp_path / "other")
    assert "linked" in unused(read_source(tmp_path / "in"))["./file_unused"]


@pytest.mark.parametrize(
    "name", ["case_00", " case_00 ", "case_00.nii.gz", "case_00_0000.NII", "CASE_00"]
)
@pytest.mark.parametrize("patient", ["p 1", "  p 1  ", "p   1"])
def test_row_is_found_whatever_blanks_and_endings_it_has(tmp_path, name, patient):
    write_nnunet(tmp_path, 1, cases_csv=f"{name},{patient}, liver ; spleen\n")
    source = read_source(tmp_path)
    (case,) = source.cases
    assert (case.patient, case.annotated, case.doubts) == ("p 1", ("liver", "spleen"), ())
    assert source.findings == ()


def test_cases_without_a_whole_row_and_rows_without_a_case_are_told_of(tmp_path):
    rows = "case_00,p1,liver\ncase_01,,liver\nother_07,p3,liver\n"
    write_nnunet(tmp_path, 3, cases_csv=rows)
    source = read_source(tmp_path)
    assert [case.patient for case in source.cases] == ["p1", "case_01", "case_02"]
    assert [case.doubts for case in source.cases] == [
        (),
        (("row_missing", "the row of case case_01 without a patient"),),
        (("row_missing", "case case_02 without a row"),),
    ]
    assert [(finding.case, finding.code) for finding in source.findings] == [
        ("other_07", "row_unused")
    ]


def test_case_with_rows_that_differ_is_refused_and_a_repeated_row_is_not(tmp_path):
    rows = "case_00,p1,liver\ncase_00,p9,liver\ncase_01,p1,liver\ncase_01 ,p1,liver\n"
    source = read_source(write_nnunet(tmp_path, 2, cases_csv=rows))
    assert [case.name for case in source.cases] == ["case_01"]
    assert [(name, error.code) for name, error in source.refused] == [("case_00", "row_twice")]
    assert source.findings == ()


def segmented(folder, masks, **kwargs):
    """Write one CT series, and a segmentation of it in a file of its own for each mask."""
    write_series(folder / "s/ct", make_body(seed=600)[0], SpecificCharacterSet="ISO_IR 192")
    for number, mask in enumerate(masks):
        write_seg(folder / f"s/seg{number}.dcm", folder / "s/ct", mask, **kwargs)
    return read_source(folder)


def test_fractional_segmentation_is_cut_at_one_half(tmp_path):
    _, made = make_body(seed=600)
    soft = gaussian_filter((made == 1).astype(float), 1.0)
    source = segmented(tmp_path, [soft[..., None]], names=["Liver"], kind="FRACTIONAL")
    labels = source.cases[0].load()[1].values_ZYX
    assert 0 < np.count_nonzero(labels) < np.count_nonzero(soft > 0.1)
    # The file holds whole numbers up to 255, so a value at 0.5 may fall on either side.
    sure = np.abs(soft - 0.5) > 1 / 255
    np.testing.assert_array_equal(labels[sure] == 1, soft[sure] >= 0.5)


def test_two_segmentations_of_one_organ_are_refused_and_a_copy_is_not(tmp_path):
    _, made = make_body(seed=600)
    first = (made == 1).astype(np.uint8)[..., None]
    second = (made == 2).astype(np.uint8)[..., None]
    source = segmented(tmp_path, [first, second], names=["Liver"])
    assert source.cases == ()
    ((_, error),) = source.refused
    assert error.code == "label_twice"
    assert "liver in s/seg0.dcm, s/seg1.dcm" in error.found
    shutil.copy(tmp_path / "s/seg0.dcm", tmp_path / "s/seg1.dcm")
    source = read_source(tmp_path)
    np.testing.assert_array_equal(source.cases[0].load()[1].values_ZYX == 1, made == 1)
    assert "a copy of seg0.dcm" in "".join(unused(source).values())


def test_segments_of_one_label_are_joined_with_a_warning(tmp_path):
    _, made = make_body(seed=600)
    both = np.stack([made == 1, made == 2], axis=-1).astype(np.uint8)
    source = segmented(tmp_path, [both], names=["Lesion", "lesion "])
    assert source.cases[0].doubts == (("label_joined", "lesion in 2 segments of seg0.dcm"),)


def test_segments_keep_names_of_any_script_apart(tmp_path):
    _, made = make_body(seed=600)
    both = np.stack([made == 1, made == 2], axis=-1).astype(np.uint8)
    assert set(segmented(tmp_path, [both], names=["肝臓1", "脾臓1"]).labels) == {"肝臓1", "脾臓1"}


def test_mask_with_two_ids_is_refused(tmp_path):
    source = write_totalsegmentator(tmp_path, 1)
    _, made = make_body(seed=300)
    ids = np.choose(made, [0, 5, 9]).astype(np.uint8)
    save_nifti(source / "s0000/segmentations/liver.nii.gz", ids, SPACING_MM)
    with pytest.raises(ScanError, match=r"mask_values: found s0000, liver.nii.gz: 5, 9"):
        read_source(source).cases[0].load()


def test_ircadb_mask_with_two_values_is_refused(tmp_path):
    write_ircadb(tmp_path, 1)
    path = tmp_path / "3Dircadb1.1/MASKS_DICOM/liver/image_8"
    ds = pydicom.dcmread(path)
    ds.PixelData = np.minimum(ds.pixel_array, 100).astype(np.uint16).tobytes()
    ds.save_as(path)
    with pytest.raises(ScanError, match=r"mask_values: found .*liver: 100, 255"):
        read_source(tmp_path).cases[0].load()


def test_chaos_picture_with_the_values_of_several_organs_is_refused(tmp_path):
    write_chaos(tmp_path, 1)
    path = tmp_path / "CT/1/Ground/liver_GT_008.png"
    pixels = np.asarray(Image.open(path)).copy()
    pixels[0, 0] = 126
    Image.fromarray(pixels).save(path)
    with pytest.raises(ScanError, match="mask_values: found pictures of chaos_1: 126, 255"):
        read_source(tmp_path).cases[0].load()


def test_annotated_organs_are_found_in_another_spelling(tmp_path):
    write_nnunet(tmp_path, 1, cases_csv="case_00,p1,Liver; SPLEEN\n")
    assert read_source(tmp_path).cases[0].annotated == ("liver", "spleen")


def test_totalsegmentator_masks_in_two_spellings_are_one_organ(tmp_path):
    write_totalsegmentator(tmp_path, 2)
    folder = tmp_path / "s0001/segmentations"
    (folder / "liver.nii.gz").rename(folder / "Liver.nii.gz")
    source = read_source(tmp_path)
    assert set(source.labels) == {"Liver", "spleen"}
    assert [case.annotated for case in source.cases] == [("Liver", "spleen"), ("Liver",)]


def remove_json_below(folder):
    write_nnunet(folder / "Dataset001", 1)
    (folder / "Dataset001/dataset.json").unlink()


def write_plan(folder):
    kind = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.481.5", "Modality": "RTPLAN"}
    write_series(folder, make_body()[0][:1], **kind)


@pytest.mark.parametrize(
    ("write", "code", "found", "cure"),
    [
        (remove_json_below, "dataset_json_missing", "Dataset001", "write dataset.json"),
        (
            lambda folder: write_chaos(folder / "A/B", 1),
            "folder_above",
            "chaos in .*A",
            "that fold",
        ),
        (write_plan, "layout_unknown", "modality RTPLAN", "DICOM SEG"),
        (
            lambda f: save_nifti(f / "Doe.Jane.nii", make_body()[0], SPACING_MM),
            "layout_unknown",
            r"files \*\.nii;",
            "as nnunet",
        ),
    ],
)
def test_messages_of_sources_tell_what_is_wrong_and_what_to_do(tmp_path, write, code, found, cure):
    write(tmp_path / "in")
    with pytest.raises(ScanError, match=f"^{code}: found .*{found}") as caught:
        read_source(tmp_path / "in")
    assert cure in caught.value.cure


@pytest.mark.parametrize(
    ("write", "parts"),
    [
        (write_ircadb, ("3Dircadb1.1/PATIENT_DICOM", "3Dircadb1.1/MASKS_DICOM")),
        (write_chaos, ("CT/1/DICOM_anon", "CT/1/Ground")),
    ],
)
def test_folders_that_were_unpacked_into_folders_of_their_names_are_read(tmp_path, write, parts):
    before = read_source(write(tmp_path, 1)).cases[0].load()
    for part in parts:
        place = tmp_path / part
        place.rename(place.with_name("moved"))
        place.mkdir()
        place.with_name("moved").rename(place / place.name)
    source = read_source(tmp_path)
    assert source.findings == ()
    for old, new in zip(before, source.cases[0].load(), strict=True):
        np.testing.assert_array_equal(old.values_ZYX, new.values_ZYX)


def test_dataset_json_with_a_byte_order_mark_is_read(tmp_path):
    path = write_nnunet(tmp_path, 1) / "dataset.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_source(tmp_path).cases) == 1


def test_cases_csv_with_semicolons_is_refused_with_its_cure(tmp_path):
    write_nnunet(tmp_path, 1)
    (tmp_path / "cases.csv").write_text("case;patient;annotated\ncase_00;p1;liver\n")
    with pytest.raises(ScanError, match=r"^cases_csv: .* without columns case") as caught:
        read_source(tmp_path)
    assert "commas" in caught.value.cure


def test_series_divided_between_two_cases_refuses_both(tmp_path):
    write_chaos(tmp_path, 2)
    first = tmp_path / "CT/1"
    second = tmp_path / "CT/1b"
    for folder in ("DICOM_anon", "Ground"):
        (second / folder).mkdir(parents=True)
        for path in sorted((first / folder).iterdir())[8:]:
            path.rename(second / folder / path.name)
    source = read_source(tmp_path)
    assert [case.name for case in source.cases] == ["chaos_2"]
    assert [error.code for _, error in source.refused] == ["series_split"] * 2
    assert source.findings == ()


def test_linked_case_is_read_and_what_is_unread_in_it_is_named(tmp_path):
    write_totalsegmentator(tmp_path / "store", 2)
    (tmp_path / "store/s0001/more.nrrd").write_bytes(b"NRRD0004")
    (tmp_path / "in").mkdir()
    for name in ("s0000", "s0001"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "store" / name)
    source = read_source(tmp_path / "in")
    assert [case.name for case in source.cases] == ["s0000", "s0001"]
    assert list(unused(source)) == ["s0001/file_unused"]


def _changed_seg(folder, change, kind="BINARY"):
    """Return the source of one series with a segmentation, after a change of its data set."""
    hu, labels = make_body(seed=77)
    write_series(folder / "s/ct", hu)
    masks = labels if kind == "LABELMAP" else np.stack([labels == 1, labels == 2], -1)
    write_seg(folder / "s/seg.dcm", folder / "s/ct", masks.astype(np.uint8), kind=kind)
    ds = pydicom.dcmread(folder / "s/seg.dcm")
    change(ds)
    ds.save_as(folder / "s/seg.dcm")
    return read_source(folder), labels


def _without_derivation(ds):
    for frame in ds.PerFrameFunctionalGroupsSequence:
        del frame.DerivationImageSequence


def _without_series(ds):
    del ds.ReferencedSeriesSequence


def _without_any_reference(ds):
    _without_derivation(ds)
    _without_series(ds)


@pytest.mark.parametrize(
    "change", [_without_derivation, _without_series, _without_any_reference, lambda ds: None]
)
@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_segmentation_is_placed_by_what_it_refers_to_or_by_position(tmp_path, change, kind):
    source, labels = _changed_seg(tmp_path, change, kind)
    assert source.refused == ()
    _, _, labels_ZYX = load(source, "s")
    np.testing.assert_array_equal(labels_ZYX, labels)


def test_empty_patient_id_is_no_patient(tmp_path):
    write_dicom_seg(tmp_path, 2)
    for path in tmp_path.rglob("*.dcm"):
        ds = pydicom.dcmread(path)
        ds.PatientID = None
        ds.save_as(path)
    assert len({case.patient for case in read_source(tmp_path).cases}) == 2


def test_regions_of_nnunet_are_labels_by_their_order(tmp_path):
    write_nnunet(tmp_path, 1)
    labels = {"background": 0, "whole": [1, 2], "spleen": 2}
    write_dataset_json(tmp_path, labels=labels, regions_class_order=[1, 2])
    source = read_source(tmp_path)
    assert source.labels == {"whole": 1, "spleen": 2}
    ((code, found),) = [(f.code, f.found) for f in source.findings]
    assert (code, found) == ("label_region", "whole: [whole, spleen]")


@pytest.mark.parametrize("order", [None, [2, 1], [1], [1, 1], [1, 3]])
def test_regions_without_a_fitting_order_are_refused(tmp_path, order):
    write_nnunet(tmp_path, 1)
    labels = {"background": 0, "whole": [1, 2], "spleen": 2}
    write_dataset_json(tmp_path, labels=labels, regions_class_order=order)
    with pytest.raises(ScanError, match="label_regions"):
        read_source(tmp_path)


@pytest.mark.parametrize(
    "labels",
    [
        {"background": 0, "liver": 1, "spleen": 2, "ignore": 3},
        {"0": "background", "1": "liver", "2": "spleen", "3": "ignore"},
    ],
    ids=["by name", "by id"],
)
def test_voxels_to_ignore_are_told_with_their_share(tmp_path, labels):
    write_nnunet(tmp_path, 2)
    write_dataset_json(tmp_path, labels=labels)
    leave_unjudged(tmp_path / "labelsTr/case_00.nii.gz", 3)
    source = read_source(tmp_path)
    assert source.labels == {"liver": 1, "spleen": 2}
    first, second = (inspect_case(case, source.labels) for case in source.cases)
    assert [(f.code, f.severity) for f in first.findings] == [("label_ignored", "note")]
    assert first.findings[0].found == "25.0% of the voxels with the id 3"
    assert not second.findings


@pytest.mark.parametrize("marked", [0, 2, 256, -1, [3], "x"])
def test_voxels_to_ignore_have_an_id_of_their_own(tmp_path, marked):
    write_nnunet(tmp_path, 1)
    write_dataset_json(tmp_path, labels={**LABELS, "ignore": marked})
    with pytest.raises(ScanError, match="dataset_json"):
        read_source(tmp_path)


def test_overlap_names_who_lost_voxels_to_whom(tmp_path):
    """As in 3D-IRCADb, where the mask of the liver holds its tumours."""
    write_ircadb(tmp_path, 1)
    hu, labels = make_body(seed=400)
    middle = len(hu) // 2
    drawn = labels == 1
    inside = np.zeros_like(drawn)
    inside[middle, 18:21, 14:17] = inside[middle, 23:25, 14:17] = True
    num_lost = int((drawn & inside).sum())
    assert num_lost
    (case,) = read_source(tmp_path).cases
    ((code, found),) = [each for each in case.load()[1].doubts if each[1].startswith("liver:")]
    assert code == "label_overlap"
    assert found == f"liver: {num_lost} of {int(drawn.sum())} voxels went to livertumor"


def test_msd_files_may_be_links_to_another_disk(tmp_path):
    write_msd(tmp_path / "in", 1)
    path = tmp_path / "in/imagesTr/spleen_0.nii.gz"
    path.rename(tmp_path / "elsewhere.nii.gz")
    path.symlink_to(tmp_path / "elsewhere.nii.gz")
    assert [case.name for case in read_source(tmp_path / "in").cases] == ["spleen_0"]
