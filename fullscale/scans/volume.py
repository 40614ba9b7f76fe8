"""Read CT scans and label maps into memory, and write them as NIfTI files."""

# nibabel and isal have no type annotations for the functions called here.
# mypy: allow-untyped-calls
from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib
from numpy.typing import NDArray

from fullscale.formats.itk_files import is_itk_file, read_itk
from fullscale.runtime.errors import ScanError, shorten
from fullscale.runtime.files import open_atomically
from fullscale.scans.checks import failure
from fullscale.scans.geometry import (
    ALIGNMENT_TOLERANCE_MM,
    Geometry,
    check_affine,
    check_spacing,
    max_distance_mm,
)

GZIP_LEVEL = 3  # the highest level of isal; it costs little time
_GZIP_MAX_RATIO = 1100  # deflate cannot compress better than 1032 to 1
_SPACING_TOLERANCE = 0.01  # relative; between pixdim and srow of one header
_MAX_QUATERNION = 1.001  # length up to which a quaternion is off by rounding
_MAX_LABEL_SLOPE = 0.1  # a coarser scale factor hides what interpolation did
_LABEL_TOLERANCE = 1e-3  # relative; of a whole number that was scaled or stored as a float
_SILENT = logging.Logger("header repairs", level=logging.CRITICAL + 1)
_TEXT_FIELDS = ("descrip", "aux_file", "intent_name", "db_name", "data_type")
READ_ERRORS: tuple[Any, ...] = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    zlib.error,
    isal_zlib.error,
    nib.spatialimages.HeaderDataError,
    nib.filebasedimages.ImageFileError,
    nib.wrapstruct.WrapStructError,
)

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Volume:
    """A CT scan or its label map in canonical orientation.

    Attributes:
        values_ZYX: HU as int16 (float32 if HU are fractional), or label ids as uint8.
        geometry: grid of the file.
        text_fields: names of header fields that hold free text, which may name the patient.
        doubts: code and values found of the checks that the header failed.
    """

    values_ZYX: Array
    geometry: Geometry
    text_fields: tuple[str, ...] = ()
    doubts: tuple[tuple[str, str], ...] = ()

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxels along Z, Y, X in mm."""
        return self.geometry.spacing_mm

    @property
    def affine(self) -> NDArray[np.float64]:
        """4 x 4, canonical voxel (x, y, z) to RAS+ millimetres."""
        return self.geometry.affine

    def to_own_grid(self, values_ZYX: Array) -> Array:
        """Return an array (Z, Y, X) on this volume's grid in the axis order of the file."""
        return self.geometry.to_own_grid(values_ZYX)


def read_image(path: Path) -> Volume:
    """Read a CT scan in HU.

    Args:
        path: .nii or .nii.gz, or a file of `formats.itk_files`.

    Returns:
        HU as int16 if that loses nothing, otherwise float32.

    Raises:
        ScanError: unreadable, not 3D, not real-valued, not finite, bad affine or spacing.
    """
    file = _read(path)
    values = to_hu(file.voxels, file.slope, file.intercept, str(path))
    return Volume(file.geometry.to_canonical(values), file.geometry, file.text_fields, file.doubts)


def read_labels(path: Path) -> Volume:
    """Read a label map.

    Args:
        path: as for `read_image`.

    Returns:
        Label ids as uint8.

    Raises:
        ScanError: as for `read_image`, or a value is not a whole number from 0 to 255.
    """
    file = _read(path)
    values = _to_label_ids(path, file.voxels, file.slope, file.intercept)
    return Volume(file.geometry.to_canonical(values), file.geometry, file.text_fields)


def write_volume(path: Path, own_values: Array, affine: Array) -> None:
    """Write a NIfTI file atomically; its bytes depend on voxels and affine alone.

    The header holds no text. A .gz file holds neither time nor file name.

    Args:
        path: .nii or .nii.gz, overwritten.
        own_values: int16, uint8 or float32 in the file's own axis order.
        affine: 4 x 4, voxel to RAS+ millimetres; written as sform and qform.
    """
    image = nib.Nifti1Image(own_values, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1, strip_shears=True)
    image.header.set_xyzt_units("mm")
    save_nifti(path, image)


def save_nifti(path: Path, image: nib.Nifti1Image) -> None:
    """Write a NIfTI image atomically; a .gz file holds neither time nor file name."""
    with open_atomically(path) as raw:
        if path.suffix == ".gz":
            with igzip.IGzipFile("", "wb", GZIP_LEVEL, raw, mtime=0) as stream:
                image.to_stream(stream)
        else:
            image.to_stream(raw)  # type: ignore[arg-type]  # nibabel wants an IOBase


def open_nifti(path: Path) -> BinaryIO:
    """Open the uncompressed bytes of a file; compression is detected by content, not by name.

    Raises:
        OSError: the file cannot be opened.
    """
    with path.open("rb") as stream:
        zipped = stream.read(2) == b"\x1f\x8b"
    opened: BinaryIO = igzip.open(path, "rb") if zipped else path.open("rb")
    return opened


def read_header(stream: BinaryIO) -> nib.Nifti1Header:
    """Read the NIfTI-1 or NIfTI-2 header of an open file, in either byte order.

    nibabel repairs small faults. Its repairs of the spacing are undone, because they would hide a
    missing spacing.

    Args:
        stream: result of `open_nifti`, at its beginning.

    Raises:
        READ_ERRORS: the file has no valid header; the type depends on its content.
    """
    size = stream.read(4)
    stream.seek(0)
    # The header begins with its own size: 348 bytes in NIfTI-1, 540 in NIfTI-2.
    wide = size in ((540).to_bytes(4, "little"), (540).to_bytes(4, "big"))
    kind = nib.Nifti2Header if wide else nib.Nifti1Header
    header: nib.Nifti1Header = kind.from_fileobj(stream, check=False)
    stored_spacing = np.array(header["pixdim"][1:4], dtype=np.float64)
    header.check_fix(logger=_SILENT, error_level=40)
    header["pixdim"][1:4] = stored_spacing
    # Some writers round a quaternion so that it is longer than 1, which nibabel refuses.
    parts = [f"quatern_{axis}" for axis in "bcd"]
    length = float(np.sqrt(sum(float(header[part]) ** 2 for part in parts)))
    if 1 < length <= _MAX_QUATERNION:
        for part in parts:
            header[part] = float(header[part]) / length
    return header


def to_hu(stored: Array, slope: float, intercept: float, name: str) -> Array:
    """Convert stored voxels to HU: int16 if that loses nothing, otherwise float32.

    Args:
        stored: three axes in any order; returned without a copy if it is HU in int16 already.
        slope: HU per stored unit.
        intercept: HU of a stored zero.
        name: name of the file, for error messages.

    Raises:
        ScanError: values are not finite, or outside the range of HU.
    """
    dtype = stored.dtype.newbyteorder("=")
    if dtype.kind == "f" and not _all_finite(stored):
        raise failure("not_finite", f"{name}: NaN or Inf in the image")
    low, high = sorted(float(v) * slope + intercept for v in (stored.min(), stored.max()))
    if not (np.isfinite([low, high]).all() and max(abs(low), abs(high)) < 1e6):
        raise failure("voxel_type", f"{name}: values from {low:.4g} to {high:.4g}")
    limits = np.iinfo(np.int16)
    fits = limits.min <= low and high <= limits.max
    whole = dtype.kind in "iu" and slope == round(slope) and intercept == round(intercept)
    if not (fits and (whole or _all_whole(stored, slope, intercept))):
        return _converted(stored, np.dtype(np.float32), slope, intercept)
    if dtype == np.int16 and (slope, intercept) == (1, 0):
        return stored.astype(dtype, copy=False)
    return _converted(stored, np.dtype(np.int16), slope, intercept)


@dataclass(frozen=True, eq=False)
class _File:
    """Content of a NIfTI file: value = slope * voxel + intercept, voxels (I, J, K)."""

    voxels: Array
    slope: float
    intercept: float
    geometry: Geometry
    text_fields: tuple[str, ...]
    doubts: tuple[tuple[str, str], ...]


def _read(path: Path) -> _File:
    """Read a file to its end, so that the checksum of a compressed file is verified."""
    if not path.is_file():
        raise failure("file_missing", f"no file {path}")
    if is_itk_file(path):
        return _read_itk(path)
    try:
        with open_nifti(path) as stream:
            header = read_header(stream)
            geometry = _geometry(path, header)
            slope, intercept = header.get_slope_inter()
            voxels = _read_voxels(path, stream, header, geometry.own_shape)
            while stream.read(1 << 20):
                pass
    except ScanError:
        raise
    except READ_ERRORS as error:
        reason = shorten(error) or type(error).__name__
        raise failure("unreadable", f"{path}: {reason}") from error
    return _File(
        voxels,
        1.0 if slope is None else float(slope),
        0.0 if intercept is None else float(intercept),
        geometry,
        _text_fields(header),
        tuple(_find_doubts(path, header, geometry)),
    )


def _read_itk(path: Path) -> _File:
    try:
        content = read_itk(path)
    except (*READ_ERRORS, RuntimeError) as error:
        raise failure("unreadable", f"{path}: {shorten(error)}") from error
    shape = _check_shape(path, content.voxels.shape)
    voxels = content.voxels.reshape(shape, order="F")
    _check_dtype(path, voxels.dtype)
    geometry = Geometry(shape, content.affine)
    check_affine(geometry, str(path))
    told = f"{path.name}: a header of the format Analyze"
    doubts = () if content.has_orientation else (("orientation_missing", told),)
    return _File(voxels, 1.0, 0.0, geometry, (), doubts)


def _find_doubts(
    path: Path, header: nib.Nifti1Header, geometry: Geometry
) -> Iterator[tuple[str, str]]:
    """Yield code and finding where the header leaves open where the voxels lie in the patient."""
    sform, qform = header.get_sform(coded=True)[0], header.get_qform(coded=True)[0]
    if sform is None and qform is None:
        yield "orientation_missing", f"{path.name}: sform_code 0 and qform_code 0"
    if sform is None or qform is None:
        return
    other = Geometry(geometry.own_shape, np.asarray(qform, dtype=np.float64))
    if (off_mm := max_distance_mm(geometry, other)) > ALIGNMENT_TOLERANCE_MM:
        yield (
            "forms_differ",
            f"{path.name}: axes {geometry.orientation} in its sform, which is taken, and "
            f"{other.orientation} in its qform, off by {off_mm:.1f} mm",
        )


def _geometry(path: Path, header: nib.Nifti1Header) -> Geometry:
    shape = _check_shape(path, tuple(int(n) for n in header.get_data_shape()))
    stored_mm = np.array(header["pixdim"][1:4], dtype=np.float64)
    check_spacing(stored_mm, str(path))
    geometry = Geometry(shape, np.asarray(header.get_best_affine(), dtype=np.float64))
    check_affine(geometry, str(path))
    affine_mm = np.linalg.norm(geometry.own_affine[:3, :3], axis=0)
    if np.abs(stored_mm / affine_mm - 1).max() > _SPACING_TOLERANCE:
        pair = " and ".join(", ".join(f"{s:.4g}" for s in mm) for mm in (stored_mm, affine_mm))
        raise failure("spacing", f"{path}: {pair} mm in the fields pixdim and srow of one header")
    return geometry


def _read_voxels(
    path: Path, stream: BinaryIO, header: nib.Nifti1Header, shape: tuple[int, int, int]
) -> Array:
    dtype = header.get_data_dtype()
    _check_dtype(path, dtype)
    offset = int(header.get_data_offset())
    _check_size(path, offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
    stream.seek(offset)
    voxels = np.empty(shape, dtype=dtype, order="F")
    _fill(path, stream, voxels)
    return voxels


def _text_fields(header: nib.Nifti1Header) -> tuple[str, ...]:
    found = [
        name
        for name in _TEXT_FIELDS
        if name in header.keys() and bytes(header[name].item()).strip(b"\0 ")  # noqa: SIM118
    ]
    return tuple([*found, "extension"] if len(header.extensions) else found)


def _fill(path: Path, stream: BinaryIO, array: Array) -> None:
    """Read the bytes of an array in Fortran order, 16 MiB at a time."""
    view = array.reshape(-1, order="F").view(np.uint8).data
    done = 0
    while done < len(view):
        count = stream.readinto(view[done : done + (1 << 24)])  # type: ignore[attr-defined]
        if not count:
            raise failure("unreadable", f"{path}: ends after {done} of {len(view)} bytes of voxels")
        done += count


def _check_shape(path: Path, shape: Sequence[int]) -> tuple[int, int, int]:
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or min(shape) < 2:
        raise failure("not_3d", f"{path}: shape {tuple(shape)}")
    return shape[0], shape[1], shape[2]


def _check_dtype(path: Path, dtype: np.dtype[Any]) -> None:
    if dtype.kind not in "iuf":
        kind = "colours" if dtype.kind == "V" else str(dtype)
        raise failure("voxel_type", f"{path}: voxels of type {kind}")


def _check_size(path: Path, num_bytes: int) -> None:
    """Check that the file can hold the voxels its header declares, before memory is allocated."""
    if num_bytes > path.stat().st_size * _GZIP_MAX_RATIO:
        raise failure(
            "unreadable",
            f"{path}: {path.stat().st_size} bytes cannot hold the {num_bytes} of its header",
        )


def _to_label_ids(path: Path, stored: Array, slope: float, intercept: float) -> Array:
    if stored.dtype == np.uint8 and (slope, intercept) == (1, 0):
        return stored
    if stored.dtype.kind == "f" and not _all_finite(stored):
        raise failure("label_not_integer", f"{path}: NaN or Inf in the label")
    # A writer that scales to fill the type rounds each id to a multiple of the slope.
    step = abs(slope) / 2 if stored.dtype.kind in "iu" and abs(slope) < _MAX_LABEL_SLOPE else 0.0
    if not _all_whole(stored, slope, intercept, step, relative=_LABEL_TOLERANCE):
        scaled = f", after the factor scl_slope {slope:g} of its header" if slope != 1 else ""
        raise failure("label_not_integer", f"{path}: values that are not whole numbers{scaled}")
    low, high = sorted(float(v) * slope + intercept for v in (stored.min(), stored.max()))
    if low < -0.5 or high > 255.5:
        raise failure("label_range", f"{path}: values from {low:g} to {high:g}")
    return _converted(stored, np.dtype(np.uint8), slope, intercept)


def _slabs(stored: Array) -> range:
    """Return the indices along the last axis; a slab at a time keeps temporary copies small."""
    return range(stored.shape[2])


def _all_finite(stored: Array) -> bool:
    return all(bool(np.isfinite(stored[..., k]).all()) for k in _slabs(stored))


def _all_whole(
    stored: Array,
    slope: float,
    intercept: float,
    tolerance: float = 1e-3,
    relative: float = 0.0,
) -> bool:
    """Return True if all values are within `tolerance` and `relative` of a whole number."""
    if stored.dtype.kind in "iu" and slope == round(slope) and intercept == round(intercept):
        return True
    for k in _slabs(stored):
        slab = stored[..., k].astype(np.float64) * slope + intercept
        allowed = np.minimum(tolerance + relative * np.maximum(1, np.abs(slab)), 0.1)
        if (np.abs(slab - np.rint(slab)) > allowed).any():
            return False
    return True


def _converted(stored: Array, dtype: np.dtype[Any], slope: float, intercept: float) -> Array:
    """Return slope * stored + intercept as `dtype`, computed slab by slab to save memory."""
    values = np.empty(stored.shape, dtype=dtype, order="F")
    for k in _slabs(stored):
        slab = stored[..., k].astype(np.float64) * slope + intercept
        values[..., k] = np.rint(slab) if dtype.kind in "iu" else slab
    return values
