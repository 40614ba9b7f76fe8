"""All checks on one case, and the checks that compare cases."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from fullscale.ingestion.label_seams import find_seam
from fullscale.ingestion.source import SourceCase, without_ignored
from fullscale.runtime.errors import ScanError
from fullscale.scans.anatomy import check_axes, check_slices, check_values
from fullscale.scans.checks import MIN_SLICES, Finding
from fullscale.scans.cohort import check_case_name
from fullscale.scans.geometry import AXIS_DIRECTIONS, coarse_steps
from fullscale.scans.volume import Volume

MAX_LABEL_SHARE = 0.9
_SEAM_SLICES = 16
# A sample of a scan's slices: of a scan cut to half its height about half of the sample stays.
_NUM_DIGESTS, _DIGEST_CHARS, _MIN_SHARED = 8, 12, 2
_MIN_VALUES = 32  # a slice of air, or of a phantom without noise, is that of other scans, too
_MIN_MIRROR_VOXELS = 50
# A mirrored label must fit much better, in both ratio and HU, before a case is refused.
_MIRROR_RATIO = 1.5
_MIRROR_GAIN_HU = 15.0


@dataclass(frozen=True)
class Facts:
    """Measured properties of a scan.

    Attributes:
        shape_ZYX: number of voxels along each canonical axis.
        spacing_mm: distance of voxels along Z, Y, X in mm.
        orientation: axis codes of the file, such as "RAS".
        hu_range: lowest and highest value in HU.
        organ_ml: volume of each annotated label in ml.
        voxels_sha256: checksum of the voxels in canonical order, independent of the file format.
        slice_digests: of a sample of axial slices, whatever their direction and which others there
            are: the lowest checksums of the slices' sorted voxels.
    """

    shape_ZYX: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    orientation: str
    hu_range: tuple[float, float]
    organ_ml: dict[str, float]
    voxels_sha256: str
    slice_digests: tuple[str, ...]


@dataclass(eq=False)
class Inspection:
    """The result of all checks on one case, with its volumes.

    Attributes:
        case: name of the case.
        patient: identifier of the patient.
        findings: one for each failed check.
        facts: None if the files could not be read.
        scan: HU; None if unreadable.
        labels: label ids of the source; None if unreadable.
    """

    case: str
    patient: str
    findings: list[Finding] = field(default_factory=list)
    facts: Facts | None = None
    scan: Volume | None = None
    labels: Volume | None = None

    @property
    def is_refused(self) -> bool:
        """True if a finding refuses the case."""
        return any(finding.severity == "refused" for finding in self.findings)


def inspect_case(
    case: SourceCase,
    labels: Mapping[str, int],
    *,
    strict: bool = False,
    accepted: Container[str] = (),
) -> Inspection:
    """Read a case once and run every check on it. Problems become findings, not errors.

    Args:
        case: the case to read.
        labels: label id by name in this source, without background.
        strict: refuse the case for what is otherwise a warning.
        accepted: codes of refusals of judgement that are warnings here, also if `strict`.
    """
    result = Inspection(case.name, case.patient)
    try:
        check_case_name(case.name)
        # The warnings of the parsers quote header text, which may name the patient.
        with warnings.catch_warnings(action="ignore"):
            result.scan, result.labels = case.load()
    except ScanError as error:
        result.findings.append(Finding.from_error(case.name, error))
        return result
    counts = _count_ids(result.labels)
    ids_ZYX = without_ignored(result.labels.values_ZYX, case.ignored)
    drawn = replace(result.labels, values_ZYX=ids_ZYX)
    result.facts = _measure_facts(result.scan, counts, case, labels)
    found = [
        *_check_scan(result.scan),
        *check_axes(result.scan, drawn, labels),
        *_check_ids(counts, case, labels),
        *_check_interpolated(drawn),
        *_check_mirrored(result.scan, drawn),
        *_check_text(result.scan, result.labels),
    ]
    found += [*case.doubts, *result.labels.doubts]
    if case.origin and case.name != case.origin:
        found.append(("case_renamed", f"{case.origin!r}, here {case.name}"))
    findings = [Finding.from_check(case.name, code, text) for code, text in found]
    if strict:
        findings = [finding.refuse_warning() for finding in findings]
    findings = [finding.accept(accepted) for finding in findings]
    result.findings += findings
    return result


class CrossChecks:
    """Checks that compare a case with those before it.

    Args:
        voxels: name of each known case, by the checksum of its voxels.
        patients: names of the known cases of each patient.
        slices: name of a known case, by the digest of one of its slices.
    """

    def __init__(
        self,
        voxels: Mapping[str, str] | None = None,
        patients: Mapping[str, list[str]] | None = None,
        slices: Mapping[str, str] | None = None,
    ) -> None:
        self._voxels = dict(voxels or {})
        self._slices = dict(slices or {})
        self._patients: dict[str, list[str]] = {}
        for patient, cases in (patients or {}).items():
            self._patients.setdefault(patient.casefold(), []).extend(cases)

    def forget(self, voxels_sha256: str) -> None:
        """Forget the content of a case that is about to be replaced."""
        self._voxels.pop(voxels_sha256, None)

    def remember(self, voxels_sha256: str, case: str) -> None:
        """Remember the content of a case that stays."""
        self._voxels.setdefault(voxels_sha256, case)

    def find_alike(self, slice_digests: Sequence[str]) -> str:
        """Return the name of a known case that shares slices; an empty text if none does."""
        shared = Counter(self._slices[each] for each in slice_digests if each in self._slices)
        name, count = max(shared.items(), key=lambda item: item[1], default=("", 0))
        return name if count >= _MIN_SHARED else ""

    def check(
        self, case: str, patient: str, voxels_sha256: str, slice_digests: Sequence[str] = ()
    ) -> list[Finding]:
        """Compare one more case and return the findings; remember the case unless it is refused."""
        patient_key = patient.casefold()
        first = self._voxels.setdefault(voxels_sha256, case)
        if first != case:
            return [Finding.from_check(case, "content_twice", f"{case} with the voxels of {first}")]
        findings = []
        if (alike := self.find_alike(slice_digests)) not in ("", case):
            found = f"{case} with slices of {alike}"
            findings.append(Finding.from_check(case, "content_alike", found))
        for digest in slice_digests:
            self._slices.setdefault(digest, case)
        others = self._patients.setdefault(patient_key, [])
        if case not in others:
            others.append(case)
            if len(others) > 1:
                found = f"patient {patient} with cases {', '.join(others)}"
                findings.append(Finding.from_check(case, "patient_shared", found))
        return findings


def _count_ids(labels: Volume) -> NDArray[np.int64]:
    """Return the number of voxels of each label id from 0 to 255."""
    counts = np.zeros(256, dtype=np.int64)
    for plane in labels.values_ZYX:
        counts += np.bincount(plane.ravel(), minlength=256)
    return counts


def _measure_facts(
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
        slice_digests=_slice_digests(scan),
    )


def _voxels_sha256(scan: Volume) -> str:
    digest = hashlib.sha256(repr(scan.values_ZYX.shape).encode())
    for plane in scan.values_ZYX:
        digest.update(np.ascontiguousarray(plane).data)
    return digest.hexdigest()


def _slice_digests(scan: Volume) -> tuple[str, ...]:
    digests = set[str]()
    for plane in scan.values_ZYX:
        values = np.sort(plane, axis=None)
        if np.count_nonzero(np.diff(values)) >= _MIN_VALUES:
            digests.add(hashlib.sha256(values.data).hexdigest()[:_DIGEST_CHARS])
    return tuple(sorted(digests)[:_NUM_DIGESTS])


Found = Iterator[tuple[str, str]]
"""Code of a failed check, and the values found."""


def _check_scan(scan: Volume) -> Found:
    if len(scan.values_ZYX) < MIN_SLICES:
        yield "few_slices", f"{len(scan.values_ZYX)} axial slices"
    yield from check_values(scan)
    yield from check_slices(scan)
    yield from scan.doubts


def _check_ids(counts: NDArray[np.int64], case: SourceCase, labels: Mapping[str, int]) -> Found:
    name_of = {label_id: name for name, label_id in labels.items()}
    present = [int(i) for i in np.flatnonzero(counts) if i not in (0, case.ignored)]
    if case.ignored and counts[case.ignored]:
        share = counts[case.ignored] / counts.sum()
        yield "label_ignored", f"{share:.1%} of the voxels with the id {case.ignored}"
    if unknown := [label_id for label_id in present if label_id not in name_of]:
        yield "label_unknown", f"ids {unknown[:10]}; named are {sorted(name_of)}"
        return
    extra = [name_of[i] for i in present if name_of[i] not in case.annotated]
    if extra:
        yield "label_not_annotated", f"{', '.join(extra)}; annotated are {list(case.annotated)}"
    if not any(counts[labels[name]] for name in case.annotated):
        yield "label_empty", f"no voxel of {', '.join(case.annotated) or 'any organ'}"
    if (share := counts[present].sum() / counts.sum()) > MAX_LABEL_SHARE:
        yield "label_full", f"{share:.0%} of the voxels labelled"


def _check_interpolated(labels: Volume) -> Found:
    """Check a sample of the labelled slices, which is enough to find a seam."""
    labelled = [z for z, plane in enumerate(labels.values_ZYX) if plane.any()]
    sample = labels.values_ZYX[labelled[:: max(1, len(labelled) // _SEAM_SLICES)]]
    if seam := find_seam(sample):
        low, high = seam
        yield "label_interpolated", f"id {low} as a seam of one pixel around id {high}"


def _check_mirrored(scan: Volume, labels: Volume) -> Found:
    """Check if the label covers much more homogeneous tissue when it is mirrored.

    Tissue under a correct label varies by noise only; under a misplaced label it also varies with
    the organs around. The measure is the mean absolute deviation from each label's median HU, for
    the seven ways to flip the three axes.
    """
    strides = coarse_steps(scan.spacing_mm)
    hu = scan.values_ZYX[strides].astype(np.float32)
    ids = labels.values_ZYX[strides]
    if np.count_nonzero(ids) < _MIN_MIRROR_VOXELS:
        return
    deviation_hu = _mean_deviation_hu(hu, ids)
    flips = [axes for axes in product((False, True), repeat=3) if any(axes)]
    flipped = {
        axes: _mean_deviation_hu(hu, np.flip(ids, tuple(i for i in range(3) if axes[i])))
        for axes in flips
    }
    best = min(flipped, key=lambda axes: flipped[axes])
    gain_hu = deviation_hu - flipped[best]
    if deviation_hu > _MIRROR_RATIO * flipped[best] and gain_hu > _MIRROR_GAIN_HU:
        along = " and ".join(name for name, flip in zip(AXIS_DIRECTIONS, best, strict=True) if flip)
        yield (
            "label_mirrored",
            f"tissue under the labels varying by {deviation_hu:.0f} HU, but by {flipped[best]:.0f} "
            f"HU with the label mirrored from {along}",
        )


def _mean_deviation_hu(hu: NDArray[np.float32], ids: NDArray[np.uint8]) -> float:
    """Return the mean absolute deviation of labelled voxels from their label's median."""
    total = 0.0
    for label_id in np.flatnonzero(np.bincount(ids.ravel(), minlength=2)[1:]) + 1:
        inside = hu[ids == label_id]
        total += float(np.abs(inside - np.median(inside)).sum())
    return total / np.count_nonzero(ids)


def _check_text(scan: Volume, labels: Volume) -> Found:
    if names := sorted({*scan.text_fields, *labels.text_fields}):
        yield "private_text", f"text in {', '.join(names)}"
