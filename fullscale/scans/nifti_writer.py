"""Arrays on a scan's grid, written as NIfTI files that lie on the scan in every reader."""

# nibabel and isal carry no types for what is called here.
# mypy: allow-untyped-calls
from __future__ import annotations

import io
import math
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip

from fullscale.runtime.errors import ScanError
from fullscale.runtime.files import write_atomically
from fullscale.scans.checks import failure
from fullscale.scans.geometry import Array, Geometry
from fullscale.scans.volume import GZIP_LEVEL, READ_ERRORS, open_nifti, read_header

_GEOMETRY_FIELDS = (
    "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip


def write_on_grid(
    path: Path, values_ZYX: Array, geometry: Geometry, scan_file: Path | None = None
) -> None:
    """Write an array of a scan's shape on the scan's own grid; whole or not at all.

    Nothing of the scan's header is kept but where its voxels lie: no text goes along.

    Args:
        path: .nii or .nii.gz; missing parent folders are made.
        values_ZYX: uint8, float32, or float16 (written as float32), canonical orientation.
        geometry: of the scan.
        scan_file: the scan as NIfTI, whose affines, their codes and units are repeated field by
            field; None for a scan that came as DICOM, whose affine is written for both.

    Raises:
        ScanError: the header of `scan_file` has gone or changed since the scan was read.
    """
    header = _new_header(geometry) if scan_file is None else _header_like(scan_file, geometry)
    own = geometry.to_own_grid(values_ZYX)
    header.set_data_shape(own.shape)
    header.set_data_dtype(np.float32 if own.dtype == np.float16 else own.dtype)
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    image = kind(own, header.get_best_affine(), header)
    buffer = io.BytesIO()
    if path.suffix == ".gz":
        with igzip.IGzipFile("", "wb", GZIP_LEVEL, buffer, mtime=0) as stream:
            image.to_stream(stream)
    else:
        image.to_stream(buffer)
    write_atomically(path, buffer.getbuffer())


def read_claim(file: Path) -> tuple[int, int]:
    """What a NIfTI header says that its file holds, whether or not it does.

    Args:
        file: .nii or .nii.gz, of which the header is enough.

    Returns:
        Number of voxels, and bytes up to the end of the last one, uncompressed.

    Raises:
        ScanError: there is no NIfTI header.
    """
    try:
        with open_nifti(file) as stream:
            header = read_header(stream)
        num_voxels = math.prod(max(0, int(n)) for n in header.get_data_shape())
        offset = max(0, int(header.get_data_offset()))
        return num_voxels, offset + num_voxels * int(header.get_data_dtype().itemsize)
    except READ_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise failure("unreadable", f"no NIfTI header: {reason}") from None


def _new_header(geometry: Geometry) -> nib.Nifti1Header:
    header = nib.Nifti1Header()
    header.set_data_shape(geometry.own_shape)
    header.set_sform(geometry.own_affine, code="scanner")
    header.set_qform(geometry.own_affine, code="scanner", strip_shears=True)
    header.set_xyzt_units("mm")
    return header


def _header_like(scan_file: Path, geometry: Geometry) -> nib.Nifti1Header:
    with open_nifti(scan_file) as stream:
        source = read_header(stream)
    if not np.array_equal(np.asarray(source.get_best_affine()), geometry.own_affine):
        raise ScanError(
            "scan_changed",
            f"{scan_file} with another affine than when it was read",
            "the scan as it was",
            "run again when nothing writes to it",
        )
    header = type(source)()
    for name in _GEOMETRY_FIELDS:
        header[name] = source[name]
    return header
