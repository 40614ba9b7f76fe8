"""Write arrays on a scan's grid as NIfTI files that align with the scan in every reader."""

# nibabel and isal have no type annotations for the functions called here.
# mypy: allow-untyped-calls
from __future__ import annotations

import math
from pathlib import Path

import nibabel as nib
import numpy as np

from fullscale.runtime.errors import ScanError, shorten
from fullscale.scans.checks import failure
from fullscale.scans.geometry import Array, Geometry
from fullscale.scans.volume import READ_ERRORS, open_nifti, read_header, save_nifti

_GEOMETRY_FIELDS = (
    "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip


def write_on_grid(
    path: Path, values_ZYX: Array, geometry: Geometry, scan_file: Path | None = None
) -> None:
    """Write an array (Z, Y, X) on the grid of a scan, atomically.

    Only the geometry of the scan's header is kept, never its text.

    Args:
        path: .nii or .nii.gz; missing parent folders are created.
        values_ZYX: uint8, float32, or float16 (written as float32), canonical orientation.
        geometry: grid of the scan.
        scan_file: the scan as NIfTI; its affines, their codes and units are copied field by field.
            None for a scan of another format: its affine is written as sform and qform.

    Raises:
        ScanError: `scan_file` is missing, or its affine changed since the scan was read.
    """
    header = _new_header(geometry) if scan_file is None else _header_like(scan_file, geometry)
    own = geometry.to_own_grid(values_ZYX)
    header.set_data_shape(own.shape)
    header.set_data_dtype(np.float32 if own.dtype == np.float16 else own.dtype)
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    image = kind(own, header.get_best_affine(), header)
    save_nifti(path, image)


def read_declared_size(file: Path) -> tuple[int, int]:
    """Read the size that a NIfTI header declares; the voxels themselves need not be there.

    Args:
        file: .nii or .nii.gz; only the header is read.

    Returns:
        Number of voxels, and uncompressed bytes from the beginning to the end of the last voxel.

    Raises:
        ScanError: the file has no NIfTI header.
    """
    try:
        with open_nifti(file) as stream:
            header = read_header(stream)
        num_voxels = math.prod(max(0, int(n)) for n in header.get_data_shape())
        offset = max(0, int(header.get_data_offset()))
        return num_voxels, offset + num_voxels * int(header.get_data_dtype().itemsize)
    except READ_ERRORS as error:
        reason = shorten(error) or type(error).__name__
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
