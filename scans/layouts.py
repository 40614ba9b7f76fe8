"""Layouts in which annotated scans arrive, each turned into the same description of a source.

Nothing is read here but names and tables; `SourceCase.load` opens the scan.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scans.checks import failure
from scans.cohort import (
    BACKGROUND,
    check_annotated,
    parse_labels,
    read_json,
    read_table,
    split_names,
)
from scans.volume import Volume, check_aligned, read_image, read_labels

_NIFTI = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)


@dataclass(frozen=True)
class SourceCase:
    """One case of a source.

    Attributes:
        name: as the source calls it, made safe by the layout where it can be.
        patient: whose scan it is.
        annotated: names of the labels that were drawn in this case.
        files: what it is made from, for the checksum.
        load: reads scan and label map on one grid; label ids are the source's.
    """

    name: str
    patient: str
    annotated: tuple[str, ...]
    files: tuple[Path, ...]
    load: Callable[[], tuple[Volume, Volume]]


@dataclass(frozen=True)
class Source:
    """A folder of annotated scans in some layout.

    Attributes:
        layout: key of `LAYOUTS`.
        name: of the dataset.
        labels: label id by name, without background.
        cases: by name in order.
        licence: as the source states it.
        reference: as the source states it.
    """

    layout: str
    name: str
    labels: dict[str, int]
    cases: tuple[SourceCase, ...]
    licence: str = ""
    reference: str = ""


@dataclass(frozen=True)
class Layout:
    """One way to arrange annotated scans.

    Attributes:
        name: for `--layout`.
        files: what lies where.
        notes: what a user should know.
        matches: whether a folder looks like it.
        read: describes the folder.
    """

    name: str
    files: str
    notes: str
    matches: Callable[[Path], bool] = field(repr=False)
    read: Callable[[Path], Source] = field(repr=False)


def read_source(folder: Path, layout: str | None = None) -> Source:
    """Describe a folder of annotated scans.

    Args:
        folder: the source; it is only read.
        layout: key of `LAYOUTS`; None finds out.

    Raises:
        ScanError: no such folder, an unknown layout, or tables that cannot be used.
    """
    if not folder.is_dir():
        raise failure("layout_unknown", f"no folder {folder}")
    if layout is not None:
        if layout not in LAYOUTS:
            raise failure("layout_unknown", f"the layout {layout!r}, not among {list(LAYOUTS)}")
        return LAYOUTS[layout].read(folder)
    for known in LAYOUTS.values():
        if known.matches(folder):
            return known.read(folder)
    raise failure("layout_unknown", f"none of {', '.join(LAYOUTS)} in {folder}")


def nifti_pair(
    name: str, patient: str, annotated: tuple[str, ...], image: Path, label: Path
) -> SourceCase:
    """A case of one NIfTI scan and one NIfTI label map."""

    def load() -> tuple[Volume, Volume]:
        scan, labels = read_image(image), read_labels(label)
        check_aligned(scan.geometry, labels.geometry, name)
        return scan, Volume(labels.values_ZYX, scan.geometry)

    return SourceCase(name, patient, annotated, (image, label), load)


def _matches_nnunet(folder: Path) -> bool:
    return (folder / "dataset.json").is_file() and (folder / "imagesTr").is_dir()


def _read_nnunet(folder: Path) -> Source:
    """Raw folders of nnU-Net, old and new, and of the Medical Segmentation Decathlon."""
    path = folder / "dataset.json"
    dataset = read_json(path)
    labels = {k: v for k, v in parse_labels(path, dataset).items() if k != BACKGROUND}
    channels = dataset.get("channel_names", dataset.get("modality", {"0": "CT"}))
    if not isinstance(channels, dict) or len(channels) != 1:
        raise failure("modality", f"{path} with channels {channels}")
    if str(next(iter(channels.values()))).upper() != "CT":
        raise failure("modality", f"{path} with channel {next(iter(channels.values()))!r}")
    pairs = _listed_pairs(folder, dataset) or _named_pairs(folder, dataset)
    if not pairs:
        raise failure("file_missing", f"{folder / 'imagesTr'} without a scan")
    rows = _case_rows(folder, labels)
    cases = []
    for name, (image, label) in sorted(pairs.items()):
        row = rows.get(name, {})
        annotated = split_names(row["annotated"]) if "annotated" in row else tuple(labels)
        cases.append(nifti_pair(name, row.get("patient") or name, annotated, image, label))
    return Source(
        "nnunet",
        str(dataset.get("name", folder.name)),
        labels,
        tuple(cases),
        str(dataset.get("licence", dataset.get("license", ""))),
        str(dataset.get("reference", "")),
    )


def _listed_pairs(folder: Path, dataset: dict[str, Any]) -> dict[str, tuple[Path, Path]]:
    """Pairs named by `training`; old nnU-Net leaves the channel out of the image's name there."""
    listed = dataset.get("training")
    if not isinstance(listed, list):
        return {}
    pairs = {}
    for entry in listed:
        if not isinstance(entry, dict) or not {"image", "label"} <= set(entry):
            raise failure("dataset_json", f"{folder / 'dataset.json'} with training entry {entry}")
        image, label = (_within(folder, str(entry[key])) for key in ("image", "label"))
        if not image.is_file():
            with_channel = image.with_name(_NIFTI.sub(r"_0000\g<0>", image.name))
            image = with_channel if with_channel.is_file() else image
        pairs[_NIFTI.sub("", label.name)] = (image, label)
    return pairs


def _named_pairs(folder: Path, dataset: dict[str, Any]) -> dict[str, tuple[Path, Path]]:
    ending = str(dataset.get("file_ending", ".nii.gz"))
    return {
        image.name.removesuffix("_0000" + ending): (
            image,
            folder / "labelsTr" / (image.name.removesuffix("_0000" + ending) + ending),
        )
        for image in sorted((folder / "imagesTr").glob("*_0000" + ending))
    }


def _within(folder: Path, name: str) -> Path:
    """A path that a table names, if it stays in the folder."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise failure("case_name", f"the path {name!r}, which leaves {folder}")
    return path


def _case_rows(folder: Path, labels: dict[str, int]) -> dict[str, dict[str, str]]:
    path = folder / "cases.csv"
    if not path.is_file():
        return {}
    rows = {row["case"]: row for row in read_table(path, ("case", "patient", "annotated"))}
    for name, row in rows.items():
        check_annotated(name, split_names(row["annotated"]), {BACKGROUND: 0, **labels})
    return rows


_LITS_IMAGE = re.compile(r"volume-(\d+)\.nii(\.gz)?", re.IGNORECASE)
_LITS_LABEL = re.compile(r"segmentation-(\d+)\.nii(\.gz)?", re.IGNORECASE)


def _lits_files(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for path in sorted(folder.rglob("*.nii*")):
        if match := pattern.fullmatch(path.name):
            number = int(match[1])
            if number in found:
                raise failure("layout_unknown", f"number {number} twice: {found[number]}, {path}")
            found[number] = path
    return found


def _read_lits(folder: Path) -> Source:
    images, masks = _lits_files(folder, _LITS_IMAGE), _lits_files(folder, _LITS_LABEL)
    if not images:
        raise failure("file_missing", f"{folder} without volume-N.nii or volume-N.nii.gz")
    labels = {"liver": 1, "tumour": 2}
    cases = []
    for number, image in sorted(images.items()):
        label = masks.get(number, image.with_name(image.name.replace("volume", "segmentation")))
        name = f"lits_{number:03d}"
        cases.append(nifti_pair(name, name, tuple(labels), image, label))
    return Source(
        "lits",
        "LiTS",
        labels,
        tuple(cases),
        "CC BY-NC-ND 4.0",
        "The Liver Tumor Segmentation Benchmark, Bilic et al., Medical Image Analysis 2023",
    )


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            "nnunet",
            "dataset.json, imagesTr/<case>_0000.nii.gz, labelsTr/<case>.nii.gz; or the pairs that "
            "`training` in dataset.json lists, as in the Medical Segmentation Decathlon",
            "cases.csv beside dataset.json may give case, patient and annotated",
            _matches_nnunet,
            _read_nnunet,
        ),
        Layout(
            "lits",
            "volume-N.nii[.gz] and segmentation-N.nii[.gz], in any folders",
            "labels liver = 1 and tumour = 2; the tumour is part of the liver",
            lambda folder: bool(_lits_files(folder, _LITS_IMAGE)),
            _read_lits,
        ),
    )
}
