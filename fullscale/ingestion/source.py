"""What every layout is turned into: cases with a name, a patient, annotated organs and a reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fullscale.runtime.errors import ScanError
from fullscale.scans.geometry import check_aligned
from fullscale.scans.volume import Volume, read_image, read_labels


@dataclass(frozen=True)
class SourceCase:
    """One case of a source.

    Attributes:
        name: as the source calls it; not yet known to be safe.
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
        layout: key of `fullscale.ingestion.layouts.LAYOUTS`.
        name: of the dataset.
        labels: label id by name, without background.
        cases: by name in order.
        refused: what the tables name and nothing can be made of, as (case, reason).
        licence: as the source states it.
        reference: as the source states it.
    """

    layout: str
    name: str
    labels: dict[str, int]
    cases: tuple[SourceCase, ...]
    refused: tuple[tuple[str, ScanError], ...] = ()
    licence: str = ""
    reference: str = ""


def nifti_case(
    name: str, patient: str, annotated: Sequence[str], image: Path, label: Path
) -> SourceCase:
    """A case of one NIfTI scan and one NIfTI label map."""
    load = partial(_load_pair, name, image, label)
    return SourceCase(name, patient, tuple(annotated), (image, label), load)


def masks_case(
    name: str, image: Path, masks: Mapping[str, Path], labels: Mapping[str, int]
) -> SourceCase:
    """A case of one NIfTI scan and one NIfTI mask per organ.

    Args:
        name: of the case, and of its patient.
        image: the scan.
        masks: file of each label name.
        labels: label id by name.
    """
    files = (image, *masks.values())
    load = partial(_load_masks, name, image, {labels[key]: path for key, path in masks.items()})
    return SourceCase(name, name, tuple(masks), files, load)


def paint_masks(
    masks: Mapping[int, NDArray[np.uint8]], shape: tuple[int, ...]
) -> NDArray[np.uint8]:
    """One label map from masks that may overlap; the smaller one lies on top.

    So a tumour stays visible on its organ.

    Args:
        masks: of each label id, packed by `numpy.packbits`: a hundred organs of a scan fit.
        shape: of the result.
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


def _load_masks(name: str, image: Path, files: Mapping[int, Path]) -> tuple[Volume, Volume]:
    scan = read_image(image)
    masks, text_fields = {}, set[str]()
    for label_id, path in files.items():
        mask = read_labels(path)
        check_aligned(scan.geometry, mask.geometry, f"{name}, {path.name}")
        text_fields.update(mask.text_fields)
        masks[label_id] = np.packbits(mask.values_ZYX > 0)
    painted = paint_masks(masks, scan.values_ZYX.shape)
    return scan, Volume(painted, scan.geometry, tuple(sorted(text_fields)))
