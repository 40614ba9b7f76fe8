"""All checks on one case, and those that need to see every case."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fullscale.ingestion.source import SourceCase
from fullscale.runtime.errors import ScanError
from fullscale.scans.checks import BODY_HU, HU_AIR, HU_DENSE, MIN_SLICES, Finding
from fullscale.scans.cohort import check_case_name
from fullscale.scans.volume import Volume

MAX_LABEL_SHARE = 0.9
_COARSE_MM = 4.0
_MIN_MIRROR_VOXELS = 50
_SEAM_SLICES = 16
_MIRROR_RATIO = 1.5
_MIRROR_GAIN_HU = 15.0
_AXES = ("head to foot", "front to back", "left to right")


@dataclass(frozen=True)
class Facts:
    """What a scan is like.

    Attributes:
        shape_ZYX: voxels along each canonical axis.
        spacing_mm: distance of voxels along Z, Y, X.
        orientation: the file's own axis codes.
        hu_range: lowest and highest value.
        organ_ml: volume of each annotated label.
        voxels_sha256: checksum of the voxels in canonical order, whatever the file.
    """

    shape_ZYX: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    orientation: str
    hu_range: tuple[float, float]
    organ_ml: dict[str, float]
    voxels_sha256: str


@dataclass(eq=False)
class Inspection:
    """What the checks say about one case.

    Attributes:
        case: its name.
        patient: whose scan it is.
        findings: of the checks, none for a flawless case.
        facts: None if the files could not be read.
        scan: in HU; None if unreadable.
        labels: with the source's ids; None if unreadable.
    """

    case: str
    patient: str
    findings: list[Finding] = field(default_factory=list)
    facts: Facts | None = None
    scan: Volume | None = None
    labels: Volume | None = None

    @property
    def is_refused(self) -> bool:
        """Whether a finding keeps the case out."""
        return any(finding.severity == "refused" for finding in self.findings)


def inspect_case(case: SourceCase, labels: Mapping[str, int]) -> Inspection:
    """Read a case and run every check on it; a bad case is a finding, not an error.

    Args:
        case: to be read once.
        labels: label id by name in this source, without background.
    """
    seen = Inspection(case.name, case.patient)
    try:
        check_case_name(case.name)
        with warnings.catch_warnings(action="ignore"):  # parsers quote what may be private
            seen.scan, seen.labels = case.load()
    except ScanError as error:
        seen.findings.append(Finding.of_error(case.name, error))
        return seen
    counts = _count_ids(seen.labels)
    seen.facts = _facts(seen.scan, counts, case, labels)
    found = [
        *_check_scan(seen.scan),
        *_check_ids(counts, case, labels),
        *_check_interpolated(seen.labels),
        *_check_mirrored(seen.scan, seen.labels),
        *_check_liver_side(seen.scan, seen.labels, labels),
        *_check_text(seen.scan, seen.labels),
    ]
    seen.findings += [Finding.of(case.name, code, text) for code, text in found]
    return seen


class CrossChecks:
    """Checks that compare a case with the ones before it.

    Args:
        voxels: case names by checksum of their voxels, of cases that are known already.
        patients: case names of each patient, of cases that are known already.
    """

    def __init__(
        self,
        voxels: Mapping[str, str] | None = None,
        patients: Mapping[str, list[str]] | None = None,
    ) -> None:
        self._voxels = dict(voxels or {})
        self._patients = {patient: list(cases) for patient, cases in (patients or {}).items()}

    def check(self, case: str, patient: str, voxels_sha256: str) -> list[Finding]:
        """Findings on one more case; it is remembered unless it is refused."""
        first = self._voxels.setdefault(voxels_sha256, case)
        if first != case:
            return [Finding.of(case, "content_twice", f"{case} with the voxels of {first}")]
        others = self._patients.setdefault(patient, [])
        if case in others:
            return []
        others.append(case)
        if len(others) < 2:
            return []
        found = f"patient {patient} with cases {', '.join(others)}"
        return [Finding.of(case, "patient_shared", found)]


def _count_ids(labels: Volume) -> NDArray[np.int64]:
    """Number of voxels of each label id from 0 to 255."""
    counts = np.zeros(256, dtype=np.int64)
    for plane in labels.values_ZYX:
        counts += np.bincount(plane.ravel(), minlength=256)
    return counts


def _facts(
    scan: Volume, counts: NDArray[np.int64], case: SourceCase, labels: Mapping[str, int]
) -> Facts:
    z, y, x = scan.values_ZYX.shape
    voxel_ml = float(np.prod(scan.spacing_mm)) / 1000
    return Facts(
        shape_ZYX=(z, y, x),
        spacing_mm=scan.spacing_mm,
        orientation=scan.geometry.orientation,
        hu_range=(float(scan.values_ZYX.min()), float(scan.values_ZYX.max())),
        organ_ml={name: float(counts[labels[name]]) * voxel_ml for name in case.annotated},
        voxels_sha256=_voxels_sha256(scan),
    )


def _voxels_sha256(scan: Volume) -> str:
    digest = hashlib.sha256(repr(scan.values_ZYX.shape).encode())
    for plane in scan.values_ZYX:
        digest.update(np.ascontiguousarray(plane).data)
    return digest.hexdigest()


Found = Iterator[tuple[str, str]]


def _check_scan(scan: Volume) -> Found:
    values = scan.values_ZYX
    if len(values) < MIN_SLICES:
        yield "few_slices", f"{len(values)} axial slices"
    low, high = float(values.min()), float(values.max())
    if low > HU_AIR or high < HU_DENSE:
        yield "not_hu", f"values from {low:g} to {high:g}"


def _check_ids(counts: NDArray[np.int64], case: SourceCase, labels: Mapping[str, int]) -> Found:
    name_of = {label_id: name for name, label_id in labels.items()}
    present = [int(label_id) for label_id in np.flatnonzero(counts) if label_id]
    if unknown := [label_id for label_id in present if label_id not in name_of]:
        yield "label_unknown", f"ids {unknown[:10]}; named are {sorted(name_of)}"
        return
    extra = [name_of[i] for i in present if name_of[i] not in case.annotated]
    if extra:
        yield "label_not_annotated", f"{', '.join(extra)}; annotated are {list(case.annotated)}"
    if not any(counts[labels[name]] for name in case.annotated):
        yield "label_empty", f"no voxel of {', '.join(case.annotated) or 'any organ'}"
    if (share := 1 - counts[0] / counts.sum()) > MAX_LABEL_SHARE:
        yield "label_full", f"{share:.0%} of the voxels labelled"


def _check_interpolated(labels: Volume) -> Found:
    """Whether an id is but the seam that interpolation leaves between a higher id and 0.

    Such a seam is one pixel wide, touches the higher id nearly everywhere, and is long compared
    with that id's edge. Some slices tell as much as all.
    """
    drawn = [z for z, plane in enumerate(labels.values_ZYX) if plane.any()]
    some = labels.values_ZYX[drawn[:: max(1, len(drawn) // _SEAM_SLICES)]]
    present = np.flatnonzero(np.bincount(some.ravel(), minlength=1)[1:]) + 1
    for low, high in combinations(present.tolist(), 2):
        seam, inside = some == low, some == high
        num_seam = int(np.count_nonzero(seam))
        num_edge = int(np.count_nonzero(inside & _beside(~inside)))
        num_touching = int(np.count_nonzero(seam & _beside(inside)))
        num_deep = int(np.count_nonzero(seam & ~_beside(~seam)))
        if (
            num_touching > 0.9 * num_seam
            and num_deep < 0.02 * num_seam
            and num_seam > 0.3 * num_edge
        ):
            yield "label_interpolated", f"id {low} as a seam of one pixel around id {high}"
            return


def _beside(mask_ZYX: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels in the mask or with one of their eight neighbours in the plane in it."""
    return np.asarray(ndimage.binary_dilation(mask_ZYX, np.ones((1, 3, 3), dtype=bool)))


def _check_mirrored(scan: Volume, labels: Volume) -> Found:
    """Whether the label lies on much more even tissue when it is mirrored.

    Tissue under a label that fits varies by its noise; under one that does not it also varies by
    what else is there. The measure is the mean absolute deviation from each label's median HU.
    """
    strides = tuple(slice(None, None, max(1, round(_COARSE_MM / s))) for s in scan.spacing_mm)
    hu = scan.values_ZYX[strides].astype(np.float32)
    ids = labels.values_ZYX[strides]
    if np.count_nonzero(ids) < _MIN_MIRROR_VOXELS:
        return
    as_it_is = _unevenness(hu, ids)
    flips = [axes for axes in product((False, True), repeat=3) if any(axes)]
    flipped = {
        axes: _unevenness(hu, np.flip(ids, tuple(i for i in range(3) if axes[i]))) for axes in flips
    }
    best = min(flipped, key=lambda axes: flipped[axes])
    if as_it_is > _MIRROR_RATIO * flipped[best] and as_it_is - flipped[best] > _MIRROR_GAIN_HU:
        along = " and ".join(name for name, flip in zip(_AXES, best, strict=True) if flip)
        yield (
            "label_mirrored",
            f"tissue under the labels varying by {as_it_is:.0f} HU, but by {flipped[best]:.0f} "
            f"HU with the label mirrored from {along}",
        )


def _unevenness(hu: NDArray[np.float32], ids: NDArray[np.uint8]) -> float:
    total = 0.0
    for label_id in np.flatnonzero(np.bincount(ids.ravel(), minlength=2)[1:]) + 1:
        inside = hu[ids == label_id]
        total += float(np.abs(inside - np.median(inside)).sum())
    return total / np.count_nonzero(ids)


def _check_liver_side(scan: Volume, labels: Volume, named: Mapping[str, int]) -> Found:
    liver_id = next((value for name, value in named.items() if name.lower() == "liver"), None)
    strides = tuple(slice(None, None, max(1, round(_COARSE_MM / s))) for s in scan.spacing_mm)
    liver = labels.values_ZYX[strides] == liver_id
    body = scan.values_ZYX[strides] > BODY_HU
    if liver_id is None or not liver.any() or not body.any():
        return
    centres = [float(np.nonzero(mask)[2].mean()) for mask in (liver, body)]
    step_mm = scan.spacing_mm[2] * (strides[2].step or 1)
    if (offset_mm := (centres[0] - centres[1]) * step_mm) > 0:
        yield "liver_on_left", f"its centre {offset_mm:.0f} mm left of the body's"


def _check_text(scan: Volume, labels: Volume) -> Found:
    if names := sorted({*scan.text_fields, *labels.text_fields}):
        yield "private_text", f"text in {', '.join(names)}"
