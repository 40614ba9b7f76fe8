"""The fingerprint of a cohort: what its scans and organs measure, without the test patients.

Axis letters: Z slices, Y X voxels of a scan in canonical orientation.

Nothing is chosen by looking at the test set, so scans of test patients are counted by the table of
cases alone: neither their headers nor their voxels are read. Headers of all other scans are read,
and the voxels of a sample of them.
"""

# nibabel has no type annotations for the functions called here.
# mypy: allow-untyped-calls
from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from fullscale.ingestion.source import without_ignored
from fullscale.ingestion.validate import draw_thumbnail
from fullscale.params import ParamsSection
from fullscale.prediction.components import label_mask
from fullscale.runtime.errors import StageError, shorten
from fullscale.runtime.files import read_json_or_empty, write_atomically
from fullscale.scans.checks import BODY_HU
from fullscale.scans.cohort import IGNORED_ID, Case, Cohort
from fullscale.scans.geometry import Geometry, check_aligned
from fullscale.scans.parallel import Compute, map_cases
from fullscale.scans.trunk import find_trunk
from fullscale.scans.volume import Volume, open_nifti, read_header, read_image, read_labels

NAME = "fingerprint.json"
PERCENTILES = (0.5, 5, 25, 50, 75, 95, 99.5)
"""Percentiles of HU in the fingerprint, in this order."""
MAX_CASES = 48
MAX_VOXELS = 1_500_000_000
"""Largest sample whose voxels are read: about twenty scans of clinical size."""
MIN_CASES = 3
SHELL_MM = 10.0
"""Thickness of the tissue around an organ that its surroundings are measured in."""
SOFT_HU = (-200, 400)
"""HU of the surroundings that count: no window for soft tissue holds lung and dense bone."""
_STEP_MM = 2.0  # of the voxels looked at in and around organs
_FEW_VOXELS = 200_000_000  # below so many, starting processes takes longer than it saves

Array = NDArray[Any]
Progress = Callable[[Iterable["Measured"], str, int], Iterator["Measured"]]


class OrganFacts(ParamsSection):
    """An organ in one scan.

    Attributes:
        volume_ml: of its voxels.
        num_slices: slices that contain it.
        inside_hu: `PERCENTILES` of its voxels; empty if it has none.
        around_hu: `PERCENTILES` of the voxels within `SHELL_MM` around it that have `SOFT_HU`.
    """

    volume_ml: float
    num_slices: int
    inside_hu: tuple[float, ...]
    around_hu: tuple[float, ...]


class CaseFacts(ParamsSection):
    """A scan outside the test set.

    Attributes:
        case: its name.
        patient: identifier of the patient.
        annotated: organs drawn in it.
        shape_ZYX: number of voxels.
        spacing_mm: distance of voxels along Z, Y, X.
        trunk_mm: extent of the trunk along Y and X; None if the voxels were not read.
        num_organ_free: slices without any organ; None if the voxels were not read.
        organs: facts of each annotated organ; empty if the voxels were not read.
    """

    case: str
    patient: str
    annotated: tuple[str, ...]
    shape_ZYX: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    trunk_mm: tuple[float, float] | None = None
    num_organ_free: int | None = None
    organs: dict[str, OrganFacts] = Field(default_factory=dict)

    @property
    def height_mm(self) -> float:
        """From the lower edge of the lowest slice to the upper edge of the highest one."""
        return self.shape_ZYX[0] * self.spacing_mm[0]


class Annotated(ParamsSection):
    """Cases and patients in whom an organ is drawn, test patients included."""

    num_cases: int
    num_patients: int


class Fingerprint(ParamsSection):
    """The measurements of a cohort; the same scans, organs and test set give the same ones.

    Attributes:
        data_version: MD5 of the annotated scans, from data.dvc; "none" without that file.
        organs: label ids of each organ.
        num_cases: of the whole cohort.
        num_patients: of the whole cohort.
        num_tested: cases of the test set, which were not opened.
        annotated: for each organ.
        cases: every case outside the test set, by name in order.
    """

    data_version: str
    organs: dict[str, tuple[int, ...]]
    num_cases: int
    num_patients: int
    num_tested: int
    annotated: dict[str, Annotated]
    cases: tuple[CaseFacts, ...]

    @property
    def measured(self) -> tuple[CaseFacts, ...]:
        """The cases whose voxels were read."""
        return tuple(case for case in self.cases if case.trunk_mm is not None)


@dataclass(frozen=True)
class Measured:
    """A case, its picture, and the time it took, which belongs in no artefact.

    Attributes:
        facts: of the case.
        picture: PNG of a slice with outlines.
        seconds: processor and disk together.
    """

    facts: CaseFacts
    picture: bytes
    seconds: float


@dataclass(frozen=True)
class Reading:
    """A fingerprint and the speed at which its voxels were read.

    Attributes:
        fingerprint: of the cohort.
        seconds_per_voxel: of reading scan and label map and measuring both, one process.
        pictures: PNG of each measured case; drawn when it is read, because reading takes longest.
    """

    fingerprint: Fingerprint
    seconds_per_voxel: float
    pictures: Mapping[str, bytes] = field(default_factory=dict)


def read_fingerprint(path: Path) -> Fingerprint | None:
    """Read a fingerprint; return None if there is no file.

    Raises:
        StageError: the file is damaged or of another version.
    """
    try:
        content = read_json_or_empty(path)
        return Fingerprint.model_validate(content) if content else None
    except (ValueError, ValidationError) as error:
        raise StageError(
            f"{path} is not a fingerprint ({shorten(error)}); make it again with `fullscale plan`"
        ) from None


def write_fingerprint(path: Path, fingerprint: Fingerprint) -> None:
    """Write a fingerprint as JSON atomically."""
    write_atomically(path, fingerprint.model_dump_json(indent=1) + "\n")


def measure_cohort(
    cohort: Cohort,
    organs: Mapping[str, tuple[int, ...]],
    tested: Iterable[str],
    data_version: str,
    *,
    body_threshold_hu: float = BODY_HU,
    progress: Progress | None = None,
) -> Reading:
    """Measure the scans of a cohort.

    Args:
        cohort: with at least one case outside the test set.
        organs: label ids of each organ.
        tested: names of the test cases.
        data_version: MD5 of the scans.
        body_threshold_hu: as for slices.
        progress: wraps the results, as `fullscale.runtime.console.track` does.

    Raises:
        ScanError: a file cannot be read.
    """
    left_out = set(tested)
    cases = [case for case in cohort.cases if case.name not in left_out]
    geometries = {case.name: read_geometry(case.image) for case in cases}
    facts = {
        case.name: CaseFacts(
            case=case.name,
            patient=case.patient,
            annotated=cohort.annotated_organs(case, organs),
            shape_ZYX=geometries[case.name].shape_ZYX,
            spacing_mm=_rounded(geometries[case.name].spacing_mm),
        )
        for case in cases
    }
    num_voxels = [int(np.prod(facts[case.name].shape_ZYX)) for case in cases]
    sample = [cases[place] for place in choose_sample(num_voxels)]
    total = sum(int(np.prod(facts[case.name].shape_ZYX)) for case in sample)
    measure = partial(
        _measure_case, facts=facts, organs=dict(organs), body_threshold_hu=body_threshold_hu
    )
    results = map_cases(measure, sample, Compute(num_workers=1 if total < _FEW_VOXELS else 0))
    measured = list(progress(results, "measure", len(sample)) if progress else results)
    facts |= {each.facts.case: each.facts for each in measured}
    fingerprint = Fingerprint(
        data_version=data_version,
        organs=dict(organs),
        num_cases=len(cohort.cases),
        num_patients=len({case.patient for case in cohort.cases}),
        num_tested=len(cohort.cases) - len(cases),
        annotated={organ: _count(cohort, organ, organs) for organ in organs},
        cases=tuple(facts[case.name] for case in cases),
    )
    return Reading(
        fingerprint,
        sum(each.seconds for each in measured) / max(1, total),
        {each.facts.case: each.picture for each in measured},
    )


def read_geometry(path: Path) -> Geometry:
    """Read the voxel grid of a scan of a cohort from its header alone."""
    with open_nifti(path) as stream:
        header = read_header(stream)
    x, y, z = (int(n) for n in header.get_data_shape()[:3])
    return Geometry((x, y, z), np.asarray(header.get_best_affine(), dtype=np.float64))


def choose_sample(num_voxels: Sequence[int]) -> list[int]:
    """Return the places of the cases whose voxels are read: evenly spaced, a fixed choice.

    Args:
        num_voxels: of each case.
    """
    if not num_voxels:
        return []
    affordable = int(MAX_VOXELS * len(num_voxels) / sum(num_voxels))
    count = min(len(num_voxels), MAX_CASES, max(MIN_CASES, affordable))
    return sorted({int(place) for place in np.linspace(0, len(num_voxels) - 1, count).round()})


def measure_organ(scan: Volume, mask_ZYX: NDArray[np.bool_]) -> OrganFacts:
    """Measure an organ.

    Args:
        scan: HU, canonical orientation.
        mask_ZYX: True in the organ.
    """
    num_slices = int(mask_ZYX.any(axis=(1, 2)).sum())
    voxel_ml = float(np.prod(scan.spacing_mm)) / 1000
    volume_ml = round(float(np.count_nonzero(mask_ZYX)) * voxel_ml, 2)
    if not num_slices:
        return OrganFacts(volume_ml=0.0, num_slices=0, inside_hu=(), around_hu=())
    box = _box_around(mask_ZYX, scan.spacing_mm)
    hu, mask = scan.values_ZYX[box], mask_ZYX[box]
    around = _shell(
        mask,
        tuple(step * mm for step, mm in zip((s.step for s in box), scan.spacing_mm, strict=True)),
    )
    low, high = SOFT_HU
    around &= (hu >= low) & (hu <= high)
    return OrganFacts(
        volume_ml=volume_ml,
        num_slices=num_slices,
        inside_hu=_percentiles(hu[mask]),
        around_hu=_percentiles(hu[around]),
    )


def _measure_case(
    case: Case,
    *,
    facts: Mapping[str, CaseFacts],
    organs: Mapping[str, tuple[int, ...]],
    body_threshold_hu: float,
) -> Measured:
    started = time.perf_counter()
    scan, labels = read_image(case.image), read_labels(case.label)
    check_aligned(scan.geometry, labels.geometry, case.name)
    known = facts[case.name]
    trunk = find_trunk(scan, body_threshold_hu)
    masks = {name: label_mask(labels.values_ZYX, organs[name]) for name in known.annotated}
    # Where something was not judged, an organ may be.
    any_Z = (labels.values_ZYX == IGNORED_ID).any(axis=(1, 2))
    for mask_ZYX in masks.values():
        any_Z |= mask_ZYX.any(axis=(1, 2))
    measured = known.model_copy(
        update={
            "trunk_mm": _rounded(trunk.extent_mm),
            "num_organ_free": int(np.count_nonzero(~any_Z)),
            "organs": {name: measure_organ(scan, mask) for name, mask in masks.items()},
        }
    )
    picture = draw_thumbnail(scan, without_ignored(labels.values_ZYX))
    return Measured(measured, picture, time.perf_counter() - started)


def _box_around(
    mask_ZYX: NDArray[np.bool_], spacing_mm: tuple[float, float, float]
) -> tuple[slice, slice, slice]:
    """Return the slices of an organ's box and shell, about every `_STEP_MM` a voxel."""
    found = []
    for axis, mm in enumerate(spacing_mm):
        inside = np.flatnonzero(mask_ZYX.any(axis=tuple({0, 1, 2} - {axis})))
        margin = int(np.ceil(SHELL_MM / mm))
        first, last = int(inside[0]) - margin, int(inside[-1]) + 1 + margin
        found.append(slice(max(0, first), last, max(1, int(_STEP_MM / mm))))
    return found[0], found[1], found[2]


def _shell(mask_ZYX: NDArray[np.bool_], spacing_mm: tuple[float, ...]) -> NDArray[np.bool_]:
    from scipy import ndimage

    away_mm = ndimage.distance_transform_edt(~mask_ZYX, sampling=spacing_mm)
    return np.asarray((away_mm > 0) & (away_mm <= SHELL_MM))


def _percentiles(values: Array) -> tuple[float, ...]:
    if not values.size:
        return ()
    return tuple(round(float(each), 1) for each in np.percentile(values, PERCENTILES))


def _rounded(values: Sequence[float]) -> Any:
    return tuple(round(float(value), 4) for value in values)


def _count(cohort: Cohort, organ: str, organs: Mapping[str, tuple[int, ...]]) -> Annotated:
    drawn = [case for case in cohort.cases if organ in cohort.annotated_organs(case, organs)]
    return Annotated(num_cases=len(drawn), num_patients=len({case.patient for case in drawn}))
