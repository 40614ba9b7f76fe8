"""Layouts of DICOM series: 3D-IRCADb, CHAOS CT, and series with DICOM segmentations."""

# pydicom's data sets and highdicom carry no types for what is called here.
# mypy: allow-untyped-calls
from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray

from scans.checks import failure
from scans.dicom import (
    CT_CLASSES,
    READ_ERRORS,
    SeriesOrder,
    dicom_files,
    is_dicom,
    order_series,
    read_header,
    read_series,
)
from scans.errors import ScanError
from scans.source import Source, SourceCase, paint_masks, safe_name
from scans.volume import Volume

SEG_CLASS = "1.2.840.10008.5.1.4.1.1.66.4"


def matches_ircadb(folder: Path) -> bool:
    """Whether there are PATIENT_DICOM and MASKS_DICOM, here or one folder down."""
    return bool(_ircadb_cases(folder))


def read_ircadb(folder: Path) -> Source:
    """One folder per patient; each folder in MASKS_DICOM is one organ.

    Folders that differ by a number at the end, such as livertumor01, are one organ.
    """
    masks: dict[Path, dict[str, list[Path]]] = {}
    for case in _ircadb_cases(folder):
        found = defaultdict[str, list[Path]](list)
        for path in sorted((case / "MASKS_DICOM").iterdir()):
            if path.is_dir():
                found[re.sub(r"[\s\d]+$", "", path.name).lower()].append(path)
        masks[case] = dict(found)
    names = sorted({organ for found in masks.values() for organ in found})
    labels = {organ: number for number, organ in enumerate(names, start=1)}
    cases = []
    for case, organs in masks.items():
        number = re.search(r"(\d+)$", case.name)
        name = f"ircadb_{int(number[1]):02d}" if number else safe_name(case.name)
        scan = dicom_files(case / "PATIENT_DICOM")
        drawn = {labels[organ]: tuple(paths) for organ, paths in organs.items()}
        files = (
            *scan,
            *(p for paths in drawn.values() for path in paths for p in dicom_files(path)),
        )
        load = partial(_load_ircadb, name, scan, drawn)
        cases.append(SourceCase(name, name, tuple(organs), files, load))
    return Source("ircadb", "3D-IRCADb", labels, tuple(sorted(cases, key=lambda case: case.name)))


def _ircadb_cases(folder: Path) -> list[Path]:
    return [
        path
        for path in (folder, *sorted(folder.glob("*")))
        if (path / "PATIENT_DICOM").is_dir() and (path / "MASKS_DICOM").is_dir()
    ]


def _load_ircadb(
    name: str, files: Sequence[Path], masks: Mapping[int, Sequence[Path]]
) -> tuple[Volume, Volume]:
    order = order_series(files, name)
    scan = read_series(order, name)
    packed = {}
    for label_id, folders in masks.items():
        drawn = np.zeros(order.geometry.own_shape, dtype=bool, order="F")
        for folder in folders:
            drawn |= _read_mask_folder(folder, order)
        packed[label_id] = np.packbits(order.geometry.to_canonical(drawn))
    painted = paint_masks(packed, scan.values_ZYX.shape)
    return scan, Volume(painted, scan.geometry)


def _read_mask_folder(folder: Path, order: SeriesOrder) -> NDArray[np.bool_]:
    """Masks lie in files named as the slices they belong to."""
    drawn = np.zeros(order.geometry.own_shape, dtype=bool, order="F")
    for k, slice_file in enumerate(order.files):
        path = folder / slice_file.name
        if not path.is_file():
            raise failure("file_missing", f"no mask {path}")
        try:
            plane = pydicom.dcmread(path).pixel_array
        except READ_ERRORS as error:
            raise failure("unreadable", f"{path}: {error}") from error
        if plane.shape != order.geometry.own_shape[1::-1]:
            raise failure("shape_differs", f"{path}: {plane.shape} px")
        drawn[..., k] = plane.T > 0
    return drawn


def matches_chaos(folder: Path) -> bool:
    """Whether there are DICOM_anon and Ground, here or up to two folders down."""
    return bool(_chaos_cases(folder))


def read_chaos(folder: Path) -> Source:
    """One folder per patient; the n-th picture belongs to the n-th slice by file name."""
    cases = []
    for case in _chaos_cases(folder):
        name = f"chaos_{safe_name(case.name)}"
        scan = dicom_files(case / "DICOM_anon")
        pictures = tuple(sorted((case / "Ground").glob("*.png")))
        load = partial(_load_chaos, name, scan, pictures)
        cases.append(SourceCase(name, name, ("liver",), (*scan, *pictures), load))
    return Source(
        "chaos",
        "CHAOS CT",
        {"liver": 1},
        tuple(cases),
        licence="CC BY-SA 4.0",
        reference="Kavur et al., CHAOS Challenge, Medical Image Analysis 2021",
    )


def _chaos_cases(folder: Path) -> list[Path]:
    return [
        path
        for path in (folder, *sorted(folder.glob("*")), *sorted(folder.glob("*/*")))
        if (path / "DICOM_anon").is_dir() and (path / "Ground").is_dir()
    ]


def _load_chaos(
    name: str, files: Sequence[Path], pictures: Sequence[Path]
) -> tuple[Volume, Volume]:
    if len(files) != len(pictures):
        raise failure("shape_differs", f"{name}: {len(files)} slices, {len(pictures)} pictures")
    order = order_series(files, name)
    picture_of = dict(zip(files, pictures, strict=True))
    drawn = np.zeros(order.geometry.own_shape, dtype=np.uint8, order="F")
    for k, path in enumerate(order.files):
        plane = _read_picture(picture_of[path])
        if plane.shape != drawn.shape[1::-1]:
            raise failure("shape_differs", f"{picture_of[path]}: {plane.shape} px")
        drawn[..., k] = plane.T > 0
    scan = read_series(order, name)
    return scan, Volume(order.geometry.to_canonical(drawn), order.geometry)


def _read_picture(path: Path) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("L"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise failure("unreadable", f"{path}: {error}") from error


def matches_dicom_seg(folder: Path) -> bool:
    """Whether there is a DICOM segmentation anywhere."""
    return any(is_dicom(path) and _sop_class(path) == SEG_CLASS for path in folder.rglob("*"))


def read_dicom_seg(folder: Path) -> Source:
    """CT series anywhere, with the DICOM segmentations that refer to them.

    A patient is named after the first of his or her cases, never by an id from the header.
    """
    series, segments_of = _find_series(folder)
    names: dict[str, dict[str, list[tuple[Path, int]]]] = {}
    refused = list[tuple[str, ScanError]]()
    for uid, paths in segments_of.items():
        segments = defaultdict[str, list[tuple[Path, int]]](list)
        try:
            for path in paths:
                for number, label in _segments(path):
                    segments[label].append((path, number))
        except ScanError as error:
            refused.append((paths[0].name, error))
        else:
            names[uid] = dict(segments)
    all_labels = sorted({label for segments in names.values() for label in segments})
    labels = {label: number for number, label in enumerate(all_labels, start=1)}
    cases, case_of_patient, taken = list[SourceCase](), dict[str, str](), set[str]()
    for uid, drawn_in in sorted(names.items(), key=lambda item: str(segments_of[item[0]][0])):
        name = _free_name(segments_of[uid][0].relative_to(folder), taken)
        taken.add(name)
        if uid not in series:
            refused.append((name, failure("file_missing", f"{name}: no CT series {uid}")))
            continue
        patient_id = str(read_header(series[uid][0]).get("PatientID", "")) or name
        drawn = {labels[label]: parts for label, parts in drawn_in.items()}
        files = (*sorted(series[uid]), *sorted(segments_of[uid]))
        load = partial(_load_dicom_seg, name, tuple(series[uid]), drawn)
        patient = case_of_patient.setdefault(patient_id, name)
        cases.append(SourceCase(name, patient, tuple(drawn_in), files, load))
    return Source("dicom-seg", folder.name, labels, tuple(cases), tuple(refused))


def _find_series(folder: Path) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Files of each CT series, and segmentations by the series they refer to."""
    series = defaultdict[str, list[Path]](list)
    segmentations = defaultdict[str, list[Path]](list)
    for path in sorted(folder.rglob("*")):
        if not is_dicom(path):
            continue
        header = read_header(path)
        if str(header.get("SOPClassUID", "")) == SEG_CLASS:
            references = header.get("ReferencedSeriesSequence") or [pydicom.Dataset()]
            segmentations[str(references[0].get("SeriesInstanceUID", ""))].append(path)
        elif str(header.get("SOPClassUID", "")) in CT_CLASSES:
            series[str(header.get("SeriesInstanceUID", ""))].append(path)
    return dict(series), dict(segmentations)


def _segments(path: Path) -> list[tuple[int, str]]:
    """Number and label of each segment; labels as safe lower-case words."""
    try:
        header = read_header(path)
        return [
            (int(part.SegmentNumber), safe_name(str(part.SegmentLabel)).lower())
            for part in header.SegmentSequence
        ]
    except READ_ERRORS as error:
        if isinstance(error, ScanError):
            raise
        raise failure("unreadable", f"{path}: {error}") from error


def _load_dicom_seg(
    name: str, files: Sequence[Path], segments: Mapping[int, Sequence[tuple[Path, int]]]
) -> tuple[Volume, Volume]:
    order = order_series(files, name)
    scan = read_series(order, name)
    packed = {}
    for label_id, parts in segments.items():
        drawn = np.zeros(order.geometry.own_shape, dtype=bool, order="F")
        for path, number in parts:
            drawn |= _read_segment(path, number, order)
        packed[label_id] = np.packbits(order.geometry.to_canonical(drawn))
    return scan, Volume(paint_masks(packed, scan.values_ZYX.shape), scan.geometry)


def _read_segment(path: Path, number: int, order: SeriesOrder) -> NDArray[np.bool_]:
    """One segment on the slices it was drawn on, own axes columns, rows, slices."""
    import highdicom

    try:
        segmentation = highdicom.seg.segread(path)
        pixels = segmentation.get_pixels_by_source_instance(
            source_sop_instance_uids=list(order.instance_uids),
            segment_numbers=[number],
            assert_missing_frames_are_empty=True,
        )
    except READ_ERRORS as error:
        raise failure("unreadable", f"{path}, segment {number}: {error}") from error
    if pixels.shape[:3] != order.geometry.own_shape[::-1]:
        raise failure("shape_differs", f"{path}: {pixels.shape[:3]} voxels")
    return np.asarray(pixels[..., 0] > 0).transpose(2, 1, 0)


def _sop_class(path: Path) -> str:
    try:
        return str(read_header(path).get("SOPClassUID", ""))
    except ScanError:
        return ""


def _free_name(path: Path, taken: set[str]) -> str:
    """The top folder's name, with a number where it has several cases."""
    base = safe_name(path.parts[0] if len(path.parts) > 1 else path.stem)
    name, count = base, 1
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    return name
