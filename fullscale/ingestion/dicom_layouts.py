"""Layouts of DICOM series with masks in separate files: 3D-IRCADb and CHAOS CT."""

# pydicom has no type annotations for the functions called here.
# mypy: allow-untyped-calls
from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fullscale.formats.dicom_files import READ_ERRORS, read_dataset
from fullscale.ingestion.names import name_case
from fullscale.ingestion.source import (
    Refused,
    Source,
    SourceCase,
    check_mask_values,
    find_overlaps,
    paint_masks,
)
from fullscale.label_names import label_key, label_name
from fullscale.scans.checks import failure
from fullscale.scans.dicom import SeriesOrder, dicom_files, order_series, read_header, read_series
from fullscale.scans.volume import Volume


def matches_ircadb(folder: Path) -> bool:
    """Return True if PATIENT_DICOM and MASKS_DICOM exist, here or one folder down."""
    return bool(_ircadb_cases(folder))


def read_ircadb(folder: Path) -> Source:
    """Read one folder per patient; each folder in MASKS_DICOM is one organ.

    Folders whose names differ only by a number at the end, such as livertumor01 and
    livertumor02, are one organ.
    """
    masks: dict[Path, dict[str, list[Path]]] = {}
    for case in _ircadb_cases(folder):
        found = defaultdict[str, list[Path]](list)
        for path in sorted(_unpacked(case / "MASKS_DICOM").iterdir()):
            if path.is_dir():
                found[label_key(label_name(re.sub(r"[\s\d]+$", "", path.name)))].append(path)
        masks[case] = dict(found)
    names = sorted({organ for found in masks.values() for organ in found})
    labels = {organ: number for number, organ in enumerate(names, start=1)}
    cases = []
    for case, organs in masks.items():
        # 3D-IRCADb-01 has the folders 3Dircadb1.1 to 3Dircadb1.20, 3D-IRCADb-02 3Dircadb2.1.
        number = re.fullmatch(r"(?:3Dircadb1\.)?([1-9]\d*)", case.name)
        origin = f"ircadb_{int(number[1]):02d}" if number else f"ircadb_{case.name}"
        name = name_case(origin)
        scan = dicom_files(_unpacked(case / "PATIENT_DICOM"))
        drawn = {labels[organ]: tuple(paths) for organ, paths in organs.items()}
        files = (
            *scan,
            *(p for paths in drawn.values() for path in paths for p in dicom_files(path)),
        )
        organ_of = {labels[organ]: organ for organ in organs}
        load = partial(_load_ircadb, name, scan, drawn, organ_of)
        cases.append(SourceCase(name, name, tuple(organs), files, load, origin))
    kept, refused = _refuse_split(sorted(cases, key=lambda case: case.name))
    return Source(
        "ircadb",
        "3D-IRCADb",
        labels,
        tuple(kept),
        tuple(refused.cases),
        refused_files=tuple(refused.files),
        ignored_folders=("LABELLED_DICOM", "MESHES_VTK"),
    )


def _ircadb_cases(folder: Path) -> list[Path]:
    return [
        path
        for path in (folder, *sorted(folder.glob("*")))
        if (path / "PATIENT_DICOM").is_dir() and (path / "MASKS_DICOM").is_dir()
    ]


def _unpacked(folder: Path) -> Path:
    """Return the folder of its own name in a folder, as some programs unpack PATIENT_DICOM.zip."""
    inner = folder / folder.name
    return inner if inner.is_dir() else folder


def _load_ircadb(
    name: str,
    files: Sequence[Path],
    masks: Mapping[int, Sequence[Path]],
    names: Mapping[int, str],
) -> tuple[Volume, Volume]:
    order = order_series(files, name)
    scan = read_series(order, name)
    packed = {}
    for label_id, folders in masks.items():
        drawn = np.zeros(order.geometry.own_shape, dtype=bool, order="F")
        for folder in folders:
            drawn |= _read_mask_folder(folder, order)
        packed[label_id] = np.packbits(order.to_canonical(drawn))
    painted = paint_masks(packed, scan.values_ZYX.shape)
    return scan, Volume(painted, scan.geometry, (), find_overlaps(packed, painted, names))


def _read_mask_folder(folder: Path, order: SeriesOrder) -> NDArray[np.bool_]:
    """Read one mask (columns, rows, slices); its files have the names of their slices."""
    drawn = np.zeros(order.geometry.own_shape, dtype=bool, order="F")
    values = set[int]()
    for k, slice_file in enumerate(order.files):
        path = folder / slice_file.name
        if not path.is_file():
            raise failure("file_missing", f"no mask {path}")
        try:
            plane = read_dataset(path).pixel_array
        except READ_ERRORS as error:
            raise failure("unreadable", f"{path}: {error}") from error
        if plane.shape != order.geometry.own_shape[1::-1]:
            raise failure("shape_differs", f"{path}: {plane.shape} px")
        values.update(np.unique(plane).tolist())
        drawn[..., k] = plane.T > 0
    check_mask_values(values, str(folder))
    known = {path.name for path in order.files}
    if extra := [path.name for path in dicom_files(folder) if path.name not in known]:
        raise failure("file_missing", f"no slice for the masks {', '.join(extra[:5])} of {folder}")
    return drawn


def _refuse_split(cases: Sequence[SourceCase]) -> tuple[list[SourceCase], Refused]:
    """Refuse cases whose first slices are of one series: each would be a part of a scan."""
    uids = {case.name: _series_uid(case.files[:1]) for case in cases}
    counts = Counter(uids.values())
    kept, refused = list[SourceCase](), Refused()
    for case in cases:
        if uids[case.name] and counts[uids[case.name]] > 1:
            others = [name for name, uid in uids.items() if uid == uids[case.name]]
            error = failure("series_split", f"one series in the cases {', '.join(others)}")
            refused.add(case.name, error, case.files)
        else:
            kept.append(case)
    return kept, refused


def _series_uid(files: Sequence[Path]) -> str:
    """Return the SeriesInstanceUID of the first file; an empty text if it has none."""
    try:
        return str(read_header(files[0]).get("SeriesInstanceUID", "")) if files else ""
    except READ_ERRORS:
        return ""  # reading the case reports the file


def matches_chaos(folder: Path) -> bool:
    """Return True if DICOM_anon and Ground exist, here or up to two folders down."""
    return bool(_chaos_cases(folder))


def read_chaos(folder: Path) -> Source:
    """Read one folder per patient; the n-th picture belongs to the n-th slice by file name."""
    cases = []
    for case in _chaos_cases(folder):
        # The published folders are CT/1, CT/2, ...; another CT2/1 is another patient.
        place = case.relative_to(folder).as_posix() if case != folder else case.resolve().name
        origin = f"chaos_{place.removeprefix('CT/')}"
        name = name_case(origin)
        scan = dicom_files(_unpacked(case / "DICOM_anon"))
        pictures = tuple(
            path
            for path in sorted(_unpacked(case / "Ground").iterdir())
            if path.suffix.lower() == ".png" and not path.name.startswith(".")
        )
        load = partial(_load_chaos, name, scan, pictures)
        cases.append(SourceCase(name, name, ("liver",), (*scan, *pictures), load, origin))
    kept, refused = _refuse_split(cases)
    return Source(
        "chaos",
        "CHAOS CT",
        {"liver": 1},
        tuple(kept),
        tuple(refused.cases),
        refused_files=tuple(refused.files),
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
        raise failure("file_missing", f"{name}: {len(files)} slices, {len(pictures)} pictures")
    order = order_series(files, name)
    picture_of = dict(zip(files, pictures, strict=True))
    drawn = np.zeros(order.geometry.own_shape, dtype=np.uint8, order="F")
    values = set[int]()
    for k, path in enumerate(order.files):
        plane = _read_picture(picture_of[path])
        if plane.shape != drawn.shape[1::-1]:
            raise failure("shape_differs", f"{picture_of[path]}: {plane.shape} px")
        values.update(np.unique(plane).tolist())
        drawn[..., k] = plane.T > 0
    check_mask_values(values, f"pictures of {name}")
    scan = read_series(order, name)
    return scan, Volume(order.to_canonical(drawn), order.scan_geometry)


def _read_picture(path: Path) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("L"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise failure("unreadable", f"{path}: {error}") from error
