"""Layouts of NIfTI files: nnU-Net, Medical Segmentation Decathlon, LiTS, TotalSegmentator."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unicodedata import normalize

from fullscale.ingestion.source import Refused, Source, SourceCase, masks_case, nifti_case
from fullscale.label_names import label_key, label_name
from fullscale.runtime.errors import ScanError
from fullscale.scans.checks import Finding, failure
from fullscale.scans.cohort import (
    BACKGROUND,
    IGNORE,
    check_annotated,
    is_cohort,
    parse_labels,
    read_json,
    read_source_rows,
    split_names,
)

_SCAN_FILE = re.compile(r"\.(nii(\.gz)?|nrrd|nhdr|mha|mhd|hdr|img)$", re.IGNORECASE)
_CT = re.compile(r"ct\.(nii(\.gz)?|nrrd|mha|mhd)", re.IGNORECASE)
_LITS_IMAGE = re.compile(r"volume-(\d+)\.nii(\.gz)?", re.IGNORECASE)
_LITS_LABEL = re.compile(r"segmentation-(\d+)\.nii(\.gz)?", re.IGNORECASE)

Pairs = dict[str, tuple[Path, Path]]


def matches_msd(folder: Path) -> bool:
    """Return True if dataset.json lists pairs under `training`."""
    if not (folder / "dataset.json").is_file():
        return False
    return bool(read_json(folder / "dataset.json").get("training"))


def read_msd(folder: Path) -> Source:
    """Read the pairs that dataset.json lists, as in the Decathlon and in old nnU-Net folders."""
    dataset = read_json(folder / "dataset.json")
    listed = dataset.get("training")
    if not isinstance(listed, list):
        raise failure("dataset_json", f"{folder / 'dataset.json'} without a list `training`")
    found = list[tuple[Path, Path]]()
    refused = Refused()
    for entry in listed:
        told = [entry.get(key) for key in ("image", "label")] if isinstance(entry, dict) else []
        parts = [part for part in told if isinstance(part, str)]
        if len(parts) < 2:
            raise failure("dataset_json", f"{folder / 'dataset.json'} with training entry {entry}")
        try:
            image, label = (_within(folder, part) for part in parts)
        except ScanError as error:
            refused.add(_stem(Path(parts[1])), error, ())
            continue
        if not image.is_file():
            # Old nnU-Net lists the name without the channel number that the file has.
            with_channel = image.with_name(_SCAN_FILE.sub(r"_0000\g<0>", image.name))
            image = with_channel if with_channel.is_file() else image
        found.append((image, label))
    return _from_dataset("msd", folder, dataset, _name_pairs(folder, found), refused)


def _name_pairs(folder: Path, found: Iterable[tuple[Path, Path]]) -> Pairs:
    """Name each pair after its label file; after its image or their paths where names repeat.

    A pair that is listed twice is one pair.
    """
    pairs: Pairs = {}
    unnamed = list(dict.fromkeys(found))
    rules: tuple[Callable[[tuple[Path, Path]], str], ...] = (
        lambda pair: _stem(pair[1]),
        lambda pair: _stem(pair[0]).removesuffix("_0000"),
        lambda pair: _SCAN_FILE.sub("", pair[1].relative_to(folder).as_posix()),
        lambda pair: _join_paths(pair, folder),
    )
    for rule in rules:
        names = {pair: rule(pair) for pair in unnamed}
        uses = Counter(names.values())
        named = {
            name: pair for pair, name in names.items() if uses[name] == 1 and name not in pairs
        }
        pairs |= named
        unnamed = [pair for pair in unnamed if names[pair] not in named]
    return pairs


def matches_nnunet(folder: Path) -> bool:
    """Return True if dataset.json and imagesTr exist."""
    return (folder / "dataset.json").is_file() and (folder / "imagesTr").is_dir()


def read_nnunet(folder: Path) -> Source:
    """Read the pairs of equal name in imagesTr and labelsTr; missing files are found later."""
    dataset = read_json(folder / "dataset.json")
    ending = "." + str(dataset.get("file_ending") or "nii.gz").lstrip(".")
    images = _files_by_name(folder / "imagesTr", "_0000" + ending)
    labels = _files_by_name(folder / "labelsTr", ending)
    pairs: Pairs = {}
    refused = Refused()
    for name in {*images, *labels}:
        found = (
            refused.drop_copies(images.get(name, [folder / "imagesTr" / f"{name}_0000{ending}"])),
            refused.drop_copies(labels.get(name, [folder / "labelsTr" / f"{name}{ending}"])),
        )
        if _is_twice(name, found, folder, refused):
            continue
        pairs[name] = (found[0][0], found[1][0])
    return _from_dataset("nnunet", folder, dataset, pairs, refused)


def matches_lits(folder: Path) -> bool:
    """Return True if any subfolder holds a volume-N.nii or volume-N.nii.gz."""
    return any(_LITS_IMAGE.fullmatch(path.name) for path in folder.rglob("*.*"))


def read_lits(folder: Path) -> Source:
    """Read volumes and segmentations of the same number, in any folders."""
    images, masks = _lits_files(folder, _LITS_IMAGE), _lits_files(folder, _LITS_LABEL)
    if not images:
        raise failure("file_missing", f"{folder} without volume-N.nii or volume-N.nii.gz")
    labels = {"liver": 1, "tumour": 2}
    cases, refused = list[SourceCase](), Refused()
    for number in sorted({*images, *masks}):
        name = f"lits_{number:03d}"
        found = (
            refused.drop_copies(images.get(number, [folder / f"volume-{number}.nii"])),
            refused.drop_copies(masks.get(number, [folder / f"segmentation-{number}.nii"])),
        )
        if not _is_twice(name, found, folder, refused):
            cases.append(nifti_case(name, "", tuple(labels), found[0][0], found[1][0]))
    return Source(
        "lits",
        "LiTS",
        labels,
        tuple(cases),
        tuple(refused.cases),
        licence="CC BY-NC-ND 4.0",
        reference="Bilic et al., The Liver Tumor Segmentation Benchmark (LiTS)",
        refused_files=tuple(refused.files),
        left_out=refused.left_out,
    )


def matches_totalsegmentator(folder: Path) -> bool:
    """Return True if there is a <case>/ct.nii.gz next to a folder `segmentations`."""
    return any(_ct_files(case) for case in folder.glob("*") if (case / "segmentations").is_dir())


def read_totalsegmentator(folder: Path) -> Source:
    """Read one folder per case; every file in `segmentations` is one organ.

    Organs whose file names differ in letter case only are one organ.
    """
    masks: dict[Path, dict[str, list[Path]]] = {}
    refused = Refused()
    for case in sorted(path for path in folder.glob("*") if path.is_dir()):
        if _ct_files(case) or (case / "segmentations").is_dir():
            found = masks.setdefault(case, {})
            for path in _visible(case / "segmentations"):
                if _organ(path) == BACKGROUND:
                    refused.left_out[path] = "a mask of the background"
                elif _SCAN_FILE.search(path.name):
                    found.setdefault(label_key(_organ(path)), []).append(path)
    spelled = {label_key(_organ(path)): _organ(path) for path in _sorted_by_name(masks.values())}
    labels = {organ: number for number, organ in enumerate(sorted(spelled.values()), start=1)}
    cases = list[SourceCase]()
    for case, files in masks.items():
        images = refused.drop_copies(_ct_files(case))
        files = {key: refused.drop_copies(paths) for key, paths in files.items()}
        if _is_twice(case.name, (images, *files.values()), folder, refused):
            continue
        if images and files:
            drawn = {spelled[key]: paths[0] for key, paths in sorted(files.items())}
            cases.append(masks_case(case.name, images[0], drawn, labels))
        else:
            missing = f"mask in {case / 'segmentations'}" if images else f"ct.nii.gz in {case}"
            refused.add(case.name, failure("file_missing", f"no {missing}"), _visible(case, "**"))
    return Source(
        "totalsegmentator",
        folder.name,
        labels,
        tuple(cases),
        tuple(refused.cases),
        refused_files=tuple(refused.files),
        left_out=refused.left_out,
    )


def _ct_files(case: Path) -> list[Path]:
    return [path for path in _visible(case) if _CT.fullmatch(path.name)]


def _sorted_by_name(masks: Iterable[Mapping[str, list[Path]]]) -> list[Path]:
    """Return all masks so that of several spellings the first in the alphabet comes last."""
    paths = (path for found in masks for each in found.values() for path in each)
    return sorted(paths, key=lambda path: path.name, reverse=True)


def _from_dataset(
    layout: str, folder: Path, dataset: dict[str, Any], pairs: Pairs, refused: Refused
) -> Source:
    path = folder / "dataset.json"
    labels = {k: v for k, v in parse_labels(path, dataset).items() if k != BACKGROUND}
    spelled = {label_key(name): name for name in labels}
    if len(spelled) < len(labels):
        raise failure("dataset_json", f"{path} with two spellings of one label: {list(labels)}")
    ignored = _ignored_id(path, dataset, labels)
    _check_modality(path, dataset)
    if not pairs and not refused.cases:
        raise failure("file_missing", f"{folder} without a scan")
    table = _PatientTable(read_source_rows(folder), is_cohort=is_cohort(folder))
    cases = list[SourceCase]()
    for name, (image, label) in sorted(pairs.items()):
        try:
            row, doubts = table.take(name)
            listed = split_names(row["annotated"]) if row else tuple(labels)
            named = (spelled.get(label_key(organ), organ) for organ in listed)
            annotated = tuple(dict.fromkeys(named))
            check_annotated(name, annotated, {BACKGROUND: 0, **labels})
        except ScanError as error:
            refused.add(name, error, (image, label))
            continue
        case = nifti_case(name, row.get("patient", ""), annotated, image, label)
        cases.append(replace(case, doubts=doubts, ignored=ignored))
    return Source(
        layout,
        str(dataset.get("name", folder.name)),
        labels,
        tuple(cases),
        tuple(refused.cases),
        str(dataset.get("licence", dataset.get("license", ""))),
        str(dataset.get("reference", "")),
        refused_files=tuple(refused.files),
        left_out=refused.left_out,
        ignored_folders=("imagesTs", "labelsTs"),
        findings=(
            *table.find_unused({name for name, _ in refused.cases}),
            *_tell_regions(folder, dataset, labels),
        ),
    )


def _ignored_id(path: Path, dataset: Mapping[str, Any], labels: Mapping[str, int]) -> int:
    """Return the id by which nnU-Net marks voxels that nobody judged; 0 if there is none.

    Raises:
        ScanError: it is no id, or that of a label.
    """
    for name, value in dataset["labels"].items():
        if IGNORE in (name, value):
            marked = str(value if name == IGNORE else name)
            free = {str(i) for i in range(1, 256) if i not in labels.values()}
            if marked not in free:
                raise failure(
                    "dataset_json", f"{path} with {marked} for {IGNORE}, no id of its own"
                )
            return int(marked)
    return 0


def _tell_regions(
    folder: Path, dataset: Mapping[str, Any], labels: Mapping[str, int]
) -> Iterator[Finding]:
    """Yield a finding for each region of nnU-Net, which is several labels here."""
    name_of = {value: name for name, value in labels.items()}
    for name, value in dataset["labels"].items():
        if isinstance(value, list) and len(value) > 1:
            own = " ".join(name.split())
            ids = sorted((int(i) for i in value), key=lambda i: i != labels[own])
            parts = ", ".join(name_of[i] for i in ids)
            yield Finding.from_check(folder.name, "label_region", f"{own}: [{parts}]")


class _PatientTable:
    """The rows of a source's cases.csv, each taken by its case.

    Args:
        rows: result of `read_source_rows`.
        is_cohort: a scan without a row is not complete; the check `case_unlisted` tells of it.
    """

    def __init__(self, rows: Mapping[str, list[dict[str, str]]] | None, *, is_cohort: bool) -> None:
        self._exists = rows is not None and not is_cohort
        self._left = dict(rows or {})

    def take(self, name: str) -> tuple[dict[str, str], tuple[tuple[str, str], ...]]:
        """Return the row of a case, and the doubts about it; letter case counts only if it must.

        Raises:
            ScanError: the case has rows that contradict each other.
        """
        alike = [key for key in self._left if _plain(key) == _plain(name)]
        key = name if name in self._left or len(alike) != 1 else alike[0]
        rows = self._left.pop(key, [])
        if len(rows) > 1:
            raise failure("row_twice", f"{len(rows)} rows of case {name} that differ")
        if not rows and self._exists:
            return {}, (("row_missing", f"case {name} without a row"),)
        if rows and not rows[0]["patient"]:
            return rows[0], (("row_missing", f"the row of case {name} without a patient"),)
        return (rows[0] if rows else {}), ()

    def find_unused(self, refused: Container[str]) -> tuple[Finding, ...]:
        """Return a finding for each row of no case; `refused` names further cases."""
        return tuple(
            Finding.from_check(name or "cases.csv", "row_unused", f"a row of {name!r} without scan")
            for name in self._left
            if name not in refused
        )


def _check_modality(path: Path, dataset: Mapping[str, Any]) -> None:
    channels = dataset.get("channel_names", dataset.get("modality", {"0": "CT"}))
    if not isinstance(channels, dict) or len(channels) != 1:
        raise failure("modality", f"{path} with channels {channels}")
    if (channel := str(next(iter(channels.values())))).upper() != "CT":
        raise failure("modality", f"{path} with channel {channel!r}")


def _visible(folder: Path, pattern: str = "*") -> list[Path]:
    """Return the files of a folder in order, without hidden ones.

    Archives made on macOS hold a hidden `._NAME` for each file.
    """
    return sorted(
        path
        for path in folder.glob(pattern + "/*" if pattern == "**" else pattern)
        if not path.name.startswith(".") and not path.is_dir()
    )


def _files_by_name(folder: Path, ending: str) -> dict[str, list[Path]]:
    """Return the files with an ending in any letter case, by the rest of their names."""
    found: dict[str, list[Path]] = {}
    for path in _visible(folder):
        if path.name.lower().endswith(ending.lower()):
            name = normalize("NFC", path.name[: len(path.name) - len(ending)])
            found.setdefault(name, []).append(path)
    return found


def _is_twice(name: str, groups: Iterable[Sequence[Path]], folder: Path, refused: Refused) -> bool:
    """Refuse a case that has two files for one part of it; return True if it has."""
    groups = list(groups)
    twice = [path for paths in groups if len(paths) > 1 for path in paths]
    if twice:
        files = [path for paths in groups for path in paths]
        refused.add(name, failure("file_twice", _join_paths(twice, folder)), files)
    return bool(twice)


def _stem(path: Path) -> str:
    return _SCAN_FILE.sub("", path.name)


def _plain(name: str) -> str:
    """Return a name without letter case, and with its accents as macOS and others agree."""
    return normalize("NFC", name).casefold()


def _organ(mask: Path) -> str:
    return label_name(_stem(mask))


def _within(folder: Path, name: str) -> Path:
    """Return the path that a table names, with the accents and the "/" that it has here.

    Some programs on Windows write backslashes between folders.

    Raises:
        ScanError: it leaves the folder.
    """
    plain = name.replace("\\", "/")
    forms = (name, *(normalize(form, plain) for form in ("NFC", "NFD")))
    path = next((folder / each for each in forms if (folder / each).exists()), folder / name)
    # By name alone: a link in the folder may lead to another disk.
    if not Path(os.path.normpath(path)).is_relative_to(os.path.normpath(folder)):
        raise failure("path_outside", f"the path {name!r}, which leaves {folder}")
    return path


def _lits_files(folder: Path, pattern: re.Pattern[str]) -> dict[int, list[Path]]:
    """Return the files of each number."""
    found: dict[int, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_dir() and (match := pattern.fullmatch(path.name)):
            found.setdefault(int(match[1]), []).append(path)
    return found


def _join_paths(paths: Iterable[Path], folder: Path) -> str:
    return " and ".join(str(path.relative_to(folder)) for path in paths)
