"""A cohort of annotated scans on disk: the nnU-Net raw layout plus a table of cases.

data/dataset.json                  labels by name, channel_names, file_ending, numTraining
data/imagesTr/<case>_0000.nii.gz   HU
data/labelsTr/<case>.nii.gz        label ids
data/cases.csv                     one row per case: patient, annotated organs, checksums

Only this module reads and writes cases.csv, also the shorter one that a source may bring.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fullscale.runtime.files import file_sha256, write_atomically
from fullscale.scans.checks import failure

BACKGROUND = "background"
IGNORE, IGNORED_ID = "ignore", 255
"""Voxels that nobody judged: nnU-Net's name for them under `labels`, and their id in a cohort."""
FILE_ENDING = ".nii.gz"
CASE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SCAN_ENDING = re.compile(r"(_0000)?\.(nii(\.gz)?|nrrd|nhdr|mha|mhd|hdr|img)$", re.IGNORECASE)
TRAINING_ONLY = "training_only"
"""Optional column of cases.csv, "true" or "false"."""
ACCEPTED, SLICE_DIGESTS = "accepted", "slice_digests"
"""Optional columns of cases.csv, several entries separated by ";"."""
SOURCE_COLUMNS = ("case", "patient", "annotated")
"""Columns of the cases.csv that a source, such as the inbox, may bring."""


@dataclass(frozen=True)
class Case:
    """One annotated scan.

    Attributes:
        name: name of the case, safe as a file name.
        patient: identifier of the patient; several cases may share one.
        annotated: names of the labels drawn in this case. Other labels are unknown here, not
            background.
        source: origin, as "layout:dataset name".
        image: path of the scan.
        label: path of the label map.
        image_sha256: checksum of the scan's file.
        label_sha256: checksum of the label map's file.
        source_sha256: checksum of the source files and settings; empty if unknown.
        voxels_sha256: checksum of the scan's voxels in canonical order; empty if unknown.
        training_only: keep the case out of the test set, as for scans from the inbox.
        accepted: codes of the checks that it fails, and that `--accept` let pass.
        slice_digests: checksums of some of its slices, to find the scan again when it was cut.
    """

    name: str
    patient: str
    annotated: tuple[str, ...]
    source: str
    image: Path
    label: Path
    image_sha256: str
    label_sha256: str
    source_sha256: str = ""
    voxels_sha256: str = ""
    training_only: bool = False
    accepted: tuple[str, ...] = ()
    slice_digests: tuple[str, ...] = ()


_CELLS: dict[str, Callable[[Case], str]] = {
    "case": lambda case: case.name,
    "patient": lambda case: case.patient,
    "annotated": lambda case: ";".join(case.annotated),
    "source": lambda case: case.source,
    "image_sha256": lambda case: case.image_sha256,
    "label_sha256": lambda case: case.label_sha256,
    "source_sha256": lambda case: case.source_sha256,
    "voxels_sha256": lambda case: case.voxels_sha256,
}
COLUMNS = tuple(_CELLS)
_OPTIONAL: dict[str, Callable[[Case], str]] = {
    TRAINING_ONLY: lambda case: str(case.training_only).lower(),
    ACCEPTED: lambda case: ";".join(case.accepted),
    SLICE_DIGESTS: lambda case: ";".join(case.slice_digests),
}


@dataclass(frozen=True)
class Cohort:
    """A folder of annotated scans.

    Attributes:
        root: the folder.
        name: name of the dataset.
        labels: label id by name, background included.
        cases: every case, by name in order.
    """

    root: Path
    name: str
    labels: dict[str, int]
    cases: tuple[Case, ...]

    def annotated_organs(self, case: Case, organs: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
        """Return the organs annotated in a case.

        Args:
            case: a case of this cohort.
            organs: label ids of each organ. An organ counts as annotated if its first id is; the
                other ids are parts of it, such as tumours.
        """
        drawn = {self.labels[name] for name in case.annotated}
        return tuple(organ for organ, label_ids in organs.items() if label_ids[0] in drawn)


def image_path(root: Path, case: str) -> Path:
    """Return the path of a case's scan."""
    return root / "imagesTr" / f"{case}_0000{FILE_ENDING}"


def label_path(root: Path, case: str) -> Path:
    """Return the path of a case's label map."""
    return root / "labelsTr" / f"{case}{FILE_ENDING}"


def is_cohort(root: Path) -> bool:
    """Return True if a folder has a cases.csv with rows that hold checksums.

    Raises:
        ScanError: cases.csv cannot be read.
    """
    path = root / "cases.csv"
    return path.is_file() and "image_sha256" in (_read_table(path, ()) or [{}])[0]


def read_cohort(root: Path) -> Cohort:
    """Read dataset.json and cases.csv; check that the scans exist, but do not open them.

    Args:
        root: the folder, usually data/.

    Raises:
        ScanError: the folder is missing, is no cohort, or its tables contradict each other.
    """
    if not root.is_dir():
        raise failure("data_missing", f"no folder {root}")
    if missing := [n for n in ("dataset.json", "cases.csv") if not (root / n).is_file()]:
        raise failure("not_a_cohort", f"{root} without {' and '.join(missing)}")
    dataset = read_json(root / "dataset.json")
    labels = parse_labels(root / "dataset.json", dataset)
    if IGNORED_ID in labels.values():
        raise failure("labels_too_many", f"{root / 'dataset.json'} with a label {IGNORED_ID}")
    cases = []
    for row in _read_table(root / "cases.csv", COLUMNS[:6]):
        name = check_case_name(row["case"])
        annotated = split_names(row["annotated"])
        check_annotated(name, annotated, labels)
        cases.append(
            Case(
                name=name,
                patient=row["patient"],
                annotated=annotated,
                source=row["source"],
                image=image_path(root, name),
                label=label_path(root, name),
                image_sha256=row["image_sha256"],
                label_sha256=row["label_sha256"],
                source_sha256=row.get("source_sha256", ""),
                voxels_sha256=row.get("voxels_sha256", ""),
                training_only=_read_flag(root, name, row.get(TRAINING_ONLY, "")),
                accepted=split_names(row.get(ACCEPTED, "")),
                slice_digests=split_names(row.get(SLICE_DIGESTS, "")),
            )
        )
    names = [case.name for case in cases]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise failure("not_a_cohort", f"{root / 'cases.csv'} with cases twice: {', '.join(twice)}")
    for case in cases:
        for path in (case.image, case.label):
            if not path.is_file():
                raise failure("file_missing", f"case {case.name} of {root} without {path.name}")
    return Cohort(
        root,
        str(dataset.get("name", root.name)),
        labels,
        tuple(sorted(cases, key=lambda case: case.name)),
    )


def write_cases(root: Path, cases: Iterable[Case]) -> None:
    """Write cases.csv atomically, one row per case, sorted by name.

    A column of `_OPTIONAL` is written only if a case has such a value.
    """
    cases = sorted(cases, key=lambda case: case.name)
    used = {
        column: cell
        for column, cell in _OPTIONAL.items()
        if any(cell(case) not in ("", "false") for case in cases)
    }
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *used])
    writer.writerows([cell(case) for cell in (_CELLS | used).values()] for case in cases)
    write_atomically(root / "cases.csv", text.getvalue())


def read_source_rows(folder: Path) -> dict[str, list[dict[str, str]]] | None:
    """Read the cases.csv that a source may bring, with at least `SOURCE_COLUMNS`.

    Blanks around the cells do not count, nor does the ending of a file in the column case.

    Returns:
        The rows of each case, several only if they differ; None if the source has no such table.

    Raises:
        ScanError: unreadable, or a column is missing.
    """
    path = folder / "cases.csv"
    if not path.is_file():
        return None
    rows: dict[str, list[dict[str, str]]] = {}
    for cells in _read_table(path, SOURCE_COLUMNS):
        row = {column: " ".join(cells[column].split()) for column in SOURCE_COLUMNS}
        if not any(row.values()):
            continue
        row["case"] = re.sub(
            r"(_0000)?\.(nii(\.gz)?|nrrd|mha|mhd)$", "", row["case"], flags=re.IGNORECASE
        )
        row["annotated"] = ";".join(split_names(row["annotated"]))
        found = rows.setdefault(row["case"], [])
        if row not in found:
            found.append(row)
    return rows


def write_source_rows(folder: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write the cases.csv of a source atomically, with `SOURCE_COLUMNS` only."""
    text = io.StringIO()
    writer = csv.DictWriter(text, SOURCE_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(folder / "cases.csv", text.getvalue())


def _read_flag(root: Path, case: str, text: str) -> bool:
    """Parse a cell of the column training_only; an empty cell is False."""
    if text not in ("true", "false", ""):
        found = f"{root / 'cases.csv'} with {TRAINING_ONLY} {text!r} for {case}, not true or false"
        raise failure("cases_csv", found)
    return text == "true"


def parse_labels(path: Path, dataset: dict[str, Any]) -> dict[str, int]:
    """Return label id by name from the content of dataset.json, background included.

    nnU-Net writes {name: id}, the Decathlon {id: name}; both are accepted.

    Raises:
        ScanError: labels are missing, are regions, are not whole numbers from 1 to 255, or
            share an id.
    """
    found = dataset.get("labels")
    if not isinstance(found, dict):
        raise failure("dataset_json", f"{path} without a mapping `labels`")
    # Voxels to ignore are no label.
    found = {key: value for key, value in found.items() if IGNORE not in (key, value)}
    if any(isinstance(value, list | tuple) for value in found.values()):
        found = _name_regions(path, found, dataset.get("regions_class_order"))
    try:
        by_id = all(str(key).isdigit() for key in found)
        named = [(value, key) if by_id else (key, value) for key, value in found.items()]
        pairs = [(" ".join(str(name).split()), _whole(value)) for name, value in named]
    except (TypeError, ValueError, OverflowError):
        raise failure("dataset_json", f"{path} with labels {found}") from None
    labels = {name: value for name, value in pairs if value != 0}
    if len(labels) < sum(value != 0 for _, value in pairs):
        raise failure("dataset_json", f"{path} with one name for several ids: {found}")
    if not labels or min(labels.values()) < 1 or max(labels.values()) > 255:
        raise failure("dataset_json", f"{path} with labels {found}")
    if len(set(labels.values())) != len(labels):
        raise failure("dataset_json", f"{path} with one id for several labels: {found}")
    if unsafe := [name for name in labels if not name.strip() or ";" in name]:
        raise failure("dataset_json", f"{path} with label names {unsafe}")
    return {BACKGROUND: 0, **dict(sorted(labels.items(), key=lambda item: item[1]))}


def _name_regions(path: Path, found: dict[str, Any], order: Any) -> dict[str, Any]:
    """Return the id of each region of nnU-Net's `labels`, by its `regions_class_order`.

    A region is written last where it is innermost, so its id is that of the voxels of no later
    region. An organ of several ids lists all their names in params.yaml.

    Raises:
        ScanError: the order does not name one id of each region.
    """
    named = {name: value for name, value in found.items() if name != BACKGROUND}
    told = f"{path} with regions {named}, regions_class_order {order}"
    try:
        parts = [v if isinstance(v, list) else [v] for v in (*named.values(), order)]
        *regions, ids = [[_whole(each) for each in values] for values in parts]
    except (TypeError, ValueError, OverflowError):
        raise failure("label_regions", told) from None
    is_complete = len(regions) == len(ids) and {i for each in regions for i in each} == set(ids)
    if not is_complete or any(i not in region for i, region in zip(ids, regions, strict=True)):
        raise failure("label_regions", told)
    return {BACKGROUND: 0, **dict(zip(named, ids, strict=True))}


def _whole(value: Any) -> int:
    """Return an id of dataset.json; raise an error of `int` or `float` if it is not whole."""
    if int(value) != float(value):
        raise ValueError(value)
    return int(value)


def check_annotated(case: str, annotated: Iterable[str], labels: dict[str, int]) -> None:
    """Check that all annotated names are labels.

    Raises:
        ScanError: a name is unknown, or is the background.
    """
    if unknown := [name for name in annotated if name not in labels or name == BACKGROUND]:
        raise failure(
            "annotated_unknown", f"case {case} annotating {unknown}; labels are {list(labels)}"
        )


def check_case_name(name: str) -> str:
    """Return the name if it is safe as a file name.

    Raises:
        ScanError: the name does not match `CASE_NAME`.
    """
    if not CASE_NAME.fullmatch(name):
        raise failure("case_name", f"the case name {name!r}")
    return name


def split_names(text: str) -> tuple[str, ...]:
    """Return the names of a ';'-separated list, without empty ones."""
    return tuple(part.strip() for part in text.split(";") if part.strip())


def checksum(path: Path) -> str:
    """Return the SHA-256 of a scan's file.

    Raises:
        ScanError: the file is missing or cannot be read.
    """
    if not path.is_file():
        raise failure("file_missing", f"no file {path}")
    try:
        return file_sha256(path)
    except OSError as error:
        raise failure("unreadable", f"{path}: {error.strerror}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, such as dataset.json.

    Raises:
        ScanError: unreadable, or not an object.
    """
    try:
        # Notepad and Excel begin a text in UTF-8 with a byte order mark.
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise failure("dataset_json", f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise failure("dataset_json", f"{path} holding a {type(content).__name__}")
    return content


def _read_table(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """Read the rows of a CSV file.

    Raises:
        ScanError: unreadable, or a column of `columns` is missing.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, restval="", strict=True)
            reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
            if wrong := [name for name in columns if reader.fieldnames.count(name) != 1]:
                raise failure(
                    "cases_csv", f"{path} without columns {', '.join(wrong)}, or with two"
                )
            # DictReader collects surplus cells under the key None.
            return [
                {key: value for key, value in row.items() if isinstance(key, str)} for row in reader
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise failure("cases_csv", f"{path}: {error}") from error
