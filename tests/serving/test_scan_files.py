from __future__ import annotations

import shutil

import numpy as np
import pydicom
import pytest
import SimpleITK
from bodies import make_body, save_nifti
from cohorts import SPACING_MM, write_dicom_seg, write_series
from highdicom.legacy import LegacyConvertedEnhancedCTImage

from fullscale.runtime.errors import ScanError, StageError
from fullscale.serving.scan_files import find_scans, load_scan, strip_suffix


@pytest.fixture(scope="module")
def hu():
    return make_body()[0]


def save(path, hu):
    return save_nifti(path, hu, SPACING_MM)


def names(source):
    found, is_single = find_scans(source)
    return [scan.name for scan in found], is_single


@pytest.mark.parametrize(
    ("name", "stem"),
    [("a.nii", "a"), ("a.nii.gz", "a"), ("a.b.NII.GZ", "a.b"), ("a.gz", "a.gz"), ("a", "a")],
)
def test_suffix_is_stripped(name, stem):
    assert strip_suffix(name) == stem


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_file_is_a_single_scan(tmp_path, hu, suffix):
    source = save(tmp_path / f"scan{suffix}", hu)
    (found,), is_single = find_scans(source)
    assert (found.name, is_single, found.is_dicom) == ("scan", True, False)
    scan = load_scan(found)
    np.testing.assert_array_equal(scan.volume.values_ZYX, hu)
    assert scan.order is None


def test_folder_of_one_series_is_a_single_scan(tmp_path, hu):
    (found,), is_single = find_scans(write_series(tmp_path / "ct", hu))
    assert (found.name, is_single, found.is_dicom) == ("ct", True, True)
    scan = load_scan(found)
    np.testing.assert_array_equal(scan.volume.values_ZYX, hu)
    assert len(scan.order.files) == len(hu)


def test_folder_holds_scans_however_deep(tmp_path, hu):
    save(tmp_path / "b.nii.gz", hu)
    save(tmp_path / "x/c.nii", hu)
    write_series(tmp_path / "x/y/ct", hu)
    write_series(tmp_path / "a", hu)
    (tmp_path / "readme.txt").write_text("no scan")
    assert names(tmp_path) == (["a", "b", "x/c", "x/y/ct"], False)


def test_folder_with_one_nifti_file_is_a_folder(tmp_path, hu):
    save(tmp_path / "b.nii.gz", hu)
    assert names(tmp_path) == (["b"], False)


def test_hidden_files_and_folders_are_left_alone(tmp_path, hu):
    save(tmp_path / "b.nii", hu)
    save(tmp_path / ".cache/c.nii", hu)
    save(tmp_path / "._b.nii", hu)
    assert names(tmp_path)[0] == ["b"]


def test_two_series_in_one_folder_are_two_scans(tmp_path, hu):
    write_series(tmp_path / "ct", hu)
    write_series(tmp_path / "ct", hu[:8], name="second{:05d}.dcm")
    found, is_single = find_scans(tmp_path / "ct")
    assert not is_single
    assert [scan.name for scan in found] == ["ct_1", "ct_2"]
    assert [len(scan.files) for scan in found] == [16, 8]
    for scan in found:
        load_scan(scan)


def test_other_dicom_objects_are_no_scans(tmp_path):
    write_dicom_seg(tmp_path, 1)
    assert names(tmp_path)[0] == ["subject-1/ct"]


@pytest.mark.parametrize("num_bytes", [140, 300, 420, 600, 900])
def test_cut_off_slice_is_named_and_not_left_out(tmp_path, hu, num_bytes):
    write_series(tmp_path / "ct", hu)
    path = sorted((tmp_path / "ct").iterdir())[0]
    path.write_bytes(path.read_bytes()[:num_bytes])
    (found,), is_single = find_scans(tmp_path / "ct")
    assert is_single
    with pytest.raises(ScanError, match=path.name):
        load_scan(found)


def test_parsers_warn_of_nothing(tmp_path, hu, recwarn):
    write_series(tmp_path / "ct", hu, PatientBirthDate="Doe^Jane")
    recwarn.clear()
    (found,), _ = find_scans(tmp_path / "ct")
    load_scan(found)
    assert [str(each.message) for each in recwarn if "Doe" in str(each.message)] == []


def test_what_is_no_scan_is_refused(tmp_path, hu):
    with pytest.raises(StageError, match=r"there is no .*nowhere"):
        find_scans(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("no scan")
    with pytest.raises(StageError, match=r"wanted a file \.nii\.gz, \.nii, \.nrrd"):
        find_scans(tmp_path / "a.txt")
    with pytest.raises(StageError, match="holds no scan"):
        find_scans(tmp_path)


def test_scans_that_differ_in_their_endings_keep_them(tmp_path, hu):
    for name in ("a.nii", "a.nii.gz", "b.nii", "deep/c.nii"):
        save(tmp_path / name, hu)
    write_series(tmp_path / "deep/c", hu)
    found = ["a.nii", "a.nii.gz", "b", "deep/c", "deep/c.nii"]
    assert names(tmp_path) == (found, False)


def test_names_of_scans_are_never_equal(tmp_path, hu):
    save(tmp_path / "a.nii.gz", hu)
    save(tmp_path / "a.nii", hu)
    write_series(tmp_path / "folder", hu)
    (tmp_path / "a.nii").unlink()
    (tmp_path / "folder").rename(tmp_path / "a.nii")
    write_series(tmp_path / "a", hu)
    assert names(tmp_path) == (["a", "a.nii", "a.nii.gz"], False)
    save(tmp_path / "a.nii.nii", hu)
    save(tmp_path / "a.nii.NII", hu)
    found, _ = names(tmp_path)
    assert len(set(found)) == len(found)


def test_files_that_may_be_scans_and_are_not_read_are_named(tmp_path, hu, caplog):
    save_nifti(tmp_path / "a.nii.gz", hu, SPACING_MM)
    (tmp_path / "b.mgz").write_bytes(b"MGH")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/c.zip").write_bytes(b"PK")
    (tmp_path / "README.txt").write_text("nothing")
    scans, _ = find_scans(tmp_path)
    assert [scan.name for scan in scans] == ["a"]
    assert "2 files are no CT scans that can be read: b.mgz, deep/c.zip" in caplog.text
    assert "README" not in caplog.text


def test_half_of_a_series_in_another_folder_is_refused_and_a_copy_is_not(tmp_path, hu):
    write_series(tmp_path / "a", hu)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    scans, _ = find_scans(tmp_path)
    assert [load_scan(scan).volume.values_ZYX.shape for scan in scans] == [hu.shape] * 2
    shutil.rmtree(tmp_path / "copy")
    (tmp_path / "b").mkdir()
    for path in sorted((tmp_path / "a").iterdir())[8:]:
        path.rename(tmp_path / "b" / path.name)
    scans, _ = find_scans(tmp_path)
    assert [scan.name for scan in scans] == ["a", "b"]
    for scan in scans:
        with pytest.raises(ScanError, match="series_split"):
            load_scan(scan)


def test_series_without_preamble_is_read(tmp_path, hu):
    write_series(tmp_path, hu)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[132:])
    ((scan,), _) = find_scans(tmp_path)
    np.testing.assert_array_equal(load_scan(scan).volume.values_ZYX, hu)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>"])
@pytest.mark.parametrize("name", ["i{:05d}.dcm", "image_{}", "1.2.840.{}"])
def test_slice_that_is_no_dicom_refuses_the_series(tmp_path, hu, name, content):
    write_series(tmp_path, hu, name=name)
    sorted(tmp_path.iterdir())[0].write_bytes(content)
    ((scan,), _) = find_scans(tmp_path)
    with pytest.raises(ScanError, match="unreadable"):
        load_scan(scan)


@pytest.mark.parametrize(
    ("num_slices", "tags"),
    [(3, {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}), (1, {"ImageType": ["DERIVED"]})],
)
def test_scout_or_screen_save_beside_a_series_is_named_and_left_out(
    tmp_path, hu, num_slices, tags, caplog
):
    folder = write_series(tmp_path / "scan", hu)
    write_series(folder, hu[:num_slices], name="other{}.dcm", **tags)
    (scan,), is_single = find_scans(folder)
    assert is_single
    assert len(scan.files) == len(hu)
    assert "other0.dcm" in caplog.text


@pytest.mark.parametrize("ending", [".nrrd", ".mhd", ".img"])
def test_files_of_other_programs_are_scans(tmp_path, hu, ending):
    image = SimpleITK.GetImageFromArray(hu)
    SimpleITK.WriteImage(image, str(tmp_path / f"a{ending}"))
    (scan,), is_single = find_scans(tmp_path)
    assert (scan.name, is_single) == ("a", False)
    (scan,), is_single = find_scans(tmp_path / f"a{ending}")
    assert (scan.name, is_single) == ("a", True)
    assert load_scan(scan).volume.values_ZYX.shape == hu.shape


def test_slices_in_one_file_are_a_scan(tmp_path, hu):
    write_series(tmp_path / "many", hu)
    sources = [pydicom.dcmread(path) for path in (tmp_path / "many").iterdir()]
    whole = LegacyConvertedEnhancedCTImage(
        sources, pydicom.uid.generate_uid(), 7, pydicom.uid.generate_uid(), 1
    )
    (tmp_path / "one").mkdir()
    whole.save_as(tmp_path / "one/all.dcm")
    for source in (tmp_path / "one", tmp_path / "one/all.dcm"):
        (scan,), is_single = find_scans(source)
        assert is_single
        np.testing.assert_array_equal(load_scan(scan).volume.values_ZYX, hu)


def test_folder_of_zips_is_told_of(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(StageError, match=r"holds no scan but a\.zip; name a zip itself"):
        find_scans(tmp_path)


def test_linked_folders_are_read_once(tmp_path, hu):
    save_nifti(tmp_path / "store/a.nii", hu, SPACING_MM)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/one").symlink_to(tmp_path / "store")
    (tmp_path / "in/two").symlink_to(tmp_path / "store")
    (tmp_path / "store/back").symlink_to(tmp_path / "in")
    assert names(tmp_path / "in") == (["one/a"], False)
