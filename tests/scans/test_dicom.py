from __future__ import annotations

import numpy as np
import pydicom
import pytest
from bodies import make_body
from cohorts import SPACING_MM, write_series
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from pydicom.pixels import get_decoder
from pydicom.uid import (
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from fullscale.runtime.errors import ScanError
from fullscale.scans.dicom import dicom_files, order_series, read_series

NUM = 16


@pytest.fixture(scope="module")
def hu():
    return make_body()[0]


def read(folder):
    return read_series(order_series(dicom_files(folder), "case"), "case")


def refused(folder):
    with pytest.raises(ScanError) as caught:
        read(folder)
    assert "case" in caught.value.found or folder.name in caught.value.found
    return caught.value


@pytest.mark.parametrize(
    "order", [list(range(NUM)), list(reversed(range(NUM))), [*range(0, NUM, 2), *range(1, NUM, 2)]]
)
def test_series_is_sorted_by_position_whatever_the_file_names(tmp_path, hu, order):
    write_series(tmp_path, hu, order=order)
    scan = read(tmp_path)
    np.testing.assert_array_equal(scan.values_ZYX, hu)
    np.testing.assert_allclose(scan.spacing_mm, SPACING_MM)
    np.testing.assert_allclose(scan.affine[:3, 3], [100, 80, 30])


def test_series_head_first_or_feet_first_is_canonical(tmp_path, hu):
    turned = hu[:, ::-1, ::-1]
    write_series(tmp_path, turned, ImageOrientationPatient=[-1, 0, 0, 0, -1, 0])
    np.testing.assert_array_equal(read(tmp_path).values_ZYX, hu)


def test_series_in_sagittal_planes_is_canonical(tmp_path, hu):
    planes = np.ascontiguousarray(hu.transpose(2, 0, 1))[:, ::-1]
    folder = tmp_path
    write_series(folder, planes, ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    for path in folder.iterdir():
        ds = pydicom.dcmread(path)
        ds.ImagePositionPatient = [float(ds.ImagePositionPatient[2]), 0, 0]
        ds.save_as(path)
    np.testing.assert_array_equal(read(folder).values_ZYX, hu)


def test_series_applies_slope_and_intercept(tmp_path, hu):
    write_series(tmp_path, hu, RescaleSlope="2", RescaleIntercept="-2048")
    np.testing.assert_array_equal(read(tmp_path).values_ZYX, 2 * hu)


def test_series_with_fractional_slope_is_float(tmp_path, hu):
    write_series(tmp_path, hu, RescaleSlope="0.5", RescaleIntercept="-512")
    scan = read(tmp_path)
    assert scan.values_ZYX.dtype == np.float32
    np.testing.assert_array_equal(scan.values_ZYX, hu / 2)


def test_series_lists_text_that_may_name_the_patient(tmp_path, hu):
    write_series(tmp_path, hu)
    assert {"PatientName", "PatientID", "ReferringPhysicianName"} <= set(read(tmp_path).text_fields)
    assert "InstitutionName" not in read(tmp_path).text_fields


def test_series_leaves_scouts_and_other_files_out(tmp_path, hu):
    write_series(tmp_path, hu)
    write_series(tmp_path, hu[:1], name="scout{}.dcm", ImageType=["ORIGINAL", "LOCALIZER"])
    (tmp_path / "readme.txt").write_text("hello")
    np.testing.assert_array_equal(read(tmp_path).values_ZYX, hu)


def test_series_with_missing_slices_names_the_gap(tmp_path, hu):
    positions = [8.0 * k + (16.0 if k > 4 else 0.0) for k in range(NUM)]
    write_series(tmp_path, hu, positions_mm=positions)
    error = refused(tmp_path)
    assert error.code == "slices_missing"
    assert "2 slices missing between 62 and 86 mm" in error.found


def test_series_with_uneven_steps_names_the_place(tmp_path, hu):
    positions = [8.0 * k + (3.0 if k > 4 else 0.0) for k in range(NUM)]
    write_series(tmp_path, hu, positions_mm=positions)
    error = refused(tmp_path)
    assert error.code == "slices_uneven"
    assert "steps of 8 mm, but not between 62 and 73 mm" in error.found


def test_series_with_two_slices_at_one_place_names_it(tmp_path, hu):
    positions = [8.0 * k for k in range(NUM)]
    positions[6] = positions[5]
    write_series(tmp_path, hu, positions_mm=positions)
    error = refused(tmp_path)
    assert error.code == "slices_twice"
    assert "70 mm" in error.found


def test_series_of_a_tilted_gantry_is_read_upright_with_a_doubt(tmp_path, hu):
    drift_mm = SPACING_MM[1]  # a row a slice, so that nothing is interpolated
    sheared = np.stack([np.roll(plane, -k, axis=0) for k, plane in enumerate(hu)])
    write_series(tmp_path, sheared, tilt_mm=drift_mm)
    scan = read(tmp_path)
    ((code, found),) = scan.doubts
    assert code == "gantry_tilt"
    assert f"tilt of {np.degrees(np.arctan(drift_mm / SPACING_MM[0])):.1f} degrees" in found
    assert scan.values_ZYX.shape == (16, 40 + 15, 48)
    np.testing.assert_allclose(scan.spacing_mm, SPACING_MM)
    for k in range(len(hu)):
        np.testing.assert_array_equal(scan.values_ZYX[k, k:40], hu[k, k:])


def test_tilted_slices_off_their_line_are_refused(tmp_path, hu):
    write_series(tmp_path, hu, tilt_mm=3.0)
    path = sorted(tmp_path.iterdir())[5]
    ds = pydicom.dcmread(path)
    ds.ImagePositionPatient[0] += 4
    ds.save_as(path)
    error = refused(tmp_path)
    assert error.code == "slices_uneven"
    assert "off by 4.0 mm" in error.found


def test_series_of_two_reconstructions_is_refused(tmp_path, hu):
    write_series(tmp_path, hu)
    write_series(tmp_path, hu[:, ::2, ::2], name="second{}.dcm")
    assert refused(tmp_path).code == "slices_differ"


def test_series_of_another_modality_is_refused(tmp_path, hu):
    write_series(tmp_path, hu, SOPClassUID="1.2.840.10008.5.1.4.1.1.4", Modality="MR")
    error = refused(tmp_path)
    assert error.code == "modality"
    assert "MR" in error.found


@pytest.mark.parametrize("tag", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
def test_series_without_geometry_names_the_tag(tmp_path, hu, tag):
    write_series(tmp_path, hu, **{tag: None})
    error = refused(tmp_path)
    assert error.code == "unreadable"
    assert tag in error.found


def test_series_with_a_truncated_file_is_refused(tmp_path, hu):
    write_series(tmp_path, hu)
    path = sorted(tmp_path.iterdir())[3]
    path.write_bytes(path.read_bytes()[:-500])
    assert refused(tmp_path).code == "unreadable"


def test_series_in_a_compression_nobody_decodes_is_refused(tmp_path, hu):
    write_series(tmp_path, hu)
    path = sorted(tmp_path.iterdir())[0]
    ds = pydicom.dcmread(path)
    ds.file_meta.TransferSyntaxUID = pydicom.uid.JPEGExtended12Bit
    ds.PixelData = pydicom.encaps.encapsulate([b"\0" * 64])
    ds["PixelData"].is_undefined_length = True
    ds.save_as(path)
    error = refused(tmp_path)
    assert error.code == "compressed"
    assert "JPEG Extended" in error.found


def test_dicom_files_of_an_absent_folder_is_refused(tmp_path):
    with pytest.raises(ScanError, match="no folder"):
        dicom_files(tmp_path / "absent")


def test_order_series_of_nothing_is_refused():
    with pytest.raises(ScanError, match="few_slices: found case: 0 CT slices"):
        order_series([], "case")


@pytest.mark.parametrize("tag", [0x0008, 0x0020, 0x0028])
def test_series_with_an_element_of_a_wrong_kind_is_refused_by_file(tmp_path, hu, tag):
    write_series(tmp_path, hu)
    path = sorted(tmp_path.iterdir())[3]
    content = bytearray(path.read_bytes())
    place = content.index(tag.to_bytes(2, "little"), 400)
    content[place + 4 : place + 8] = b"FD\x03\x00"
    path.write_bytes(content)
    assert refused(tmp_path).code in ("unreadable", "modality")


def edit(folder, change):
    """Change the header of each slice; slices are numbered from the feet."""
    planes = [(pydicom.dcmread(path), path) for path in folder.iterdir()]
    planes.sort(key=lambda pair: pair[0].ImagePositionPatient[2])
    for k, (ds, path) in enumerate(planes):
        change(ds, k)
        ds.save_as(path)


@pytest.mark.parametrize("tag", ["AcquisitionNumber", "ConvolutionKernel", "SeriesInstanceUID"])
def test_acquisitions_that_alternate_are_refused(tmp_path, hu, tag):
    write_series(tmp_path, hu)
    edit(tmp_path, lambda ds, k: setattr(ds, tag, str(1 + k % 2)))
    error = refused(tmp_path)
    assert error.code == "slices_mixed"
    assert f"2 values of {tag}" in error.found


def test_acquisitions_one_after_the_other_are_one_volume(tmp_path, hu):
    write_series(tmp_path, hu)
    edit(tmp_path, lambda ds, k: setattr(ds, "AcquisitionNumber", str(1 + k // 6)))
    np.testing.assert_array_equal(read(tmp_path).values_ZYX, hu)


def test_copies_of_slices_count_once(tmp_path, hu):
    write_series(tmp_path, hu)
    for path in sorted(tmp_path.iterdir())[:5]:
        path.with_name(f"{path.stem} (1).dcm").write_bytes(path.read_bytes())
    np.testing.assert_array_equal(read(tmp_path).values_ZYX, hu)


def test_slice_with_two_contents_is_refused(tmp_path, hu):
    write_series(tmp_path, hu)
    path = sorted(tmp_path.iterdir())[0]
    ds = pydicom.dcmread(path)
    ds.RescaleIntercept = "-1000"
    ds.save_as(path.with_name("again.dcm"))
    assert refused(tmp_path).code == "slices_twice"


@pytest.mark.parametrize(
    ("stored", "told", "is_signed"),
    [(63536, 63536, 0), (-2000, -2000, 1), (-2000, 63536, 1), (4000, 4000, 0), (0, 0, 0)],
)
def test_pixels_outside_the_field_of_view_become_air(tmp_path, hu, stored, told, is_signed):
    outside = np.zeros(hu.shape[1:], bool)
    outside[:, :3] = True
    kind = np.int16 if is_signed else np.uint16

    def pad(ds, k):
        pixels = np.where(outside, stored, hu[k].astype(int) + (0 if is_signed else 1024))
        ds.PixelData = pixels.astype(kind).tobytes()
        ds.PixelRepresentation = is_signed
        ds.RescaleIntercept = "0" if is_signed else "-1024"
        ds.add_new("PixelPaddingValue", "US" if told >= 0 else "SS", told)

    write_series(tmp_path, hu)
    edit(tmp_path, pad)
    values = read(tmp_path).values_ZYX
    assert values.dtype == np.int16
    np.testing.assert_array_equal(values, np.where(outside, -1024, hu))


def test_range_of_padding_is_outside_the_field_of_view(tmp_path, hu):
    def pad(ds, k):
        pixels = hu[k] + 1024
        pixels[0], pixels[-1] = 60000 - 65536, 63000 - 65536
        ds.PixelData = pixels.astype(np.uint16).tobytes()
        ds.add_new("PixelPaddingValue", "US", 63536)
        ds.add_new("PixelPaddingRangeLimit", "US", 60000)

    write_series(tmp_path, hu)
    edit(tmp_path, pad)
    values = read(tmp_path).values_ZYX
    assert (values[:, [0, -1]] == -1024).all()
    np.testing.assert_array_equal(values[:, 1:-1], hu[:, 1:-1])


def test_padding_that_is_a_value_of_tissue_is_left_alone(tmp_path, hu):
    inner = hu.copy()
    inner[:, :, [0, -1]] = inner[:, [0, -1]] = -1000
    write_series(tmp_path, inner, PixelPaddingValue=1024 + 45)
    np.testing.assert_array_equal(read(tmp_path).values_ZYX, inner)


def _one_file(folder, target, **tags):
    """Write a series as one Enhanced CT."""
    sources = [pydicom.dcmread(path) for path in folder.iterdir()]
    whole = LegacyConvertedEnhancedCTImage(
        legacy_datasets=sources,
        series_instance_uid=generate_uid(),
        series_number=7,
        sop_instance_uid=generate_uid(),
        instance_number=1,
    )
    for tag, value in tags.items():
        setattr(whole, tag, value)
    whole.file_meta.MediaStorageSOPClassUID = whole.SOPClassUID
    target.mkdir()
    whole.save_as(target / "all.dcm")
    return target


@pytest.mark.parametrize("tags", [{}, {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2.1"}])
def test_slices_in_one_file_are_a_series(tmp_path, hu, tags):
    write_series(tmp_path / "many", hu)
    scan = read(_one_file(tmp_path / "many", tmp_path / "one", **tags))
    np.testing.assert_array_equal(scan.values_ZYX, hu)
    np.testing.assert_allclose(scan.affine, read(tmp_path / "many").affine)


def test_empty_slope_and_intercept_are_one_and_zero(tmp_path, hu):
    write_series(tmp_path, hu, RescaleSlope=None, RescaleIntercept=None, NumberOfFrames=None)
    np.testing.assert_array_equal(read(tmp_path).values_ZYX, hu + 1024)


def test_a_slice_that_is_off_by_little_of_the_step_is_read(tmp_path, hu):
    positions = [8.0 * k + (0.3 if k == 7 else 0.0) for k in range(NUM)]
    write_series(tmp_path, hu, positions_mm=positions)
    np.testing.assert_allclose(read(tmp_path).spacing_mm, SPACING_MM)


def test_a_drift_below_half_a_millimetre_is_no_tilt(tmp_path, hu):
    write_series(tmp_path, hu, tilt_mm=0.02)
    np.testing.assert_array_equal(read(tmp_path).values_ZYX, hu)


@pytest.mark.parametrize(
    "syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless], ids=lambda uid: uid.name
)
def test_compressed_series_is_read_exactly(tmp_path, hu, syntax):
    write_series(tmp_path, hu)
    for path in tmp_path.iterdir():
        ds = pydicom.dcmread(path)
        ds.compress(syntax, generate_instance_uid=False)
        ds.save_as(path)
    np.testing.assert_array_equal(read(tmp_path).values_ZYX, hu)


@pytest.mark.parametrize("syntax", [JPEGLossless, JPEGLosslessSV1, HTJ2KLossless])
def test_a_decoder_of_lossless_jpeg_is_installed(syntax):
    assert get_decoder(syntax).is_available
