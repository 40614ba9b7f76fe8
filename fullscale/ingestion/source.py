"""The common form of all layouts: cases with name, patient, annotated labels and a reader."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fullscale.formats.itk_files import data_files, header_path
from fullscale.ingestion.names import name_case
from fullscale.label_names import label_key
from fullscale.runtime.errors import ScanError
from fullscale.scans.checks import Finding, failure
from fullscale.scans.cohort import IGNORED_ID
from fullscale.scans.geometry import check_aligned
from fullscale.scans.volume import READ_ERRORS, Volume, open_nifti, read_image, read_labels


@dataclass(frozen=True)
class SourceCase:
    """One case of a source.

    Attributes:
        name: result of `name_case`, unique in the source after `read_source`.
        patient: identifier of the patient.
        annotated: names of the labels drawn in this case.
        files: all files of the case, for its checksum.
        load: reads scan and label map on one grid, with the source's label ids.
        origin: name in the source, where `name` is another.
        patient_id: PatientID of the DICOM header, to find the patient's other cases; empty if
            unknown. It is never written, and not part of the object's text.
        doubts: code and values found of the checks that the source's tables failed.
        ignored: label id of voxels that nobody judged; 0 if the source has none.
    """

    name: str
    patient: str
    annotated: tuple[str, ...]
    files: tuple[Path, ...]
    load: Callable[[], tuple[Volume, Volume]]
    origin: str = ""
    patient_id: str = field(default="", repr=False)
    doubts: tuple[tuple[str, str], ...] = ()
    ignored: int = 0


@dataclass(frozen=True)
class Source:
    """A folder of annotated scans in some layout.

    Attributes:
        layout: key of `fullscale.ingestion.layouts.LAYOUTS`.
        name: name of the dataset.
        labels: label id by name, without background.
        cases: usable cases, sorted by name.
        refused: cases that cannot be used, as (case, reason).
        licence: licence that the source states.
        reference: publication that the source states.
        refused_files: files of the refused cases.
        left_out: reason for each file that the layout leaves out on purpose.
        ignored_folders: names of folders that belong to the layout and hold no annotated scan.
        unread: files that belong to no case; `findings` names them by folder.
        findings: warnings and notes that belong to no case, such as files that were not read.
    """

    layout: str
    name: str
    labels: dict[str, int]
    cases: tuple[SourceCase, ...]
    refused: tuple[tuple[str, ScanError], ...] = ()
    licence: str = ""
    reference: str = ""
    refused_files: tuple[Path, ...] = ()
    left_out: Mapping[Path, str] = field(default_factory=dict)
    ignored_folders: tuple[str, ...] = ()
    unread: tuple[Path, ...] = ()
    findings: tuple[Finding, ...] = ()


@dataclass
class Refused:
    """Cases of a source that cannot be used, as (case, reason), and their files.

    Attributes:
        cases: case and reason.
        files: files of these cases.
        left_out: reason for each file that is left out, such as a copy of another.
    """

    cases: list[tuple[str, ScanError]] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    left_out: dict[Path, str] = field(default_factory=dict)

    def add(self, name: str, error: ScanError, files: Iterable[Path]) -> None:
        """Refuse one case."""
        self.cases.append((name, error))
        self.files += files

    def drop_copies(self, paths: Sequence[Path]) -> list[Path]:
        """Return files of one part of a case, and of those with one content the first only.

        Compression makes no other content: ct.nii is a copy of the ct.nii.gz that it came from.
        """
        if len(paths) < 2:
            return list(paths)
        first: dict[str, Path] = {}
        for path in paths:
            kept = first.setdefault(_content_sha256(path), path)
            if kept is not path:
                self.left_out[path] = f"a copy of {kept.name}"
        return list(first.values())


def _content_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's uncompressed bytes; its path if they cannot be read."""
    try:
        with open_nifti(path) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
    except READ_ERRORS:
        return str(path)


def nifti_case(
    name: str, patient: str, annotated: Sequence[str], image: Path, label: Path
) -> SourceCase:
    """Return a case of one NIfTI scan and one NIfTI label map.

    Args:
        name: name in the source.
        patient: identifier of the patient; empty for one with this case only.
        annotated: names of the labels drawn.
        image: file of the scan.
        label: file of the label map.
    """
    safe = name_case(name)
    load = partial(_load_pair, safe, image, label)
    files = (*_with_data(image), *_with_data(label))
    return SourceCase(safe, patient or safe, tuple(annotated), files, load, name)


def masks_case(
    name: str, image: Path, masks: Mapping[str, Path], labels: Mapping[str, int]
) -> SourceCase:
    """Return a case of one NIfTI scan and one NIfTI mask per organ.

    Args:
        name: name in the source; the patient has the name of the case.
        image: file of the scan.
        masks: mask file by label name.
        labels: label id by name.
    """
    files = tuple(each for path in (image, *masks.values()) for each in _with_data(path))
    safe = name_case(name)
    by_id = {labels[key]: path for key, path in masks.items()}
    load = partial(_load_masks, safe, image, by_id, {labels[key]: key for key in masks})
    return SourceCase(safe, safe, tuple(masks), files, load, name)


def _with_data(path: Path) -> tuple[Path, ...]:
    """Return a file of a scan, and the files in which its header says that the voxels are."""
    path = header_path(path)
    try:
        return (path, *data_files(path))
    except (OSError, ValueError):
        return (path,)  # reading the case reports the file


def check_mask_values(values: Iterable[int], name: str) -> None:
    """Check that the mask of one organ has one value beside 0.

    Raises:
        ScanError: it has several, so it may show several organs.
    """
    if len(drawn := sorted({value for value in values if value})) > 1:
        raise failure("mask_values", f"{name}: {', '.join(str(value) for value in drawn[:10])}")


def without_ignored(ids_ZYX: NDArray[np.uint8], ignored: int = IGNORED_ID) -> NDArray[np.uint8]:
    """Return a label map with background in place of the voxels that nobody judged.

    Args:
        ids_ZYX: label ids.
        ignored: id of these voxels; 0 if there are none.
    """
    if not ignored:
        return ids_ZYX
    return np.where(ids_ZYX == ignored, np.uint8(0), ids_ZYX)


def rename_labels(source: Source, known: Iterable[str]) -> Source:
    """Return the source with its labels spelled as the cohort spells them, and a note of each.

    Args:
        source: result of `read_source`.
        known: names of the cohort's labels.
    """
    spelled = {label_key(name): name for name in known}
    new = {name: spelled.get(label_key(name), name) for name in source.labels}
    notes = [
        Finding.from_check("labels", "label_spelling", f"{name!r}, which is {new[name]!r} here")
        for name in source.labels
        if new[name] != name
    ]
    return replace(
        source,
        labels={new[name]: value for name, value in source.labels.items()},
        cases=tuple(
            replace(case, annotated=tuple(new.get(name, name) for name in case.annotated))
            for case in source.cases
        ),
        findings=(*source.findings, *notes),
    )


def find_overlaps(
    masks: Mapping[int, NDArray[np.uint8]], painted: NDArray[np.uint8], names: Mapping[int, str]
) -> tuple[tuple[str, str], ...]:
    """Return code and finding for each mask that lost voxels to smaller masks.

    Args:
        masks: as for `paint_masks`.
        painted: its result.
        names: name of each label id.
    """
    found = []
    for label_id, packed in masks.items():
        mask = np.unpackbits(packed, count=painted.size).reshape(painted.shape).view(bool)
        takers = np.bincount(painted[mask], minlength=256)
        takers[label_id] = 0
        if num_lost := int(takers.sum()):
            total = int(np.bitwise_count(packed).sum())
            to = ", ".join(names[int(other)] for other in np.argsort(-takers) if takers[other])
            found.append(
                ("label_overlap", f"{names[label_id]}: {num_lost} of {total} voxels went to {to}")
            )
    return tuple(found)


def paint_masks(
    masks: Mapping[int, NDArray[np.uint8]], shape: tuple[int, ...]
) -> NDArray[np.uint8]:
    """Merge masks that may overlap into one label map; the smaller mask wins.

    So a tumour stays visible on its organ.

    Args:
        masks: mask by label id, packed by `numpy.packbits` so that 100 organs fit in memory.
        shape: shape of the result.
    """
    painted = np.zeros(shape, dtype=np.uint8)
    num_voxels = int(np.prod(shape))
    sizes = {key: int(np.bitwise_count(mask).sum()) for key, mask in masks.items()}
    for label_id in sorted(masks, key=lambda key: (-sizes[key], key)):
        mask = np.unpackbits(masks[label_id], count=num_voxels).reshape(shape)
        np.copyto(painted, np.uint8(label_id), where=mask.view(bool))
    return painted


def _load_pair(name: str, image: Path, label: Path) -> tuple[Volume, Volume]:
    scan, labels = read_image(image), read_labels(label)
    check_aligned(scan.geometry, labels.geometry, name)
    return scan, Volume(labels.values_ZYX, scan.geometry, labels.text_fields)


def _load_masks(
    name: str, image: Path, files: Mapping[int, Path], names: Mapping[int, str]
) -> tuple[Volume, Volume]:
    scan = read_image(image)
    masks, text_fields = {}, set[str]()
    for label_id, path in files.items():
        mask = read_labels(path)
        check_aligned(scan.geometry, mask.geometry, f"{name}, {path.name}")
        text_fields.update(mask.text_fields)
        counts = np.bincount(mask.values_ZYX.ravel(), minlength=256)
        check_mask_values(np.flatnonzero(counts).tolist(), f"{name}, {path.name}")
        masks[label_id] = np.packbits(mask.values_ZYX > 0)
    painted = paint_masks(masks, scan.values_ZYX.shape)
    overlaps = find_overlaps(masks, painted, names)
    return scan, Volume(painted, scan.geometry, tuple(sorted(text_fields)), overlaps)
