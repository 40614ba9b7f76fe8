"""The layout of CT series with DICOM segmentations (SEG) or structure sets (RTSTRUCT)."""

# pydicom and highdicom have no type annotations for the functions called here.
# mypy: allow-untyped-calls
from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.uid import RTStructureSetStorage

from fullscale.formats import rtstruct
from fullscale.formats.dicom_files import (
    DIRECTORY_NAME,
    READ_ERRORS,
    is_damaged,
    is_dicom,
    read_dataset,
)
from fullscale.formats.organ_codes import is_telling, name_segment
from fullscale.ingestion.names import name_case
from fullscale.ingestion.source import Source, SourceCase, find_overlaps, paint_masks
from fullscale.label_names import label_key
from fullscale.runtime.errors import ScanError
from fullscale.runtime.files import file_sha256
from fullscale.scans.checks import failure
from fullscale.scans.cohort import BACKGROUND
from fullscale.scans.dicom import (
    CT_CLASSES,
    SeriesOrder,
    is_scout,
    order_series,
    read_header,
    read_series,
)
from fullscale.scans.volume import Volume

# SOP classes: Segmentation Storage, Label Map Segmentation Storage.
SEG_CLASSES = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
LABEL_CLASSES = (*SEG_CLASSES, str(RTStructureSetStorage))

_PLACE_TOLERANCE = 1e-2  # of positions and directions of frames, which are rounded


SegmentRef = tuple[Path, int]
"""A DICOM SEG or RTSTRUCT file, and the number of a segment or region in it."""


def matches_dicom_seg(folder: Path) -> bool:
    """Return True if any subfolder holds a DICOM segmentation or structure set."""
    for path in folder.rglob("*"):
        if is_dicom(path):
            try:
                if _text(read_header(path), "SOPClassUID") in LABEL_CLASSES:
                    return True
            except ScanError:
                continue
    return False


def read_dicom_seg(folder: Path) -> Source:
    """Read CT series in any folders, with the segmentations and structure sets of them.

    A patient is named after the first of their cases, never by an id from the header.
    """
    index = _index_folder(folder)
    names = {label for series in index.series.values() for label in series.segments}
    labels = {label: number for number, label in enumerate(sorted(names), start=1)}
    cases, case_of_patient, taken = list[SourceCase](), dict[str, str](), set[str]()
    for uid, series in sorted(index.series.items(), key=_usable_first):
        first = series.first_file.relative_to(folder)
        top = first.parts[0] if len(first.parts) > 1 else first.stem
        # Several series of one folder are told apart by the path of their first file.
        origin = top if top not in taken else first.as_posix()
        if not series.segments:
            index.left_out |= dict.fromkeys(series.files, "a CT series without a segmentation")
            continue
        taken.add(top)
        name = name_case(origin)
        files = (*series.files, *series.segmentations)
        if error := _find_fault(name, uid, series, index.damaged):
            index.refused.append((name, error))
            index.refused_files += files
            continue
        drawn = {labels[label]: parts for label, parts in series.segments.items()}
        organ_of = {labels[label]: label for label in series.segments}
        load = partial(_load, name, tuple(series.files), drawn, organ_of)
        header_id = series.patient_id
        patient = case_of_patient.setdefault(header_id, name) if header_id else name
        organs = tuple(series.segments)
        doubts = (
            *(
                ("label_joined", f"{label} in {len(parts)} segments of {parts[0][0].name}")
                for label, parts in series.segments.items()
                if len(parts) > 1
            ),
            *(("region_empty", undrawn) for undrawn in series.undrawn),
        )
        cases.append(SourceCase(name, patient, organs, files, load, origin, header_id, doubts))
    cases.sort(key=lambda case: case.name)
    damaged = [(str(path.relative_to(folder)), error) for path, error in index.damaged.items()]
    return Source(
        "dicom-seg",
        folder.name,
        labels,
        tuple(cases),
        (*index.refused, *damaged),
        refused_files=(*index.refused_files, *index.damaged),
        left_out=index.left_out,
    )


def _find_fault(
    name: str, uid: str, series: _Series, damaged: Mapping[Path, ScanError]
) -> ScanError | None:
    """Return why a series with segmentations cannot be used; None if it can."""
    if not series.files:
        return failure("file_missing", f"{name}: no CT series {uid or 'that it refers to'}")
    # A damaged file beside the slices may be one of them.
    for label, parts in series.segments.items():
        if len(readers := sorted({path for path, _ in parts})) > 1:
            places = ", ".join(f"{path.parent.name}/{path.name}" for path in readers[:5])
            return failure("label_twice", f"{name}: {label} in {places}")
    folders = {path.parent for path in series.files}
    return next((error for path, error in damaged.items() if path.parent in folders), None)


def _usable_first(item: tuple[str, _Series]) -> tuple[bool, str]:
    """Sort series by path, those with segmentations first, so that they get the plain names."""
    _, series = item
    return not (series.files and series.segments), str(series.first_file)


@dataclass
class _Series:
    """One CT series, the SEG and RTSTRUCT files that refer to it, and the segments of each label.

    `undrawn` names regions of a structure set without a contour.
    """

    files: list[Path] = field(default_factory=list)
    segmentations: list[Path] = field(default_factory=list)
    segments: dict[str, list[SegmentRef]] = field(default_factory=dict)
    undrawn: list[str] = field(default_factory=list)
    patient_id: str = ""
    frame_of_reference: str = ""

    @property
    def first_file(self) -> Path:
        return (self.segmentations or self.files)[0]


@dataclass
class _FolderIndex:
    """All CT series of a folder by SeriesInstanceUID, and the files that are not used."""

    series: defaultdict[str, _Series] = field(default_factory=lambda: defaultdict(_Series))
    refused: list[tuple[str, ScanError]] = field(default_factory=list)
    refused_files: list[Path] = field(default_factory=list)
    damaged: dict[Path, ScanError] = field(default_factory=dict)
    left_out: dict[Path, str] = field(default_factory=dict)
    series_of_instance: dict[str, str] = field(default_factory=dict)


def _index_folder(folder: Path) -> _FolderIndex:
    index = _FolderIndex()
    segmentations: dict[Path, pydicom.Dataset] = {}
    for path in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts[:-1])
        if path.name == DIRECTORY_NAME or is_hidden or not (is_dicom(path) or is_damaged(path)):
            continue
        try:
            header = read_header(path)
            kind = _text(header, "SOPClassUID")
            if kind in LABEL_CLASSES:
                segmentations[path] = header
            elif kind in CT_CLASSES and is_scout(header):
                index.left_out[path] = "a scout view"
            elif kind in CT_CLASSES:
                uid = _text(header, "SeriesInstanceUID")
                series = index.series[uid]
                series.files.append(path)
                series.frame_of_reference = _text(header, "FrameOfReferenceUID")
                index.series_of_instance[_text(header, "SOPInstanceUID")] = uid
                series.patient_id = series.patient_id or _text(header, "PatientID").strip()
            elif kind:
                index.left_out[path] = f"modality {_text(header, 'Modality') or 'unknown'}"
            else:
                raise failure("unreadable", f"{path} without SOPClassUID")
        except ScanError as error:
            index.damaged[path] = error
    # Last, because one without a reference is found by the slices it was drawn on.
    for path, header in segmentations.items():
        try:
            _add_segmentation(index, path, header)
        except ScanError as error:
            index.damaged[path] = error
    return index


def _add_segmentation(index: _FolderIndex, path: Path, header: pydicom.Dataset) -> None:
    try:
        uid = _find_series(index, header)
        segments = [each for each in _list_segments(header) if each[0] != BACKGROUND]
    except READ_ERRORS as error:
        raise failure("unreadable", f"{path}: {error}") from error
    if not segments:
        index.left_out[path] = "a segmentation or structure set without regions"
        return
    for other in index.series[uid].segmentations:
        if file_sha256(other) == file_sha256(path):
            index.left_out[path] = f"a copy of {other.name}"
            return
    index.series[uid].segmentations.append(path)
    if undrawn := [each.name for each in rtstruct.list_regions(header) if not each.is_drawn]:
        index.series[uid].undrawn.append(f"{', '.join(undrawn)} of {path.name}")
    for label, number in segments:
        if not label:
            raise failure(
                "segment_unnamed", f"{path}: segment {number} without a telling label or code"
            )
        index.series[uid].segments.setdefault(label, []).append((path, number))


def _list_segments(header: pydicom.Dataset) -> list[tuple[str, int]]:
    """Return name and number of each segment, or of each region that has a contour."""
    if _text(header, "SOPClassUID") == RTStructureSetStorage:
        return [
            (_label_name(each.name) if is_telling(each.name) else "", each.number)
            for each in rtstruct.list_regions(header)
            if each.is_drawn
        ]
    return [
        (_label_name(name_segment(part)), int(part.SegmentNumber))
        for part in header.SegmentSequence
        if int(part.SegmentNumber)  # a label map may describe its background as segment 0
    ]


def _find_series(index: _FolderIndex, header: pydicom.Dataset) -> str:
    """Return the UID of the series that a segmentation was drawn on; empty if it is not known.

    It refers to the series, or only to slices of it, or has the frame of reference of one series.
    """
    if _text(header, "SOPClassUID") == RTStructureSetStorage:
        uid, frame_of_reference = rtstruct.find_references(header)
    else:
        references = header.get("ReferencedSeriesSequence") or [pydicom.Dataset()]
        uid = _text(references[0], "SeriesInstanceUID")
        frame_of_reference = _text(header, "FrameOfReferenceUID")
    if uid:
        return uid
    for frame in header.get("PerFrameFunctionalGroupsSequence") or []:
        for derivation in frame.get("DerivationImageSequence") or []:
            for source in derivation.get("SourceImageSequence") or []:
                instance = _text(source, "ReferencedSOPInstanceUID")
                if instance in index.series_of_instance:
                    return index.series_of_instance[instance]
    alike = [
        uid
        for uid, series in index.series.items()
        if series.files and frame_of_reference and series.frame_of_reference == frame_of_reference
    ]
    return alike[0] if len(alike) == 1 else ""


def _label_name(text: str) -> str:
    """Return the name of a label: letters of any script, digits and "_", in lower case."""
    return label_key(re.sub(r"[^\w]+", "_", unicodedata.normalize("NFKC", text)))


def _load(
    name: str,
    files: Sequence[Path],
    segments: Mapping[int, Sequence[SegmentRef]],
    names: Mapping[int, str],
) -> tuple[Volume, Volume]:
    order = order_series(files, name)
    scan = read_series(order, name)
    packed = {}
    for label_id, parts in segments.items():
        drawn = np.zeros(order.geometry.own_shape, dtype=bool, order="F")
        for path, number in parts:
            drawn |= _read_segment(path, number, order)
        packed[label_id] = np.packbits(order.to_canonical(drawn))
    painted = paint_masks(packed, scan.values_ZYX.shape)
    return scan, Volume(painted, scan.geometry, (), find_overlaps(packed, painted, names))


def _read_segment(path: Path, number: int, order: SeriesOrder) -> NDArray[np.bool_]:
    """Read one segment or region as a mask (columns, rows, slices) on the grid of its series."""
    try:
        dataset = read_dataset(path)
        if _text(dataset, "SOPClassUID") != RTStructureSetStorage:
            return _read_frames(path, dataset, number, order)
        return rtstruct.read_region(
            dataset, number, order.geometry.own_affine_lps, order.geometry.own_shape
        )
    except ScanError:
        raise
    except ValueError as error:
        raise failure("contour", f"{path}, region {number}: {error}") from error
    except READ_ERRORS as error:
        raise failure("unreadable", f"{path}, region {number}: {error}") from error


def _read_frames(
    path: Path, dataset: pydicom.Dataset, number: int, order: SeriesOrder
) -> NDArray[np.bool_]:
    """Read one segment of a segmentation as a mask (columns, rows, slices).

    Its frames are placed by the slices they refer to, or by position where they refer to none.
    """
    import highdicom

    try:
        segmentation = highdicom.seg.Segmentation.from_dataset(dataset, copy=False)
        sources = _source_instances(segmentation)
    except READ_ERRORS as error:
        raise failure("unreadable", f"{path}, segment {number}: {error}") from error
    if missing := sources - set(order.instance_uids):
        raise failure(
            "slices_missing", f"{path} drawn on {len(missing)} slices that are not in the series"
        )
    try:
        if sources and order.frames[0] is None:
            pixels = segmentation.get_pixels_by_source_instance(
                source_sop_instance_uids=list(order.instance_uids),
                segment_numbers=[number],
                rescale_fractional=True,
                assert_missing_frames_are_empty=True,
            )
        else:
            pixels = _place_by_position(segmentation, number, order)
    except READ_ERRORS as error:
        raise failure("unreadable", f"{path}, segment {number}: {error}") from error
    if pixels.shape[:3] != order.geometry.own_shape[::-1]:
        raise failure("shape_differs", f"{path}: {pixels.shape[:3]} voxels")
    # A FRACTIONAL segmentation holds probabilities or occupancies, here from 0 to 1.
    return np.asarray(pixels[..., 0] >= 0.5).transpose(2, 1, 0)


def _source_instances(segmentation: Any) -> set[str]:
    """Return the SOPInstanceUIDs of the slices that all frames refer to; empty if one does not."""
    frames = segmentation.get("PerFrameFunctionalGroupsSequence") or []
    if not all(frame.get("DerivationImageSequence") for frame in frames):
        return set()
    return {str(uids[2]) for uids in segmentation.get_source_image_uids()}


def _place_by_position(segmentation: Any, number: int, order: SeriesOrder) -> NDArray[Any]:
    """Return one segment (slices, rows, columns, 1) on the grid of a series by its frames' places.

    Raises:
        READ_ERRORS: the frames do not lie on the grid of the series.
    """
    import highdicom

    own = order.geometry.own_affine_lps
    columns, rows, slices = order.geometry.own_shape
    series = highdicom.VolumeGeometry(
        own[:, [2, 1, 0, 3]], (slices, rows, columns), coordinate_system="PATIENT"
    )
    drawn = segmentation.get_volume(
        segment_numbers=[number], rescale_fractional=True, allow_missing_positions=True
    )
    placed = drawn.match_geometry(series, tol=_PLACE_TOLERANCE)
    return np.asarray(placed.array)


def _text(header: pydicom.Dataset, tag: str) -> str:
    try:
        value = header.get(tag)
        return "" if value is None else str(value)
    except READ_ERRORS as error:
        raise failure("unreadable", f"the element {tag}: {error}") from error
