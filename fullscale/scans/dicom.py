"""Read one DICOM series of CT slices as a volume.

Slices are sorted by their position along the normal of the slice plane, never by file name or
instance number. A series that is not a regular volume is refused with the positions in question.
"""

# pydicom has no type annotations for the elements of data sets.
# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels.processing import apply_modality_lut

from fullscale.formats.dicom_files import (
    DIRECTORY_NAME,
    READ_ERRORS,
    is_damaged,
    is_dicom,
    read_dataset,
)
from fullscale.formats.functional_groups import get_element, get_number
from fullscale.formats.tilted_slices import TiltedSlices
from fullscale.runtime.errors import ScanError, shorten
from fullscale.runtime.files import file_sha256
from fullscale.scans.checks import failure
from fullscale.scans.geometry import ALIGNMENT_TOLERANCE_MM, Geometry, check_affine
from fullscale.scans.volume import Volume, to_hu

POSITION_TOLERANCE_MM = 0.1
_STEP_TOLERANCE = 0.04  # of the distance of slices; a table moves unevenly
MAX_TILT_MM = ALIGNMENT_TOLERANCE_MM  # drift across the normal, over the whole series
_MAX_TILT_PX = 0.5  # the same in pixels; a smaller one comes from rounded headers
TEXT_TAGS = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientAddress",
    "PatientTelephoneNumbers",
    "OtherPatientIDs",
    "AccessionNumber",
    "InstitutionName",
    "InstitutionAddress",
    "ReferringPhysicianName",
    "PerformingPhysicianName",
    "OperatorsName",
    "StudyDescription",
    "StudyID",
    "StudyDate",
)
SOURCE_TAGS = (
    "SeriesInstanceUID",
    "AcquisitionNumber",
    "TemporalPositionIdentifier",
    "ConvolutionKernel",
)
"""Elements that tell the acquisitions and reconstructions of a study apart."""
OUTSIDE_HU = -1024  # air, for pixels outside the field of view
# SOP classes: CT Image Storage, Enhanced and Legacy Converted Enhanced CT Image Storage.
CT_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.2",
    "1.2.840.10008.5.1.4.1.1.2.1",
    "1.2.840.10008.5.1.4.1.1.2.2",
)
_TO_RAS = np.array([-1.0, -1.0, 1.0])  # DICOM coordinates are LPS, ours are NIfTI's RAS


@dataclass(frozen=True)
class SeriesOrder:
    """The slices of a series in spatial order.

    Attributes:
        files: file of each slice, sorted along the normal of the slice plane; one file may hold
            several slices.
        instance_uids: SOPInstanceUID of each slice's file.
        geometry: grid of the series; its axes are columns, rows, slices.
        frames: of each slice, its frame in the file, from 0; None in a file of one slice.
        tilted: the slices of a tilted gantry, which `geometry` then has oblique to their normal;
            None for upright ones.
    """

    files: tuple[Path, ...]
    instance_uids: tuple[str, ...]
    geometry: Geometry
    frames: tuple[int | None, ...]
    tilted: TiltedSlices | None = None

    @property
    def scan_geometry(self) -> Geometry:
        """Grid of the scan as `read_series` reads it, which is upright."""
        if self.tilted is None:
            return self.geometry
        return Geometry(self.tilted.upright_shape, self.tilted.upright_affine)

    def to_canonical(self, drawn: NDArray[Any]) -> NDArray[Any]:
        """Return label ids or a mask on the slices as (Z, Y, X) on the grid of the scan."""
        if self.tilted is not None:
            drawn = self.tilted.to_upright(drawn, order=0, outside=0)
        return self.scan_geometry.to_canonical(drawn)

    def to_slices(self, values_ZYX: NDArray[Any]) -> NDArray[Any]:
        """Return values (Z, Y, X) on the grid of the scan as (Z, Y, X) on the slices.

        Label ids are those of the nearest voxel, other values are interpolated.
        """
        if self.tilted is None:
            return values_ZYX
        own = self.tilted.to_slices(
            self.scan_geometry.to_own_grid(values_ZYX),
            order=0 if values_ZYX.dtype.kind in "bu" else 1,
        )
        return self.geometry.to_canonical(own)


def dicom_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of a folder that are DICOM by content or damaged DICOM, sorted by name.

    Raises:
        ScanError: the folder is missing.
    """
    if not folder.is_dir():
        raise failure("file_missing", f"no folder {folder}")
    return tuple(
        path
        for path in sorted(folder.iterdir())
        if path.name != DIRECTORY_NAME and (is_dicom(path) or is_damaged(path))
    )


def read_header(path: Path) -> pydicom.Dataset:
    """Read a DICOM file without its pixels.

    Raises:
        ScanError: the file cannot be read.
    """
    try:
        if not path.stat().st_size:
            raise failure("unreadable", f"{path}: an empty file")
        return read_dataset(path, with_pixels=False)
    except ScanError:
        raise
    except READ_ERRORS as error:
        raise _unreadable(path, error) from error


def order_series(files: Sequence[Path], name: str) -> SeriesOrder:
    """Sort the slices of a series by position, and determine its grid.

    Args:
        files: files of one series; scout views (localizers) are skipped.
        name: name of the case, for error messages.

    Raises:
        ScanError: unreadable, not CT, slices of different planes or sizes, several slices at one
            position, interleaved acquisitions, missing slices or uneven spacing.
    """
    planes = [plane for path in files for plane in _read_planes(path)]
    if len(planes) < 2:
        raise failure("few_slices", f"{name}: {len(planes)} CT slices")
    _check_same_plane(planes, name)
    planes = _drop_copies(planes, name)
    normal = planes[0].normal
    planes.sort(key=lambda plane: (float(normal @ plane.position), str(plane.path)))
    _check_one_acquisition(planes, name)
    step_mm = _check_positions([float(normal @ plane.position) for plane in planes], name)
    first, last = planes[0], planes[-1]
    rows, columns = first.size
    affine = np.eye(4)
    affine[:3, 0] = first.along_row * first.spacing[1] * _TO_RAS
    affine[:3, 1] = first.along_column * first.spacing[0] * _TO_RAS
    shift = last.position - first.position
    is_tilted = _is_tilted(first, shift - (normal @ shift) * normal)
    affine[:3, 2] = (shift / (len(planes) - 1) if is_tilted else normal * step_mm) * _TO_RAS
    affine[:3, 3] = first.position * _TO_RAS
    geometry = Geometry((columns, rows, len(planes)), affine)
    order = SeriesOrder(
        tuple(plane.path for plane in planes),
        tuple(plane.instance_uid for plane in planes),
        geometry,
        tuple(plane.frame for plane in planes),
        TiltedSlices(geometry.own_shape, affine) if is_tilted else None,
    )
    check_affine(order.scan_geometry, name)
    if is_tilted:
        _check_one_tilt(planes, name)
    return order


def read_series(order: SeriesOrder, name: str) -> Volume:
    """Read the pixels of a series in HU, with rescale slope and intercept applied.

    Pixels that PixelPaddingValue marks as outside the field of view become `OUTSIDE_HU`. The slices
    of a tilted gantry are resampled in their planes onto an upright grid, which is a doubt.

    Raises:
        ScanError: unreadable, or compressed in a way that no installed decoder supports.
    """
    values: NDArray[Any] = np.empty(order.geometry.own_shape, dtype=np.int16, order="F")
    text_fields = set[str]()
    reader = _PixelReader()
    for k, (path, frame) in enumerate(zip(order.files, order.frames, strict=True)):
        try:
            slice_, plane = reader.read(path, frame)
            slope = get_number(slice_, "RescaleSlope", frame, default=1)
            intercept = get_number(slice_, "RescaleIntercept", frame, default=0)
            padding = _find_padding(slice_, plane)
            if "ModalityLUTSequence" in slice_:
                plane = apply_modality_lut(plane, slice_)
        except ScanError:
            raise
        except READ_ERRORS as error:
            raise _unreadable(path, error) from error
        if plane.shape != order.geometry.own_shape[1::-1]:
            raise failure("unreadable", f"{path}: pixels of shape {plane.shape}")
        text_fields.update(tag for tag in TEXT_TAGS if str(slice_.get(tag, "")).strip())
        if padding is not None:
            inside = plane[~padding]
            plane = np.where(padding, inside.min() if inside.size else plane.dtype.type(0), plane)
        hu = to_hu(plane.T[..., None], slope, intercept, str(path))
        if padding is not None:
            hu = np.where(padding.T[..., None], hu.dtype.type(OUTSIDE_HU), hu)
        # The first slice with fractional HU turns the volume to float32.
        if hu.dtype != np.int16 and values.dtype == np.int16:
            values = values.astype(np.float32, order="F")
        values[..., k : k + 1] = hu
    doubts: tuple[tuple[str, str], ...] = ()
    if order.tilted is not None:
        values = order.tilted.to_upright(values, order=1, outside=OUTSIDE_HU)
        doubts = (("gantry_tilt", f"{name}: {order.tilted}"),)
    geometry = order.scan_geometry
    return Volume(geometry.to_canonical(values), geometry, tuple(sorted(text_fields)), doubts)


@dataclass(frozen=True, eq=False)
class _Plane:
    """Position, axes and size of one slice in mm, LPS; `sources` are its `SOURCE_TAGS`."""

    path: Path
    instance_uid: str
    position: NDArray[np.float64]
    along_row: NDArray[np.float64]
    along_column: NDArray[np.float64]
    spacing: tuple[float, float]
    size: tuple[int, int]
    sources: tuple[str, ...]
    frame: int | None = None

    @property
    def normal(self) -> NDArray[np.float64]:
        return np.cross(self.along_row, self.along_column)

    @classmethod
    def from_header(cls, path: Path, header: pydicom.Dataset, frame: int | None) -> _Plane:
        if str(header.get("SOPClassUID", "")) not in CT_CLASSES:
            raise failure("modality", f"{path} of modality {header.get('Modality', 'none')}")
        position, axes, spacing = (
            get_element(header, tag, frame)
            for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
        )
        for tag, value in (
            ("ImagePositionPatient", position),
            ("ImageOrientationPatient", axes),
            ("PixelSpacing", spacing),
        ):
            if value is None:
                raise failure("unreadable", f"{path} without {tag}")
        orientation = np.array(axes, dtype=np.float64)
        if not np.allclose(np.linalg.norm(orientation.reshape(2, 3), axis=1), 1, atol=0.01):
            raise failure("affine", f"{path} with ImageOrientationPatient {orientation.tolist()}")
        down, across = (float(step) for step in spacing)
        return cls(
            path,
            str(header.SOPInstanceUID),
            np.array(position, dtype=np.float64),
            orientation[:3],
            orientation[3:],
            (down, across),
            (int(header.Rows), int(header.Columns)),
            tuple(str(header.get(tag, "")) for tag in SOURCE_TAGS),
            frame,
        )


def _read_planes(path: Path) -> list[_Plane]:
    """Read the planes of a file's slices; none for a scout view."""
    header = read_header(path)
    try:
        if is_scout(header):
            return []
        num_frames = int(header.get("NumberOfFrames") or 1)
        is_multiframe = num_frames > 1 or "PerFrameFunctionalGroupsSequence" in header
        frames = range(num_frames) if is_multiframe else [None]
        return [_Plane.from_header(path, header, frame) for frame in frames]
    except ScanError:
        raise
    except READ_ERRORS as error:
        raise _unreadable(path, error) from error


class _PixelReader:
    """Decode slices; the file of several slices is decoded once, if they follow each other."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._dataset = pydicom.Dataset()
        self._pixels: NDArray[Any] = np.empty(0)

    def read(self, path: Path, frame: int | None) -> tuple[pydicom.Dataset, NDArray[Any]]:
        """Return the data set of a file, and the stored pixels of one slice (rows, columns)."""
        if path != self._path:
            self._dataset = read_dataset(path)
            self._pixels = _decode(self._dataset, path)
            self._path = path
        pixels = self._pixels
        return self._dataset, pixels if frame is None or pixels.ndim == 2 else pixels[frame]


def _decode(dataset: pydicom.Dataset, path: Path) -> NDArray[Any]:
    try:
        return np.asarray(dataset.pixel_array)
    except (RuntimeError, NotImplementedError) as error:
        syntax = dataset.file_meta.TransferSyntaxUID
        if not syntax.is_compressed:
            raise
        raise failure("compressed", f"{path}: {syntax.name}; {shorten(error)}") from error


def is_scout(header: pydicom.Dataset) -> bool:
    """Return True if a header is that of a scout view (localizer)."""
    return "LOCALIZER" in [str(part).upper() for part in header.get("ImageType") or []]


def _check_same_plane(planes: Iterable[_Plane], name: str) -> None:
    first, *others = planes
    for other in others:
        same = (
            other.size == first.size
            and np.allclose(other.spacing, first.spacing, atol=1e-3)
            and np.allclose(other.along_row, first.along_row, atol=1e-3)
            and np.allclose(other.along_column, first.along_column, atol=1e-3)
        )
        if not same:
            raise failure(
                "slices_differ",
                f"{name}: {first.path.name} has {first.size} px of {first.spacing} mm, "
                f"{other.path.name} has {other.size} px of {other.spacing} mm, or other axes",
            )


def _drop_copies(planes: Iterable[_Plane], name: str) -> list[_Plane]:
    """Keep one of several files with the same content, such as "IM1.dcm" and "IM1 (1).dcm"."""
    kept: dict[str, _Plane] = {}
    for plane in planes:
        key = plane.instance_uid if plane.frame is None else f"{plane.instance_uid} {plane.frame}"
        first = kept.setdefault(key, plane)
        if first is not plane and file_sha256(first.path) != file_sha256(plane.path):
            raise failure(
                "slices_twice",
                f"{name}: {first.path.name} and {plane.path.name}, one slice with two contents",
            )
    return list(kept.values())


def _check_one_acquisition(planes: Sequence[_Plane], name: str) -> None:
    """Check that slices in spatial order do not alternate between acquisitions.

    Acquisitions one after the other along the patient are one volume.
    """
    for index, tag in enumerate(SOURCE_TAGS):
        values = [plane.sources[index] for plane in planes]
        num_runs = 1 + sum(value != before for before, value in pairwise(values))
        if num_runs > (num_sources := len(set(values))):
            found = f"{name}: {num_sources} values of {tag} that alternate along the slices"
            raise failure("slices_mixed", found)


def _find_padding(header: pydicom.Dataset, stored: NDArray[Any]) -> NDArray[np.bool_] | None:
    """Find the pixels outside the field of view, which PixelPaddingValue marks.

    Returns:
        A mask like `stored`; None without padding. Padding reaches the border of the picture; a
        value that does not is a value of tissue, and the element is wrong.
    """
    ends = [header.get(tag) for tag in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if ends[0] is None or stored.dtype.kind not in "iu":
        return None
    # Writers give the number with the sign of the pixels or without.
    low, high = sorted(
        int(np.array(int(end) & 0xFFFF, np.uint16).astype(np.int16))
        if stored.dtype.kind == "i"
        else int(end) & 0xFFFF
        for end in (ends[0], ends[0] if ends[1] is None else ends[1])
    )
    mask = (stored >= low) & (stored <= high)
    border = (mask[0], mask[-1], mask[:, 0], mask[:, -1])
    return mask if any(part.any() for part in border) else None


def _check_positions(along_mm: Sequence[float], name: str) -> float:
    """Check that sorted positions are evenly spaced, and return their distance in mm."""
    gaps = np.diff(along_mm)
    if (gaps < POSITION_TOLERANCE_MM).any():
        twice = [f"{along_mm[i]:g}" for i in np.flatnonzero(gaps < POSITION_TOLERANCE_MM).tolist()]
        raise failure("slices_twice", f"{name}: several slices at {_join_first(twice)} mm")
    step_mm = float(np.median(gaps))
    tolerance_mm = max(POSITION_TOLERANCE_MM, _STEP_TOLERANCE * step_mm)
    odd = np.flatnonzero(np.abs(gaps - step_mm) > tolerance_mm).tolist()
    if not odd:
        return float((along_mm[-1] - along_mm[0]) / len(gaps))
    between = [f"{along_mm[i]:g} and {along_mm[i + 1]:g}" for i in odd]
    multiples = gaps[odd] / step_mm
    if np.abs(gaps[odd] - np.rint(multiples) * step_mm).max() <= tolerance_mm:
        num_missing = int((np.rint(multiples) - 1).sum())
        raise failure(
            "slices_missing",
            f"{name}: {num_missing} slices missing between {_join_first(between)} mm",
        )
    raise failure(
        "slices_uneven",
        f"{name}: steps of {step_mm:g} mm, but not between {_join_first(between)} mm",
    )


def _is_tilted(first: _Plane, drift: NDArray[np.float64]) -> bool:
    """Return True if slices drift across their normal more than rounded headers do."""
    return float(np.linalg.norm(drift)) > min(MAX_TILT_MM, _MAX_TILT_PX * min(first.spacing))


def _check_one_tilt(planes: Sequence[_Plane], name: str) -> None:
    """Check that tilted slices lie on one line, so that each moves by the same step."""
    positions = np.array([plane.position for plane in planes])
    expected = np.linspace(positions[0], positions[-1], len(positions))
    off_mm = np.linalg.norm(positions - expected, axis=1)
    if (worst := float(off_mm.max())) > ALIGNMENT_TOLERANCE_MM:
        k = int(off_mm.argmax())
        found = f"{name}: {planes[k].path.name} off by {worst:.1f} mm from the line of the others"
        raise failure("slices_uneven", found)


def _join_first(parts: Sequence[str]) -> str:
    """Join the first five parts, and count the others."""
    more = f" and {len(parts) - 5} more places" if len(parts) > 5 else ""
    return ", ".join(parts[:5]) + more


def _unreadable(path: Path, error: Exception) -> ScanError:
    return failure("unreadable", f"{path}: {shorten(error) or type(error).__name__}")
