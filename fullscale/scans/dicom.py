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
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from fullscale.formats.functional_groups import get_element, get_number
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
READ_ERRORS = (Exception,)
"""On damaged bytes pydicom and highdicom raise almost any exception; catch it only around calls of
theirs."""
# SOP classes: CT Image Storage, Enhanced and Legacy Converted Enhanced CT Image Storage.
CT_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.2",
    "1.2.840.10008.5.1.4.1.1.2.1",
    "1.2.840.10008.5.1.4.1.1.2.2",
)
DIRECTORY_NAME = "DICOMDIR"  # the table of contents of a DICOM medium
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
    """

    files: tuple[Path, ...]
    instance_uids: tuple[str, ...]
    geometry: Geometry
    frames: tuple[int | None, ...]


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


def is_dicom(path: Path) -> bool:
    """Return True if a file is DICOM by content, with or without preamble, or cannot be opened.

    A file without read permission counts as DICOM, so that reading it reports the error.
    """
    if not path.is_file():
        return False
    try:
        begin = _read_begin(path)
    except OSError:
        return True
    return begin[128:] == b"DICM" or _begins_with_element(begin)


def is_damaged(path: Path) -> bool:
    """Return True if a file has the name of a slice, but its content is empty or no DICOM.

    Slices end in .dcm, or are called image_12 or by a UID, which ends in a number. Reading such a
    file reports it; leaving it out would shorten a scan in silence.
    """
    if path.name.startswith(".") or not path.is_file() or is_dicom(path):
        return False
    suffix = path.suffix.lower()
    return suffix in (".dcm", ".dicom", ".ima") or path.name[-1].isdigit()


def read_dataset(path: Path, *, with_pixels: bool = True) -> pydicom.Dataset:
    """Read a DICOM file, also one without preamble.

    Raises:
        READ_ERRORS: the file cannot be read.
    """
    force = _begins_with_element(_read_begin(path))
    dataset = pydicom.dcmread(path, stop_before_pixels=not with_pixels, force=force)
    if "TransferSyntaxUID" not in dataset.file_meta:
        is_implicit, is_little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if is_little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if is_implicit else explicit
    return dataset


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
            position, interleaved acquisitions, missing slices, uneven spacing, or a tilted gantry.
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
    _check_tilt(planes, normal, name)
    first = planes[0]
    rows, columns = first.size
    affine = np.eye(4)
    affine[:3, 0] = first.along_row * first.spacing[1] * _TO_RAS
    affine[:3, 1] = first.along_column * first.spacing[0] * _TO_RAS
    affine[:3, 2] = normal * step_mm * _TO_RAS
    affine[:3, 3] = first.position * _TO_RAS
    geometry = Geometry((columns, rows, len(planes)), affine)
    check_affine(geometry, name)
    return SeriesOrder(
        tuple(plane.path for plane in planes),
        tuple(plane.instance_uid for plane in planes),
        geometry,
        tuple(plane.frame for plane in planes),
    )


def read_series(order: SeriesOrder, name: str) -> Volume:
    """Read the pixels of a series in HU, with rescale slope and intercept applied.

    Pixels that PixelPaddingValue marks as outside the field of view become `OUTSIDE_HU`.

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
    return Volume(order.geometry.to_canonical(values), order.geometry, tuple(sorted(text_fields)))


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


def _read_begin(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(132)


def _begins_with_element(begin: bytes) -> bool:
    """Return True if bytes begin with a data element of group 2 or 8, as without a preamble."""
    if len(begin) < 8 or begin[:2] not in (b"\x02\x00", b"\x08\x00") or begin[3] != 0:
        return False
    is_explicit = begin[4:6].isalpha() and begin[4:6].isupper()
    return is_explicit or int.from_bytes(begin[4:8], "little") <= 128


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


def _check_tilt(planes: Sequence[_Plane], normal: NDArray[np.float64], name: str) -> None:
    """Check that slices are stacked along their normal, not sheared by a tilted gantry."""
    first, last = planes[0], planes[-1]
    shift = last.position - first.position
    height_mm = float(normal @ shift)
    drift_mm = float(np.linalg.norm(shift - height_mm * normal))
    if drift_mm > min(MAX_TILT_MM, _MAX_TILT_PX * min(first.spacing)):
        degrees = np.degrees(np.arctan2(drift_mm, height_mm))
        raise failure(
            "gantry_tilt",
            f"{name}: slices shifted by {drift_mm:.1f} mm between "
            f"{np.round(first.position, 2).tolist()} and {np.round(last.position, 2).tolist()}, "
            f"a tilt of {degrees:.1f} degrees",
        )


def _join_first(parts: Sequence[str]) -> str:
    """Join the first five parts, and count the others."""
    more = f" and {len(parts) - 5} more places" if len(parts) > 5 else ""
    return ", ".join(parts[:5]) + more


def _unreadable(path: Path, error: Exception) -> ScanError:
    return failure("unreadable", f"{path}: {shorten(error) or type(error).__name__}")
