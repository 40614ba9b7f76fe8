from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from bodies import lps_affine, make_body, turn

from fullscale.formats.itk_files import data_files
from fullscale.runtime.errors import ScanError
from fullscale.scans.volume import read_image, read_labels

SPACING_MM = (8.0, 7.0, 7.0)


def write(path, values_ZYX, codes="LPS"):
    """Write canonical voxels with SimpleITK; the affine of nibabel is RAS, that of ITK LPS."""
    values, affine = turn(values_ZYX, lps_affine(values_ZYX.shape, SPACING_MM), codes)
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(values.transpose(2, 1, 0)))
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    steps = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(steps.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / steps).ravel().tolist())
    SimpleITK.WriteImage(image, str(path))
    return path


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PSR"])
@pytest.mark.parametrize("ending", [".nrrd", ".nhdr", ".mha", ".mhd"])
def test_scan_and_labels_lie_where_they_were_written(tmp_path, ending, codes):
    hu, labels = make_body()
    scan = read_image(write(tmp_path / f"ct{ending}", hu, codes))
    np.testing.assert_array_equal(scan.values_ZYX, hu)
    np.testing.assert_allclose(scan.affine, lps_affine(hu.shape, SPACING_MM), atol=1e-6)
    assert scan.doubts == ()
    drawn = read_labels(write(tmp_path / f"label{ending}", labels, codes))
    np.testing.assert_array_equal(drawn.values_ZYX, labels)


@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.AnalyzeImage])
@pytest.mark.parametrize("ending", [".hdr", ".img"])
def test_pairs_of_header_and_image_are_read(tmp_path, kind, ending):
    hu, _ = make_body()
    values, affine = turn(hu, lps_affine(hu.shape, SPACING_MM), "LAS")
    nib.save(kind(np.ascontiguousarray(values), affine), tmp_path / "ct.img")
    scan = read_image(tmp_path / f"ct{ending}")
    assert sorted(scan.values_ZYX.ravel()) == sorted(hu.ravel())
    is_sure = kind is nib.Nifti1Pair
    assert [code for code, _ in scan.doubts] == ([] if is_sure else ["orientation_missing"])
    if is_sure:
        np.testing.assert_array_equal(scan.values_ZYX, hu)


def test_files_of_the_voxels_are_known(tmp_path):
    hu, _ = make_body()
    (data,) = data_files(write(tmp_path / "ct.mhd", hu))
    assert data.parent == tmp_path
    assert data.is_file()
    assert data_files(write(tmp_path / "ct.mha", hu)) == ()


@pytest.mark.parametrize("name", ["/etc/passwd", "../other.raw", "LIST", "ct%d.raw", "a\\b.raw"])
def test_a_header_that_names_a_file_elsewhere_is_refused(tmp_path, name):
    path = write(tmp_path / "ct.mhd", make_body()[0])
    lines = [line for line in path.read_text().splitlines() if "ElementDataFile" not in line]
    path.write_text("\n".join([*lines, f"ElementDataFile = {name}", ""]))
    with pytest.raises(ScanError, match="not in one file beside the header"):
        read_image(path)


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".hdr"])
def test_a_file_of_another_kind_is_refused(tmp_path, ending):
    path = tmp_path / f"ct{ending}"
    path.write_bytes(b"no scan" * 100)
    with pytest.raises(ScanError) as caught:
        read_image(path)
    assert caught.value.code == "unreadable"


def test_colours_are_refused(tmp_path):
    values = np.zeros((10, 10, 10, 3), np.uint8)
    SimpleITK.WriteImage(
        SimpleITK.GetImageFromArray(values, isVector=True), str(tmp_path / "a.nrrd")
    )
    with pytest.raises(ScanError):
        read_image(tmp_path / "a.nrrd")
