"""Layouts of NIfTI files: nnU-Net, Medical Segmentation Decathlon, LiTS, TotalSegmentator."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fullscale.ingestion.source import Source, SourceCase, masks_case, nifti_case
from fullscale.runtime.errors import ScanError
from fullscale.scans.checks import failure
from fullscale.scans.cohort import (
    BACKGROUND,
    check_annotated,
    parse_labels,
    read_json,
    read_source_rows,
    split_names,
)

_NIFTI = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
_LITS_IMAGE = re.compile(r"volume-(\d+)\.nii(\.gz)?", re.IGNORECASE)
_LITS_LABEL = re.compile(r"segmentation-(\d+)\.nii(\.gz)?", re.IGNORECASE)

Pairs = dict[str, tuple[Path, Path]]
Refused = list[tuple[str, ScanError]]


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
    refused: Refused = []
    for entry in listed:
        if not isinstance(entry, dict) or not {"image", "label"} <= set(entry):
            raise failure("dataset_json", f"{folder / 'dataset.json'} with training entry {entry}")
        try:
            image, label = (_within(folder, str(entry[key])) for key in ("image", "label"))
        except ScanError as error:
            refused.append((_stem(Path(str(entry["label"]))), error))
            continue
        if not image.is_file():
            # Old nnU-Net lists the name without the channel number that the file has.
            with_channel = image.with_name(_NIFTI.sub(r"_0000\g<0>", image.name))
            image = with_channel if with_channel.is_file() else image
        found.append((image, label))
    pairs = _name_pairs(folder, found, refused)
    return _from_dataset("msd", folder, dataset, pairs, refused)


def _name_pairs(folder: Path, found: Iterable[tuple[Path, Path]], refused: Refused) -> Pairs:
    """Name each pair after its label file; after its image or their paths where names repeat."""
    counts = Counter(found)
    refused += [
        (_stem(pair[1]), failure("file_twice", f"{count} entries of {_join_paths(pair, folder)}"))
        for pair, count in counts.items()
        if count > 1
    ]
    pairs: Pairs = {}
    unnamed = [pair for pair, count in counts.items() if count == 1]
    rules: tuple[Callable[[tuple[Path, Path]], str], ...] = (
        lambda pair: _stem(pair[1]),
        lambda pair: _stem(pair[0]).removesuffix("_0000"),
        lambda pair: _NIFTI.sub("", pair[1].relative_to(folder).as_posix()),
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
    ending = str(dataset.get("file_ending", ".nii.gz"))
    images = {
        path.name.removesuffix("_0000" + ending): path
        for path in _visible(folder / "imagesTr", "*_0000" + ending)
    }
    labels = {
        path.name.removesuffix(ending): path for path in _visible(folder / "labelsTr", "*" + ending)
    }
    pairs = {
        name: (
            images.get(name, folder / "imagesTr" / f"{name}_0000{ending}"),
            labels.get(name, folder / "labelsTr" / f"{name}{ending}"),
        )
        for name in {*images, *labels}
    }
    return _from_dataset("nnunet", folder, dataset, pairs, [])


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
        found = [*images.get(number, ()), *masks.get(number, ())]
        if len(images.get(number, ())) > 1 or len(masks.get(number, ())) > 1:
            refused.append((name, failure("file_twice", _join_paths(found, folder))))
            continue
        (image,) = images.get(number, (folder / f"volume-{number}.nii",))
        (label,) = masks.get(number, (folder / f"segmentation-{number}.nii",))
        cases.append(nifti_case(name, "", tuple(labels), image, label))
    return Source(
        "lits",
        "LiTS",
        labels,
        tuple(cases),
        tuple(refused),
        licence="CC BY-NC-ND 4.0",
        reference="Bilic et al., The Liver Tumor Segmentation Benchmark (LiTS)",
    )


def matches_totalsegmentator(folder: Path) -> bool:
    """Return True if there is a <case>/ct.nii.gz next to a folder `segmentations`."""
    return any((path.parent / "segmentations").is_dir() for path in folder.glob("*/ct.nii*"))


def read_totalsegmentator(folder: Path) -> Source:
    """Read one folder per case; every file in `segmentations` is one organ."""
    masks = {
        image.parent: {
            _NIFTI.sub("", path.name): path
            for path in _visible(image.parent / "segmentations", "*.nii*")
        }
        for image in sorted(folder.glob("*/ct.nii*"))
    }
    names = sorted({organ for files in masks.values() for organ in files})
    labels = {organ: number for number, organ in enumerate(names, start=1)}
    cases, refused = list[SourceCase](), Refused()
    for case, files in masks.items():
        image = next(iter(sorted(case.glob("ct.nii*"))))
        if files:
            cases.append(masks_case(case.name, image, files, labels))
        else:
            error = failure("file_missing", f"no mask in {case / 'segmentations'}")
            refused.append((case.name, error))
    return Source("totalsegmentator", folder.name, labels, tuple(cases), tuple(refused))


def _from_dataset(
    layout: str, folder: Path, dataset: dict[str, Any], pairs: Pairs, refused: Refused
) -> Source:
    path = folder / "dataset.json"
    labels = {k: v for k, v in parse_labels(path, dataset).items() if k != BACKGROUND}
    _check_modality(path, dataset)
    if not pairs and not refused:
        raise failure("file_missing", f"{folder} without a scan")
    rows = read_source_rows(folder) or {}
    cases = list[SourceCase]()
    for name, (image, label) in sorted(pairs.items()):
        row = rows.get(name, {})
        annotated = split_names(row["annotated"]) if "annotated" in row else tuple(labels)
        try:
            check_annotated(name, annotated, {BACKGROUND: 0, **labels})
        except ScanError as error:
            refused.append((name, error))
        else:
            cases.append(nifti_case(name, row.get("patient", ""), annotated, image, label))
    return Source(
        layout,
        str(dataset.get("name", folder.name)),
        labels,
        tuple(cases),
        tuple(refused),
        str(dataset.get("licence", dataset.get("license", ""))),
        str(dataset.get("reference", "")),
    )


def _check_modality(path: Path, dataset: Mapping[str, Any]) -> None:
    channels = dataset.get("channel_names", dataset.get("modality", {"0": "CT"}))
    if not isinstance(channels, dict) or len(channels) != 1:
        raise failure("modality", f"{path} with channels {channels}")
    if (channel := str(next(iter(channels.values())))).upper() != "CT":
        raise failure("modality", f"{path} with channel {channel!r}")


def _visible(folder: Path, pattern: str) -> list[Path]:
    """Return the files of a folder in order, without hidden ones.

    Archives made on macOS hold a hidden `._NAME` for each file.
    """
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def _stem(path: Path) -> str:
    return _NIFTI.sub("", path.name)


def _within(folder: Path, name: str) -> Path:
    """Return the path that a table names.

    Raises:
        ScanError: it leaves the folder.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise failure("case_name", f"the path {name!r}, which leaves {folder}")
    return path


def _lits_files(folder: Path, pattern: re.Pattern[str]) -> dict[int, list[Path]]:
    """Return the files of each number."""
    found: dict[int, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if match := pattern.fullmatch(path.name):
            found.setdefault(int(match[1]), []).append(path)
    return found


def _join_paths(paths: Iterable[Path], folder: Path) -> str:
    return " and ".join(str(path.relative_to(folder)) for path in paths)
