"""One volume in memory: NIfTI files in, NIfTI files out, and the way between the two grids.

Axis letters: Z to the head, Y to the back, X to the patient's left (LPS), so that `values[z]`
shown as a picture is the usual radiological view. I J K are the axes of the file.
World coordinates and affines are NIfTI's: millimetres, RAS+.
"""
# nibabel and isal carry no types for what is called here.
# mypy: allow-untyped-calls

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib
from nibabel.orientations import (
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)
from numpy.typing import NDArray

from scans.checks import failure
from scans.errors import ScanError

SPACING_LIMITS_MM = (0.2, 10.0)
ALIGNMENT_TOLERANCE_MM = 0.5
MAX_SHEAR = 1e-3
GZIP_LEVEL = 3
_GZIP_MAX_RATIO = 1100
_READ_ERRORS: tuple[Any, ...] = (
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


@dataclass(frozen=True)
class Geometry:
    """Where the voxels of one file are, and how its axes turn into Z Y X.

    Attributes:
        own_shape: voxels along the file's axes I, J, K.
        own_affine: 4 x 4, file voxel (i, j, k) to RAS+ millimetres.
    """

    own_shape: tuple[int, int, int]
    own_affine: NDArray[np.float64] = field(compare=False)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Geometry)
            and self.own_shape == other.own_shape
            and np.array_equal(self.own_affine, other.own_affine)
        )

    def __hash__(self) -> int:
        return hash((self.own_shape, self.own_affine.tobytes()))

    @cached_property
    def _to_lps(self) -> NDArray[np.float64]:
        return np.asarray(
            ornt_transform(io_orientation(self.own_affine), axcodes2ornt(("L", "P", "S")))
        )

    @cached_property
    def affine(self) -> NDArray[np.float64]:
        """4 x 4, canonical voxel (x, y, z) to RAS+ millimetres."""
        return np.asarray(self.own_affine @ inv_ornt_aff(self._to_lps, self.own_shape))

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxels along Z, Y, X in mm."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(z), float(y), float(x)

    @property
    def shape_ZYX(self) -> tuple[int, int, int]:
        """Number of voxels along Z, Y, X."""
        x, y, z = (self.own_shape[int(i)] for i in np.argsort(self._to_lps[:, 0]))
        return z, y, x

    @property
    def orientation(self) -> str:
        """The file's own axis codes, such as "RAS" or "LPS"."""
        return "".join(nib.aff2axcodes(self.own_affine))

    def to_canonical(self, own_values: Array) -> Array:
        """File order I J K to Z Y X, as a view."""
        turned = apply_orientation(own_values, self._to_lps)
        return np.asarray(turned).transpose(2, 1, 0)

    def to_own_grid(self, values_ZYX: Array) -> Array:
        """Z Y X back to the file's own axes I J K, as a view.

        Raises:
            ValueError: if the array does not have this geometry's shape.
        """
        if values_ZYX.shape != self.shape_ZYX:
            raise ValueError(
                f"array of shape {values_ZYX.shape}; expected {self.shape_ZYX} (Z, Y, X)"
            )
        to_own = ornt_transform(axcodes2ornt(("L", "P", "S")), io_orientation(self.own_affine))
        return np.asarray(apply_orientation(values_ZYX.transpose(2, 1, 0), to_own))


@dataclass(frozen=True, eq=False)
class Volume:
    """A CT scan or its label map in canonical orientation.

    Attributes:
        values_ZYX: HU as int16 (float32 where HU are fractional), or label ids as uint8.
        geometry: the file's own grid and the way back to it.
    """

    values_ZYX: Array
    geometry: Geometry

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxels along Z, Y, X in mm."""
        return self.geometry.spacing_mm

    @property
    def affine(self) -> NDArray[np.float64]:
        """4 x 4, canonical voxel (x, y, z) to RAS+ millimetres."""
        return self.geometry.affine

    def to_own_grid(self, values_ZYX: Array) -> Array:
        """An array on this volume's grid, back in the file's own axis order."""
        return self.geometry.to_own_grid(values_ZYX)


def read_image(path: Path) -> Volume:
    """Read a CT scan in HU.

    Args:
        path: .nii or .nii.gz.

    Returns:
        HU as int16 where that loses nothing, otherwise float32.

    Raises:
        ScanError: unreadable, not 3D, not real-valued, not finite, bad affine or spacing.
    """
    stored, slope, intercept, geometry = _read(path)
    values = _to_hu(path, stored, slope, intercept)
    return Volume(geometry.to_canonical(values), geometry)


def read_labels(path: Path) -> Volume:
    """Read a label map.

    Args:
        path: .nii or .nii.gz.

    Returns:
        Label ids as uint8.

    Raises:
        ScanError: as `read_image`, and if a value is not a whole number from 0 to 255.
    """
    stored, slope, intercept, geometry = _read(path)
    values = _to_label_ids(path, stored, slope, intercept)
    return Volume(geometry.to_canonical(values), geometry)


def check_aligned(image: Geometry, label: Geometry, name: str) -> None:
    """Refuse a pair whose voxels do not lie on each other.

    Args:
        image: geometry of the image file.
        label: geometry of the label file.
        name: the case, for the message.

    Raises:
        ScanError: shapes differ, or a corner voxel is off by more than
            `ALIGNMENT_TOLERANCE_MM`, with the part of the affine that causes it.
    """
    if image.own_shape != label.own_shape:
        raise failure(
            "shape_differs", f"{name}: image {image.own_shape}, label {label.own_shape} voxels"
        )
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in image.own_shape])).reshape(3, -1)
    corners = np.vstack([corners, np.ones(corners.shape[1])])

    def distance_mm(first: Array, second: Array) -> float:
        return float(np.linalg.norm(((first - second) @ corners)[:3], axis=0).max())

    if (off_mm := distance_mm(image.own_affine, label.own_affine)) <= ALIGNMENT_TOLERANCE_MM:
        return
    steps = [np.linalg.norm(g.own_affine[:3, :3], axis=0) for g in (image, label)]
    stretched = label.own_affine.copy()
    stretched[:3, :3] *= steps[0] / steps[1]
    turned = label.own_affine.copy()
    turned[:3, :3] = image.own_affine[:3, :3]
    if distance_mm(stretched, label.own_affine) > ALIGNMENT_TOLERANCE_MM:
        code, pair = "spacing_differs", [np.round(step, 4).tolist() for step in steps]
    elif distance_mm(turned, label.own_affine) > ALIGNMENT_TOLERANCE_MM:
        code, pair = "direction_differs", [image.orientation, label.orientation]
    else:
        code = "origin_differs"
        pair = [np.round(g.own_affine[:3, 3], 3).tolist() for g in (image, label)]
    raise failure(code, f"{name}: image {pair[0]}, label {pair[1]}, off by {off_mm:.2f} mm")


def write_volume(path: Path, own_values: Array, affine: Array) -> None:
    """Write a NIfTI file whose bytes depend on its voxels and affine alone.

    The header carries no text. A name in .gz is compressed without time or file name. The file
    appears under its name only when it is complete and on disk.

    Args:
        path: .nii or .nii.gz, overwritten.
        own_values: int16, uint8 or float32 in the file's own axis order.
        affine: 4 x 4, voxel to RAS+ millimetres; written as sform and qform.
    """
    image = nib.Nifti1Image(own_values, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1, strip_shears=True)
    image.header.set_xyzt_units("mm")
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as raw:
        if path.suffix == ".gz":
            with igzip.IGzipFile("", "wb", GZIP_LEVEL, raw, mtime=0) as stream:
                image.to_stream(stream)
        else:
            image.to_stream(raw)
        raw.flush()
        os.fsync(raw.fileno())
    temporary.replace(path)


def _read(path: Path) -> tuple[Array, float, float, Geometry]:
    """Stored voxels I J K, slope, intercept and geometry; the file is read to its end."""
    if not path.is_file():
        raise failure("file_missing", f"no file {path}")
    try:
        with _open(path) as stream:
            header = _read_header(stream)
            shape = tuple(int(n) for n in header.get_data_shape())
            dtype = header.get_data_dtype()
            affine = np.asarray(header.get_best_affine(), dtype=np.float64)
            slope, intercept = header.get_slope_inter()
            offset = int(header.get_data_offset())
            shape = _check_shape(path, shape)
            _check_dtype(path, dtype)
            geometry = Geometry(shape, affine)
            _check_affine(path, geometry)
            num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            _check_size(path, offset + num_bytes)
            stream.seek(offset)
            stored = np.empty(shape, dtype=dtype, order="F")
            _fill(path, stream, stored)
            while stream.read(1 << 20):
                pass
    except ScanError:
        raise
    except _READ_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise failure("unreadable", f"{path}: {reason}") from error
    slope = 1.0 if slope is None else float(slope)
    intercept = 0.0 if intercept is None else float(intercept)
    return stored, slope, intercept, geometry


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as stream:
        zipped = stream.read(2) == b"\x1f\x8b"
    opened: BinaryIO = igzip.open(path, "rb") if zipped else path.open("rb")
    return opened


def _read_header(stream: BinaryIO) -> nib.Nifti1Header:
    """The NIfTI-1 or NIfTI-2 header of an open file, in either byte order."""
    size = stream.read(4)
    stream.seek(0)
    wide = size in ((540).to_bytes(4, "little"), (540).to_bytes(4, "big"))
    kind = nib.Nifti2Header if wide else nib.Nifti1Header
    header: nib.Nifti1Header = kind.from_fileobj(stream)
    return header


def _fill(path: Path, stream: BinaryIO, array: Array) -> None:
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
    """Refuse a header that promises more than the file can hold, before memory is taken."""
    if num_bytes > path.stat().st_size * _GZIP_MAX_RATIO:
        raise failure(
            "unreadable",
            f"{path}: {path.stat().st_size} bytes cannot hold the {num_bytes} of its header",
        )


def _check_affine(path: Path, geometry: Geometry) -> None:
    axes = geometry.own_affine[:3, :3]
    if not np.isfinite(geometry.own_affine).all():
        raise failure("affine", f"{path}: an affine with NaN or Inf")
    steps = np.linalg.norm(axes, axis=0)
    low, high = SPACING_LIMITS_MM
    if (steps < low).any() or (steps > high).any():
        raise failure("spacing", f"{path}: {', '.join(f'{s:.4g}' for s in steps)} mm")
    unit = axes / steps
    shear = float(np.abs(unit.T @ unit - np.eye(3)).max())
    if shear > MAX_SHEAR:
        raise failure("affine", f"{path}: axes that are {shear:.3g} from orthogonal")


def _to_hu(path: Path, stored: Array, slope: float, intercept: float) -> Array:
    dtype = stored.dtype.newbyteorder("=")
    if dtype.kind == "f" and not _all_finite(stored):
        raise failure("not_finite", f"{path}: NaN or Inf in the image")
    low, high = sorted(float(v) * slope + intercept for v in (stored.min(), stored.max()))
    if not (np.isfinite([low, high]).all() and max(abs(low), abs(high)) < 1e6):
        raise failure("voxel_type", f"{path}: values from {low:.4g} to {high:.4g}")
    limits = np.iinfo(np.int16)
    fits = limits.min <= low and high <= limits.max
    whole = dtype.kind in "iu" and slope == round(slope) and intercept == round(intercept)
    if not (fits and (whole or _all_whole(stored, slope, intercept))):
        return _converted(stored, np.dtype(np.float32), slope, intercept)
    if dtype == np.int16 and (slope, intercept) == (1, 0):
        return stored.astype(dtype, copy=False)
    return _converted(stored, np.dtype(np.int16), slope, intercept)


def _to_label_ids(path: Path, stored: Array, slope: float, intercept: float) -> Array:
    if stored.dtype == np.uint8 and (slope, intercept) == (1, 0):
        return stored
    if stored.dtype.kind == "f" and not _all_finite(stored):
        raise failure("label_not_integer", f"{path}: NaN or Inf in the label")
    if not _all_whole(stored, slope, intercept, tolerance=1e-4):
        raise failure("label_not_integer", f"{path}: values that are not whole numbers")
    low, high = sorted(float(v) * slope + intercept for v in (stored.min(), stored.max()))
    if low < -0.5 or high > 255.5:
        raise failure("label_not_integer", f"{path}: values from {low:g} to {high:g}")
    return _converted(stored, np.dtype(np.uint8), slope, intercept)


def _slabs(stored: Array) -> range:
    return range(stored.shape[2])


def _all_finite(stored: Array) -> bool:
    return all(bool(np.isfinite(stored[..., k]).all()) for k in _slabs(stored))


def _all_whole(stored: Array, slope: float, intercept: float, tolerance: float = 1e-3) -> bool:
    if stored.dtype.kind in "iu" and slope == round(slope) and intercept == round(intercept):
        return True
    for k in _slabs(stored):
        slab = stored[..., k].astype(np.float64) * slope + intercept
        if np.abs(slab - np.rint(slab)).max() > tolerance:
            return False
    return True


def _converted(stored: Array, dtype: np.dtype[Any], slope: float, intercept: float) -> Array:
    """Value = slope * stored + intercept in `dtype`, slab by slab, so that no wide copy is made."""
    values = np.empty(stored.shape, dtype=dtype, order="F")
    for k in _slabs(stored):
        slab = stored[..., k].astype(np.float64) * slope + intercept
        values[..., k] = np.rint(slab) if dtype.kind in "iu" else slab
    return values
