from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from bodies import lps_affine, make_body, save_nifti, turn

from fullscale.runtime.errors import ScanError
from fullscale.scans.nifti_writer import write_on_grid
from fullscale.scans.volume import read_image

SPACING_MM = (2.5, 0.7, 0.9)
GEOMETRY_FIELDS = [
    *("dim", "xyzt_units", "qform_code", "sform_code", "srow_x", "srow_y", "srow_z"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
]


def save_scan(path, codes="LPS", kind=nib.Nifti1Image, units=("mm", "sec"), sform=1, qform=1):
    """Write a scan with nibabel alone; its affine is rounded to float32."""
    hu, _ = make_body((6, 9, 8), SPACING_MM)
    affine = lps_affine(hu.shape, SPACING_MM, (13.3, -7.7, 101.123456))
    values, affine = turn(hu, affine, codes)
    image = kind(np.ascontiguousarray(values), affine)
    image.set_sform(affine, code=sform)
    image.set_qform(affine, code=qform)
    image.header.set_xyzt_units(*units)
    image.header["descrip"] = b"Doe^Jane"
    nib.save(image, path)
    return path


def write_labels(path, scan_file):
    scan = read_image(scan_file)
    label_ZYX = np.arange(scan.values_ZYX.size).reshape(scan.values_ZYX.shape) % 251
    write_on_grid(path, label_ZYX.astype(np.uint8), scan.geometry, scan_file)
    return label_ZYX, nib.load(path)


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PSR", "SAL", "AIL"])
@pytest.mark.parametrize("codes_of_forms", [(1, 1), (2, 0), (0, 1), (4, 2)])
def test_header_says_the_same_of_the_grid(tmp_path, codes, codes_of_forms):
    sform, qform = codes_of_forms
    source = save_scan(tmp_path / "scan.nii", codes, sform=sform, qform=qform)
    _, written = write_labels(tmp_path / "label.nii.gz", source)
    wanted = nib.load(source)
    for name in GEOMETRY_FIELDS:
        np.testing.assert_array_equal(written.header[name], wanted.header[name], err_msg=name)
    np.testing.assert_array_equal(written.header["pixdim"], wanted.header["pixdim"])
    np.testing.assert_array_equal(written.affine, wanted.affine)
    assert written.get_data_dtype() == np.uint8


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PSR", "SAL"])
def test_label_lies_on_its_voxel(tmp_path, codes):
    source = save_scan(tmp_path / "scan.nii.gz", codes)
    label_ZYX, written = write_labels(tmp_path / "label.nii.gz", source)
    scan = read_image(source)
    for z, y, x in ((0, 0, 0), (5, 0, 7), (2, 8, 3)):
        world_mm = scan.affine @ [x, y, z, 1]
        own = np.rint(np.linalg.inv(written.affine) @ world_mm)[:3].astype(int)
        assert written.dataobj[tuple(own)] == label_ZYX[z, y, x]


def test_nifti_2_stays_nifti_2(tmp_path):
    source = save_scan(tmp_path / "scan.nii", kind=nib.Nifti2Image)
    _, written = write_labels(tmp_path / "label.nii", source)
    assert isinstance(written, nib.Nifti2Image)
    np.testing.assert_array_equal(written.affine, nib.load(source).affine)


def test_no_text_goes_along(tmp_path):
    source = save_scan(tmp_path / "scan.nii")
    write_labels(tmp_path / "label.nii", source)
    assert b"Doe" in source.read_bytes()
    assert b"Doe" not in (tmp_path / "label.nii").read_bytes()


def test_gzipped_scan_without_gz_in_its_name_is_read(tmp_path):
    source = save_scan(tmp_path / "scan.nii.gz").rename(tmp_path / "scan.nii")
    label_ZYX, written = write_labels(tmp_path / "label.nii.gz", source)
    assert sorted(np.ravel(written.dataobj)) == sorted(label_ZYX.ravel())


def test_half_precision_is_written_as_float32(tmp_path):
    source = save_scan(tmp_path / "scan.nii", "RAS")
    scan = read_image(source)
    value_ZYX = np.linspace(0, 1, scan.values_ZYX.size).reshape(scan.values_ZYX.shape)
    value_ZYX = value_ZYX.astype(np.float16)
    write_on_grid(tmp_path / "p.nii.gz", value_ZYX, scan.geometry, source)
    written = nib.load(tmp_path / "p.nii.gz")
    assert written.get_data_dtype() == np.float32
    np.testing.assert_array_equal(written.dataobj, scan.to_own_grid(value_ZYX))


def test_scan_without_a_file_gets_its_affine_in_both_forms(tmp_path):
    scan = read_image(save_nifti(tmp_path / "scan.nii", make_body()[0], (8.0, 7.0, 7.0), "PSR"))
    label_ZYX = (scan.values_ZYX > 0).astype(np.uint8)
    write_on_grid(tmp_path / "new/a.nii.gz", label_ZYX, scan.geometry)
    header = nib.load(tmp_path / "new/a.nii.gz").header
    assert header.get_xyzt_units()[0] == "mm"
    for affine, code in (header.get_sform(coded=True), header.get_qform(coded=True)):
        assert code == 1
        np.testing.assert_allclose(affine, scan.geometry.own_affine, atol=1e-4)


def test_same_labels_give_the_same_bytes(tmp_path):
    source = save_scan(tmp_path / "scan.nii.gz")
    for name in ("a.nii.gz", "b.nii.gz"):
        write_labels(tmp_path / name, source)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_scan_that_changed_meanwhile_is_refused(tmp_path):
    source = save_scan(tmp_path / "scan.nii")
    scan = read_image(source)
    save_scan(source, "RAS")
    with pytest.raises(ScanError, match=r"scan_changed: found .*another affine"):
        write_on_grid(
            tmp_path / "label.nii", scan.values_ZYX.astype(np.uint8), scan.geometry, source
        )
    assert not (tmp_path / "label.nii").exists()
