"""A cohort of annotated scans on disk: the nnU-Net raw layout with a table of cases beside it.

data/dataset.json                  labels by name, channel_names, file_ending, numTraining
data/imagesTr/<case>_0000.nii.gz   HU
data/labelsTr/<case>.nii.gz        label ids
data/cases.csv                     one row per case: patient, annotated organs, checksums
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fullscale.runtime.files import file_sha256, write_atomically
from fullscale.scans.checks import failure

BACKGROUND = "background"
FILE_ENDING = ".nii.gz"
CASE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
COLUMNS = (
    "case",
    "patient",
    "annotated",
    "source",
    "image_sha256",
    "label_sha256",
    "source_sha256",
    "voxels_sha256",
)
TRAINING_ONLY = "training_only"
"""Column that cases.csv has when a case is for training only; "true" or "false"."""


@dataclass(frozen=True)
class Case:
    """One annotated scan.

    Attributes:
        name: name of the case, safe as a file name.
        patient: whose scan it is; several cases may share one.
        annotated: names of the labels that were drawn in this case. What is not among them is
            unknown here, not background.
        source: where it came from, as layout and folder name.
        image: path of the scan.
        label: path of the label map.
        image_sha256: checksum of the scan's file.
        label_sha256: checksum of the label map's file.
        source_sha256: checksum of what it was made from; empty if unknown.
        voxels_sha256: checksum of the scan's voxels in canonical order; empty if unknown.
        training_only: whether it must stay out of the test set, as what landed in the inbox must.
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
        """Organs that were drawn in a case.

        Args:
            case: of this cohort.
            organs: label ids of each organ. The first is the organ itself and decides; further
                ids are parts of it, such as tumours.
        """
        drawn = {self.labels[name] for name in case.annotated}
        return tuple(organ for organ, label_ids in organs.items() if label_ids[0] in drawn)


def image_path(root: Path, case: str) -> Path:
    """Where the scan of a case lies."""
    return root / "imagesTr" / f"{case}_0000{FILE_ENDING}"


def label_path(root: Path, case: str) -> Path:
    """Where the label map of a case lies."""
    return root / "labelsTr" / f"{case}{FILE_ENDING}"


def read_cohort(root: Path) -> Cohort:
    """Read dataset.json and cases.csv; the scans themselves are not opened.

    Args:
        root: the folder, usually data/.

    Raises:
        ScanError: the folder is missing, is no cohort, or its tables contradict each other.
    """
    if not root.is_dir():
        raise failure("data_missing", f"no folder {root}")
    if not (root / "dataset.json").is_file() or not (root / "cases.csv").is_file():
        missing = [n for n in ("dataset.json", "cases.csv") if not (root / n).is_file()]
        raise failure("not_a_cohort", f"{root} without {' and '.join(missing)}")
    dataset = read_json(root / "dataset.json")
    labels = parse_labels(root / "dataset.json", dataset)
    cases = []
    for row in read_table(root / "cases.csv", COLUMNS[:6]):
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
    """Write cases.csv, whole or not at all, one row per case by name in order.

    The column training_only is written when a case is for training only.
    """
    cases = sorted(cases, key=lambda case: case.name)
    has_flags = any(case.training_only for case in cases)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, TRAINING_ONLY] if has_flags else COLUMNS)
    for case in cases:
        writer.writerow(
            [
                case.name,
                case.patient,
                ";".join(case.annotated),
                case.source,
                case.image_sha256,
                case.label_sha256,
                case.source_sha256,
                case.voxels_sha256,
                *([str(case.training_only).lower()] if has_flags else []),
            ]
        )
    write_atomically(root / "cases.csv", text.getvalue())


def _read_flag(root: Path, case: str, text: str) -> bool:
    """A cell of the column training_only; an empty one is false."""
    if text not in ("true", "false", ""):
        raise failure(
            "dataset_json",
            f"{root / 'cases.csv'} with {TRAINING_ONLY} {text!r} for {case}, not true or false",
        )
    return text == "true"


def parse_labels(path: Path, dataset: dict[str, Any]) -> dict[str, int]:
    """Label id by name from dataset.json, written either way round, background included.

    Raises:
        ScanError: labels are missing, are regions, are no whole numbers from 1 to 255, or
            share an id.
    """
    found = dataset.get("labels")
    if not isinstance(found, dict):
        raise failure("dataset_json", f"{path} without a mapping `labels`")
    try:
        if all(str(key).isdigit() for key in found):
            labels = {str(name): int(key) for key, name in found.items()}
        else:
            labels = {str(name): int(value) for name, value in found.items()}
    except (TypeError, ValueError):
        raise failure("dataset_json", f"{path} with labels {found}") from None
    labels = {name: value for name, value in labels.items() if value != 0}
    if "ignore" in labels:
        raise failure("dataset_json", f"{path} with a label `ignore`, which has no organ")
    if not labels or min(labels.values()) < 1 or max(labels.values()) > 255:
        raise failure("dataset_json", f"{path} with labels {found}")
    if len(set(labels.values())) != len(labels):
        raise failure("dataset_json", f"{path} with one id for several labels: {found}")
    if unsafe := [name for name in labels if not name.strip() or ";" in name]:
        raise failure("dataset_json", f"{path} with label names {unsafe}")
    return {BACKGROUND: 0, **dict(sorted(labels.items(), key=lambda item: item[1]))}


def check_annotated(case: str, annotated: Iterable[str], labels: dict[str, int]) -> None:
    """Refuse names that are no labels.

    Raises:
        ScanError: a name is unknown, or is the background.
    """
    unknown = [name for name in annotated if name not in labels or name == BACKGROUND]
    if unknown:
        raise failure(
            "annotated_unknown", f"case {case} annotating {unknown}; labels are {list(labels)}"
        )


def check_case_name(name: str) -> str:
    """The name itself, if it is safe as a file name.

    Raises:
        ScanError: it is not.
    """
    if not CASE_NAME.fullmatch(name):
        raise failure("case_name", f"the case name {name!r}")
    return name


def split_names(text: str) -> tuple[str, ...]:
    """Names from a ';'-separated list, empty parts dropped."""
    return tuple(part.strip() for part in text.split(";") if part.strip())


def checksum(path: Path) -> str:
    """Checksum of a file's bytes.

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
    """A JSON object.

    Raises:
        ScanError: unreadable, or something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise failure("dataset_json", f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise failure("dataset_json", f"{path} holding a {type(content).__name__}")
    return content


def read_table(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a CSV file.

    Raises:
        ScanError: unreadable, or a column of `columns` is missing.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, restval="")
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise failure("dataset_json", f"{path} without columns {', '.join(missing)}")
            return [
                {key: value for key, value in row.items() if isinstance(key, str)} for row in reader
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise failure("dataset_json", f"{path}: {error}") from error


def write_json(path: Path, content: object) -> None:
    """Write JSON that is there whole or not at all."""
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def safe_name(text: str) -> str:
    """A case name made from a folder's or file's name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_-")[:64]
