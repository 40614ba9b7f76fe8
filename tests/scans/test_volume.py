from __future__ import annotations

import gzip
import itertools
import struct

import nibabel as nib
import numpy as np
import pytest
from bodies import lps_affine, make_body, save_nifti, turn

from fullscale.runtime.errors import ScanError
from fullscale.scans.geometry import Geometry, check_aligned
from fullscale.scans.volume import read_image, read_labels, write_volume

ALL_CODES = [
    "".join(codes)
    for axes in itertools.permutations(("LR", "PA", "SI"))
    for codes in itertools.product(*axes)
]
SPACING_MM = (5.0, 0.8, 0.7)


def test_orientation_codes_are_all_48():
    assert len(set(ALL_CODES)) == 48


@pytest.mark.parametrize("codes", ALL_CODES)
def test_read_image_is_canonical_whatever_the_file_order(tmp_path, codes):
    hu, _ = make_body((9, 12, 15), SPACING_MM)
    path = save_nifti(tmp_path / "ct.nii.gz", hu, SPACING_MM, codes)
    scan = read_image(path)
    assert scan.geometry.orientation == codes
    np.testing.assert_array_equal(scan.values_ZYX, hu)
    np.testing.assert_allclose(scan.spacing_mm, SPACING_MM, rtol=1e-6)
    np.testing.assert_allclose(scan.affine, lps_affine(hu.shape, SPACING_MM), atol=1e-4)


@pytest.mark.parametrize("codes", ALL_CODES)
def test_to_own_grid_returns_the_files_voxels(tmp_path, codes):
    hu, _ = make_body((9, 12, 15), SPACING_MM)
    path = save_nifti(tmp_path / "ct.nii", hu, SPACING_MM, codes)
    scan = read_image(path)
    own = nib.load(path)
    np.testing.assert_array_equal(scan.to_own_grid(scan.values_ZYX), np.asanyarray(own.dataobj))
    np.testing.assert_array_equal(scan.geometry.own_affine, own.affine)


def test_to_own_grid_of_another_shape_is_refused():
    geometry = Geometry((4, 5, 6), np.eye(4))
    with pytest.raises(ValueError, match=r"shape \(4, 5, 6\); expected \(6, 5, 4\)"):
        geometry.to_own_grid(np.zeros((4, 5, 6)))


def test_read_image_of_an_oblique_scan_keeps_nearest_axes(tmp_path):
    angle = np.deg2rad(12)
    rotation = np.eye(4)
    rotation[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine = rotation @ lps_affine((9, 12, 15), SPACING_MM)
    hu, _ = make_body((9, 12, 15), SPACING_MM)
    nib.save(nib.Nifti1Image(hu.transpose(2, 1, 0), affine), tmp_path / "ct.nii.gz")
    scan = read_image(tmp_path / "ct.nii.gz")
    np.testing.assert_array_equal(scan.values_ZYX, hu)
    np.testing.assert_allclose(scan.spacing_mm, SPACING_MM, rtol=1e-6)


@pytest.mark.parametrize(
    ("stored", "slope", "intercept", "expected", "dtype"),
    [
        (np.uint16(1064), 1.0, -1024.0, 40, np.int16),
        (np.int16(20), 2.0, 0.0, 40, np.int16),
        (np.float32(40.0), 1.0, 0.0, 40, np.int16),
        (np.float64(-1024.0), 1.0, 0.0, -1024, np.int16),
        (np.float32(40.25), 1.0, 0.0, 40.25, np.float32),
        (np.int16(81), 0.5, 0.0, 40.5, np.float32),
        (np.int32(40000), 1.0, 0.0, 40000, np.float32),
        (np.uint8(7), 1.0, 0.0, 7, np.int16),
    ],
)
def test_read_image_scales_to_hu_in_the_narrowest_type(
    tmp_path, stored, slope, intercept, expected, dtype
):
    values = np.zeros((8, 8, 8), dtype=stored.dtype)
    values[1, 2, 3] = stored
    image = nib.Nifti1Image(values, np.eye(4))
    image.header.set_slope_inter(slope, intercept)
    (tmp_path / "ct.nii").write_bytes(_raw_bytes(image, values, slope, intercept))
    scan = read_image(tmp_path / "ct.nii")
    assert scan.values_ZYX.dtype == dtype
    own = scan.to_own_grid(scan.values_ZYX)
    assert own[1, 2, 3] == expected
    assert own[0, 0, 0] == intercept


def _raw_bytes(image, values, slope, intercept):
    header = image.header.copy()
    header["scl_slope"], header["scl_inter"], header["vox_offset"] = slope, intercept, 352
    header["magic"] = b"n+1"
    return header.binaryblock + b"\0\0\0\0" + values.tobytes(order="F")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_read_image_knows_both_byte_orders_and_both_niftis(tmp_path, order, kind):
    hu, _ = make_body((9, 12, 15), SPACING_MM)
    values = hu.transpose(2, 1, 0)
    image = kind(values, lps_affine(hu.shape, SPACING_MM))
    swapped = image.header.as_byteswapped(order)
    nib.save(kind(values, image.affine, swapped), tmp_path / "ct.nii.gz")
    scan = read_image(tmp_path / "ct.nii.gz")
    np.testing.assert_array_equal(scan.values_ZYX, hu)
    assert scan.values_ZYX.dtype.isnative


def test_read_image_drops_trailing_axes_of_one(tmp_path):
    hu, _ = make_body((9, 12, 15))
    nib.save(nib.Nifti1Image(hu.transpose(2, 1, 0)[..., None], np.eye(4)), tmp_path / "ct.nii")
    assert read_image(tmp_path / "ct.nii").geometry.own_shape == (15, 12, 9)


def _refused(path, read=read_image):
    with pytest.raises(ScanError) as caught:
        read(path)
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.cure in text
    return caught.value


def test_read_image_of_no_file_names_it(tmp_path):
    error = _refused(tmp_path / "absent.nii.gz")
    assert error.code == "file_missing"
    assert "absent.nii.gz" in error.found


@pytest.mark.parametrize("cut", [1, 9, 300, 5000])
def test_read_image_of_a_truncated_file_is_refused(tmp_path, cut):
    hu, _ = make_body()
    path = save_nifti(tmp_path / "ct.nii.gz", hu, SPACING_MM)
    path.write_bytes(path.read_bytes()[:-cut])
    assert _refused(path).code == "unreadable"


def test_read_image_with_a_wrong_checksum_is_refused(tmp_path):
    hu, _ = make_body()
    path = save_nifti(tmp_path / "ct.nii.gz", hu, SPACING_MM)
    content = bytearray(path.read_bytes())
    content[-6] ^= 0xFF
    path.write_bytes(content)
    assert _refused(path).code == "unreadable"


def test_read_image_of_a_truncated_plain_file_says_how_much_is_there(tmp_path):
    hu, _ = make_body()
    path = save_nifti(tmp_path / "ct.nii", hu, SPACING_MM)
    path.write_bytes(path.read_bytes()[:-100])
    error = _refused(path)
    assert error.code == "unreadable"
    assert f"{hu.nbytes - 100} of {hu.nbytes}" in error.found


def test_read_image_of_a_header_that_promises_too_much_takes_no_memory(tmp_path):
    image = nib.Nifti1Image(np.zeros((8, 8, 8), np.int16), np.eye(4))
    header = image.header.copy()
    header["dim"][1:4], header["vox_offset"], header["magic"] = 32000, 352, b"n+1"
    (tmp_path / "ct.nii.gz").write_bytes(gzip.compress(header.binaryblock + bytes(5000)))
    error = _refused(tmp_path / "ct.nii.gz")
    assert error.code == "unreadable"
    assert "cannot hold" in error.found


@pytest.mark.parametrize("content", [b"", b"x", b"\x1f\x8b", b"not a scan" * 100])
def test_read_image_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "ct.nii.gz").write_bytes(content)
    assert _refused(tmp_path / "ct.nii.gz").code == "unreadable"


def _saved(tmp_path, values, affine=None):
    nib.save(nib.Nifti1Image(values, np.eye(4) if affine is None else affine), tmp_path / "a.nii")
    return tmp_path / "a.nii"


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 8, 3), (8, 8, 1), (1, 8, 8)])
def test_read_image_that_is_no_volume_is_refused(tmp_path, shape):
    assert _refused(_saved(tmp_path, np.zeros(shape, np.int16))).code == "not_3d"


def test_read_image_of_colours_or_complex_numbers_is_refused(tmp_path):
    rgb = np.zeros((8, 8, 8), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert _refused(_saved(tmp_path, rgb)).code == "voxel_type"
    assert _refused(_saved(tmp_path, np.zeros((8, 8, 8), np.complex64))).code == "voxel_type"


def test_read_image_of_values_no_hu_can_have_is_refused(tmp_path):
    values = np.zeros((8, 8, 8))
    values[0, 0, 0] = 1e30
    assert _refused(_saved(tmp_path, values)).code == "voxel_type"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_read_image_that_is_not_finite_is_refused(tmp_path, bad):
    values = np.zeros((8, 8, 8), np.float32)
    values[3, 4, 5] = bad
    assert _refused(_saved(tmp_path, values)).code == "not_finite"


@pytest.mark.parametrize(
    ("affine", "code"),
    [
        (np.diag([0.1, 1, 1, 1]), "spacing"),
        (np.diag([1, 1, 11, 1]), "spacing"),
        (np.diag([1, 0, 1, 1]), "spacing"),
        (np.array([[1, 0.2, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "affine"),
        (np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "affine"),
        (np.array([[1, 0, 0, np.nan], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "affine"),
    ],
)
def test_read_image_with_an_unusable_affine_is_refused(tmp_path, affine, code):
    image = nib.Nifti1Image(np.zeros((8, 8, 8), np.int16), np.eye(4))
    image.header.set_sform(affine, code=1)
    header = image.header.copy()
    header["vox_offset"], header["magic"] = 352, b"n+1"
    (tmp_path / "a.nii").write_bytes(header.binaryblock + bytes(4 + 1024))
    assert _refused(tmp_path / "a.nii").code == code


@pytest.mark.parametrize(
    "spacing_mm", [(0, 1, 1), (1, -1, 1), (1, 1, np.nan), (1, 1, 11), (0.1, 1, 1)]
)
@pytest.mark.parametrize("sform_code", [0, 1])
def test_read_image_with_an_impossible_spacing_is_refused(tmp_path, spacing_mm, sform_code):
    image = nib.Nifti1Image(np.zeros((8, 8, 8), np.int16), np.eye(4))
    header = image.header.copy()
    header["vox_offset"], header["magic"], header["sform_code"] = 352, b"n+1", sform_code
    header["pixdim"][1:4] = spacing_mm
    (tmp_path / "a.nii").write_bytes(header.binaryblock + bytes(4 + 1024))
    assert _refused(tmp_path / "a.nii").code == "spacing"


def test_read_image_with_two_spacings_in_one_header_names_both(tmp_path):
    image = nib.Nifti1Image(np.zeros((8, 8, 8), np.int16), np.diag([2.0, 2, 5, 1]))
    header = image.header.copy()
    header["vox_offset"], header["magic"] = 352, b"n+1"
    header["pixdim"][1:4] = 2, 2, 2.5
    (tmp_path / "a.nii").write_bytes(header.binaryblock + bytes(4 + 1024))
    error = _refused(tmp_path / "a.nii")
    assert error.code == "spacing"
    assert "2, 2, 2.5 and 2, 2, 5 mm" in error.found


def test_read_image_prints_nothing_about_small_faults(tmp_path, capfd):
    hu, _ = make_body()
    path = save_nifti(tmp_path / "ct.nii", hu, SPACING_MM)
    content = bytearray(path.read_bytes())
    content[252:254] = (77).to_bytes(2, "little")
    path.write_bytes(content)
    np.testing.assert_array_equal(read_image(path).values_ZYX, hu)
    assert capfd.readouterr() == ("", "")


def test_read_labels_takes_whole_floats_and_refuses_fractions(tmp_path):
    values = np.zeros((8, 8, 8), np.float64)
    values[1, 2, 3] = 2
    labels = read_labels(_saved(tmp_path, values))
    assert labels.values_ZYX.dtype == np.uint8
    assert labels.to_own_grid(labels.values_ZYX)[1, 2, 3] == 2
    values[1, 2, 3] = 1.5
    assert _refused(_saved(tmp_path, values), read_labels).code == "label_not_integer"


@pytest.mark.parametrize(
    ("bad", "code"), [(-1.0, "label_range"), (256.0, "label_range"), (np.nan, "label_not_integer")]
)
def test_read_labels_out_of_range_is_refused(tmp_path, bad, code):
    values = np.zeros((8, 8, 8), np.float32)
    values[0, 0, 0] = bad
    assert _refused(_saved(tmp_path, values), read_labels).code == code


def _geometry(affine=None, shape=(30, 40, 50)):
    return Geometry(shape, np.diag([1.0, 1, 2, 1]) if affine is None else affine)


def test_check_aligned_accepts_what_rounding_does():
    moved = np.diag([1.0, 1, 2, 1])
    moved[:3, 3] = 0.4, 0, 0
    check_aligned(_geometry(), _geometry(moved), "case")


@pytest.mark.parametrize(
    ("change", "code", "found"),
    [
        (lambda a: a[:3, 3].__iadd__([0, 0, 0.6]), "origin_differs", "off by 0.60 mm"),
        (lambda a: a[:3, 2].__imul__(1.02), "spacing_differs", "2.04"),
        (lambda a: a[:3, 0].__imul__(-1), "direction_differs", "RAS.*LAS"),
    ],
)
def test_check_aligned_names_what_differs(change, code, found):
    affine = np.diag([1.0, 1, 2, 1])
    change(affine)
    with pytest.raises(ScanError, match=found) as caught:
        check_aligned(_geometry(), _geometry(affine), "case_7")
    assert caught.value.code == code
    assert "case_7" in caught.value.found


def test_check_aligned_names_both_shapes():
    with pytest.raises(ScanError, match=r"\(30, 40, 50\), label \(30, 40, 51\)"):
        check_aligned(_geometry(), _geometry(shape=(30, 40, 51)), "case")


def test_write_volume_gives_the_same_bytes_and_no_text(tmp_path):
    hu, _ = make_body((9, 12, 15), SPACING_MM)
    values, affine = turn(hu, lps_affine(hu.shape, SPACING_MM), "RAS")
    for name in ("first.nii.gz", "second.nii.gz"):
        write_volume(tmp_path / name, values, affine)
    first, second = (tmp_path / name for name in ("first.nii.gz", "second.nii.gz"))
    assert first.read_bytes() == second.read_bytes()
    written = nib.load(first)
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), values)
    np.testing.assert_allclose(written.affine, affine)
    np.testing.assert_allclose(written.get_qform(), affine, atol=1e-4)
    for key in ("descrip", "aux_file", "intent_name", "db_name"):
        assert bytes(written.header[key]).strip(b"\0") == b""
    assert not list(tmp_path.glob("*.part"))
    assert gzip.decompress(first.read_bytes())


def _save(path, hu, *, sform=1, qform=1, other=None):
    affine = np.diag([-2.0, -2.0, 3.0, 1.0])
    image = nib.Nifti1Image(hu, affine)
    image.set_sform(affine, sform)
    image.set_qform(affine if other is None else other, qform)
    nib.save(image, path)
    return path


def _hu():
    return np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)


def test_header_without_codes_is_a_doubt(tmp_path):
    scan = read_image(_save(tmp_path / "a.nii", _hu(), sform=0, qform=0))
    assert [code for code, _ in scan.doubts] == ["orientation_missing"]


@pytest.mark.parametrize("change", [[-1, 1, 1, 1], [1, -1, -1, 1]])
def test_sform_and_qform_that_differ_are_a_doubt(tmp_path, change):
    other = np.diag([-2.0, -2.0, 3.0, 1.0]) @ np.diag(change)
    ((code, found),) = read_image(_save(tmp_path / "a.nii", _hu(), other=other)).doubts
    assert code == "forms_differ"
    assert "in its sform, which is taken" in found


@pytest.mark.parametrize("codes", [(1, 1), (0, 1), (2, 0)])
def test_one_orientation_is_no_doubt(tmp_path, codes):
    scan = read_image(_save(tmp_path / "a.nii", _hu(), sform=codes[0], qform=codes[1]))
    assert scan.doubts == ()


def test_quaternion_that_rounding_made_longer_than_one_is_read(tmp_path):
    path = _save(tmp_path / "a.nii", _hu(), sform=0)
    content = bytearray(path.read_bytes())
    struct.pack_into("<3f", content, 256, 0.0, 1.0003, 0.0)
    path.write_bytes(content)
    np.testing.assert_allclose(read_image(path).affine[:3, :3], np.diag([-2, -2, 3]), atol=1e-6)


@pytest.mark.parametrize("factor", [0.9998, 1.0002])
def test_labels_that_lost_a_little_are_rounded(tmp_path, factor):
    ids = np.array([0, 1, 2, 117], dtype=np.float32).reshape(2, 2, 1).repeat(2, axis=2)
    nib.save(nib.Nifti1Image(ids * np.float32(factor), np.eye(4)), tmp_path / "a.nii")
    assert set(np.unique(read_labels(tmp_path / "a.nii").values_ZYX)) == {0, 1, 2, 117}


def test_labels_that_a_scale_factor_rounded_are_read(tmp_path):
    ids = np.array([0, 1, 7, 12], dtype=np.float64).reshape(2, 2, 1).repeat(2, axis=2)
    image = nib.Nifti1Image(ids, np.eye(4))
    image.set_data_dtype(np.uint8)
    nib.save(image, tmp_path / "a.nii")
    assert not np.array_equal(nib.load(tmp_path / "a.nii").get_fdata(), ids)
    assert set(np.unique(read_labels(tmp_path / "a.nii").values_ZYX)) == {0, 1, 7, 12}


@pytest.mark.parametrize("codes", ["RAS", "PSR", "SAL"])
def test_grids_with_axes_in_another_order_are_aligned(codes):
    values = np.zeros((4, 5, 6))
    affine = np.diag([-2.0, -2.0, 3.0, 1.0])
    turned, other = turn(values.transpose(2, 1, 0), affine, codes)
    check_aligned(Geometry((4, 5, 6), affine), Geometry(turned.shape, other), "case")
