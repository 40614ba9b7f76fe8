"""Run every check on a folder of annotated scans, without writing anything."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fullscale.ingestion.case_checks import CrossChecks, Facts, inspect_case
from fullscale.ingestion.layouts import read_source
from fullscale.ingestion.source import SourceCase, without_ignored
from fullscale.runtime.errors import ScanError
from fullscale.scans.checks import Finding
from fullscale.scans.cohort import checksum, is_cohort, read_cohort
from fullscale.scans.parallel import Compute, map_cases
from fullscale.scans.volume import Volume

HEADERS = ("case", "patient", "verdict", "size (Z Y X)", "spacing mm", "axes", "HU", "organs ml")
THUMBNAIL_SIZE_PX = 224
THUMBNAIL_WINDOW_HU = (-160.0, 240.0)  # the usual soft-tissue window: level 40, width 400
COLOURS = np.array(
    [
        (230, 75, 53),
        (77, 187, 213),
        (0, 160, 135),
        (243, 155, 127),
        (132, 145, 180),
        (255, 220, 80),
        (180, 110, 220),
    ],
    dtype=np.uint8,
)
"""RGB of the outline of label ids 1, 2, ..., repeated after the last."""

Progress = Callable[[Iterable["CaseRow"], str, int], Iterator["CaseRow"]]


@dataclass(frozen=True)
class CaseRow:
    """The result of the checks on one case.

    Attributes:
        case: name of the case.
        patient: identifier of the patient.
        findings: problems and notes of the checks.
        facts: None if the files could not be read.
        thumbnail: PNG of a slice with outlined labels; None if not requested or unreadable.
    """

    case: str
    patient: str
    findings: tuple[Finding, ...]
    facts: Facts | None
    thumbnail: bytes | None = None

    @property
    def verdict(self) -> Literal["good", "warning", "refused"]:
        """The most severe finding; notes do not count."""
        severities = {finding.severity for finding in self.findings}
        if "refused" in severities:
            return "refused"
        return "warning" if "warning" in severities else "good"

    def to_cells(self) -> tuple[str, ...]:
        """Return short texts in the order of `HEADERS`."""
        if self.facts is None:
            return (self.case, self.patient, self.verdict, "", "", "", "", "")
        return (
            self.case,
            self.patient,
            self.verdict,
            " x ".join(str(n) for n in self.facts.shape_ZYX),
            " ".join(f"{step:.3g}" for step in self.facts.spacing_mm),
            self.facts.orientation,
            "{:.0f} to {:.0f}".format(*self.facts.hu_range),
            ", ".join(f"{name} {ml:.0f}" for name, ml in self.facts.organ_ml.items() if ml),
        )


@dataclass(frozen=True)
class ValidationReport:
    """The result of the checks on a folder.

    Attributes:
        folder: the folder checked.
        layout: key of `fullscale.ingestion.layouts.LAYOUTS`.
        labels: label id by name.
        rows: one per case, by name in order.
        findings: warnings and notes that belong to no case.
    """

    folder: str
    layout: str
    labels: dict[str, int]
    rows: tuple[CaseRow, ...]
    findings: tuple[Finding, ...] = ()

    @property
    def num_refused(self) -> int:
        """Number of cases that `ingest` would refuse."""
        return sum(row.verdict == "refused" for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Return plain lists and mappings, without thumbnails."""
        return {
            "folder": self.folder,
            "layout": self.layout,
            "labels": self.labels,
            "num_cases": len(self.rows),
            "num_refused": self.num_refused,
            "findings": [asdict(finding) for finding in self.findings],
            "cases": [
                {
                    "case": row.case,
                    "patient": row.patient,
                    "verdict": row.verdict,
                    "findings": [asdict(finding) for finding in row.findings],
                    "facts": asdict(row.facts) if row.facts else None,
                }
                for row in self.rows
            ],
        }


def validate(
    folder: Path,
    *,
    layout: str | None = None,
    with_thumbnails: bool = False,
    strict: bool = False,
    accepted: Iterable[str] = (),
    num_workers: int = 1,
    progress: Progress | None = None,
) -> ValidationReport:
    """Run every check on a folder of annotated scans; write nothing.

    Args:
        folder: in a layout of `layouts.LAYOUTS`. If it is a cohort, its checksums are checked too.
        layout: key of `LAYOUTS`; None detects the layout.
        with_thumbnails: draw a slice of every case.
        strict: refuse cases for what is otherwise a warning.
        accepted: codes of refusals of judgement that are warnings here.
        num_workers: parallel processes; 0 uses every core.
        progress: wraps the results, as `fullscale.runtime.console.track` does.

    Raises:
        ScanError: the folder is missing, its layout is unknown, or its tables cannot be used.
    """
    source = read_source(folder, layout)
    check = partial(
        _check_case,
        labels=source.labels,
        checksums=_read_checksums(folder),
        with_thumbnail=with_thumbnails,
        strict=strict,
        accepted=tuple(accepted),
    )
    results = map_cases(check, source.cases, Compute(num_workers=num_workers))
    rows = list(progress(results, "validate", len(source.cases)) if progress else results)
    refused = [
        CaseRow(case, "", (Finding.from_error(case, error),), None)
        for case, error in source.refused
    ]
    rows = sorted([*_compare_cases(rows), *refused], key=lambda row: row.case)
    return ValidationReport(str(folder), source.layout, source.labels, tuple(rows), source.findings)


def draw_thumbnail(scan: Volume, ids_ZYX: NDArray[np.uint8]) -> bytes:
    """Draw the axial slice with most labelled voxels, or the middle slice if no voxel is labelled.

    Args:
        scan: HU, canonical orientation.
        ids_ZYX: label ids on the same grid.

    Returns:
        PNG with true proportions, the longer side `THUMBNAIL_SIZE_PX` pixels.
    """
    from PIL import Image

    counts = [int(np.count_nonzero(plane)) for plane in ids_ZYX]
    z = int(np.argmax(counts)) if any(counts) else len(counts) // 2
    low, high = THUMBNAIL_WINDOW_HU
    grey = (scan.values_ZYX[z].astype(np.float32).clip(low, high) - low) / (high - low) * 255
    height, width = _thumbnail_size_px(scan)
    picture = Image.fromarray(grey.astype(np.uint8)).resize(
        (width, height), Image.Resampling.BILINEAR
    )
    ids = Image.fromarray(np.ascontiguousarray(ids_ZYX[z])).resize(
        (width, height), Image.Resampling.NEAREST
    )
    pixels = np.repeat(np.asarray(picture)[..., None], 3, axis=2)
    outline = _outline(np.asarray(ids))
    drawn = outline > 0
    pixels[drawn] = COLOURS[(outline[drawn] - 1) % len(COLOURS)]
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _thumbnail_size_px(scan: Volume) -> tuple[int, int]:
    extent_mm = np.array(scan.values_ZYX.shape[1:]) * scan.spacing_mm[1:]
    sides = extent_mm * THUMBNAIL_SIZE_PX / extent_mm.max()
    height, width = np.maximum(1, np.rint(sides)).astype(int)
    return int(height), int(width)


def _outline(ids: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Keep the ids of pixels that have a 4-neighbour of another id; set the others to 0."""
    padded = np.pad(ids, 1, mode="edge")
    neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    inner = np.logical_and.reduce([ids == neighbour for neighbour in neighbours])
    return np.where(inner, 0, ids).astype(np.uint8)


def _check_case(
    case: SourceCase,
    *,
    labels: dict[str, int],
    checksums: dict[Path, str] | None,
    with_thumbnail: bool,
    strict: bool,
    accepted: tuple[str, ...],
) -> CaseRow:
    result = inspect_case(case, labels, strict=strict, accepted=accepted)
    thumbnail = None
    if with_thumbnail and result.scan is not None and result.labels is not None:
        ids_ZYX = without_ignored(result.labels.values_ZYX, case.ignored)
        thumbnail = draw_thumbnail(result.scan, ids_ZYX)
    findings = (*result.findings, *_check_checksums(case, checksums))
    return CaseRow(case.name, case.patient, findings, result.facts, thumbnail)


def _compare_cases(rows: Iterable[CaseRow]) -> Iterator[CaseRow]:
    """Yield the rows, with the findings of the checks that compare cases added."""
    cross_checks = CrossChecks()
    for row in rows:
        if row.facts is None or row.verdict == "refused":
            yield row
            continue
        added = cross_checks.check(
            row.case, row.patient, row.facts.voxels_sha256, row.facts.slice_digests
        )
        yield replace(row, findings=(*row.findings, *added))


def _read_checksums(folder: Path) -> dict[Path, str] | None:
    """Return the expected checksum of each file if the folder is a cohort, else None."""
    if not is_cohort(folder):
        return None
    pairs = [
        pair
        for case in read_cohort(folder).cases
        for pair in ((case.image, case.image_sha256), (case.label, case.label_sha256))
    ]
    return dict(pairs)


def _check_checksums(case: SourceCase, checksums: dict[Path, str] | None) -> Iterator[Finding]:
    if checksums is None:
        return
    if not any(path in checksums for path in case.files):
        yield Finding.from_check(case.name, "case_unlisted", f"files of {case.name} without a row")
    for path in case.files:
        expected = checksums.get(path)
        try:
            if expected and path.is_file() and (found := checksum(path)) != expected:
                text = f"{path.name} with {found[:12]}, not {expected[:12]}"
                yield Finding.from_check(case.name, "checksum_differs", text)
        except ScanError as error:
            yield Finding.from_error(case.name, error)
