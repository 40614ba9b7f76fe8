"""The checks alone: what is in a folder and what is wrong with it; nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fullscale.ingestion.case_checks import CrossChecks, Facts, Inspection, inspect_case
from fullscale.ingestion.layouts import read_source
from fullscale.ingestion.source import SourceCase
from fullscale.ingestion.thumbnail import draw_thumbnail
from fullscale.runtime.errors import ScanError
from fullscale.scans.checks import Finding
from fullscale.scans.cohort import checksum, read_cohort, read_table
from fullscale.scans.parallel import Compute, map_cases

HEADERS = ("case", "patient", "verdict", "size (Z Y X)", "spacing mm", "axes", "HU", "organs ml")
Progress = Callable[[Iterable["CaseRow"], str, int], Iterator["CaseRow"]]


@dataclass(frozen=True)
class CaseRow:
    """What the checks say about one case.

    Attributes:
        case: its name.
        patient: whose scan it is.
        findings: of the checks.
        facts: None if the files could not be read.
        thumbnail: PNG of a slice with outlined labels; None if not asked for or unreadable.
    """

    case: str
    patient: str
    findings: tuple[Finding, ...]
    facts: Facts | None
    thumbnail: bytes | None = None

    @property
    def verdict(self) -> Literal["good", "warning", "refused"]:
        """The gravest of the findings; a note is none."""
        grave = {finding.severity for finding in self.findings}
        return "refused" if "refused" in grave else "warning" if "warning" in grave else "good"

    def to_cells(self) -> tuple[str, ...]:
        """Short texts under `HEADERS`."""
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
    """What the checks say about a folder.

    Attributes:
        folder: that was checked.
        layout: key of `fullscale.ingestion.layouts.LAYOUTS`.
        labels: label id by name.
        rows: one per case.
    """

    folder: str
    layout: str
    labels: dict[str, int]
    rows: tuple[CaseRow, ...]

    @property
    def num_refused(self) -> int:
        """Cases that ingest would leave out."""
        return sum(row.verdict == "refused" for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Plain lists and mappings, without thumbnails."""
        return {
            "folder": self.folder,
            "layout": self.layout,
            "labels": self.labels,
            "num_cases": len(self.rows),
            "num_refused": self.num_refused,
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
    num_workers: int = 1,
    progress: Progress | None = None,
) -> ValidationReport:
    """Run every check on a folder of annotated scans; nothing is written.

    Args:
        folder: in a layout of `layouts.LAYOUTS`; also the cohort itself, whose checksums are tried,
            too.
        layout: key of `LAYOUTS`; None finds out.
        with_thumbnails: draw a slice of every case.
        num_workers: processes at a time; 0 uses every core.
        progress: wraps the results, as `fullscale.runtime.console.track` does.

    Raises:
        ScanError: no such folder, an unknown layout, or tables that cannot be used.
    """
    source = read_source(folder, layout)
    checksums = _checksums(folder)
    work = partial(
        _check_one,
        labels=source.labels,
        checksums=checksums,
        with_thumbnail=with_thumbnails,
    )
    results = map_cases(work, source.cases, Compute(num_workers=num_workers))
    rows = list(progress(results, "validate", len(source.cases)) if progress else results)
    refused = [
        CaseRow(case, "", (Finding.of_error(case, error),), None) for case, error in source.refused
    ]
    rows = sorted([*_compared(rows), *refused], key=lambda row: row.case)
    return ValidationReport(str(folder), source.layout, source.labels, tuple(rows))


def _check_one(
    case: SourceCase,
    *,
    labels: dict[str, int],
    checksums: dict[Path, str] | None,
    with_thumbnail: bool,
) -> CaseRow:
    seen = inspect_case(case, labels)
    findings = [*seen.findings, *_check_sums(case, checksums)]
    return CaseRow(
        case.name,
        case.patient,
        tuple(findings),
        seen.facts,
        _thumbnail(seen) if with_thumbnail else None,
    )


def _thumbnail(seen: Inspection) -> bytes | None:
    if seen.scan is None or seen.labels is None:
        return None
    return draw_thumbnail(seen.scan, seen.labels)


def _compared(rows: Iterable[CaseRow]) -> Iterator[CaseRow]:
    """The rows with the findings of the checks that compare cases."""
    across = CrossChecks()
    for row in rows:
        if row.facts is None or row.verdict == "refused":
            yield row
            continue
        more = across.check(row.case, row.patient, row.facts.voxels_sha256)
        yield replace(row, findings=(*row.findings, *more))


def _checksums(folder: Path) -> dict[Path, str] | None:
    """Checksum of each file, where the folder is a cohort of ours."""
    path = folder / "cases.csv"
    if not path.is_file() or "image_sha256" not in (read_table(path, ()) or [{}])[0]:
        return None
    pairs = [
        pair
        for case in read_cohort(folder).cases
        for pair in ((case.image, case.image_sha256), (case.label, case.label_sha256))
    ]
    return dict(pairs)


def _check_sums(case: SourceCase, checksums: dict[Path, str] | None) -> Iterator[Finding]:
    if checksums is None:
        return
    if not any(path in checksums for path in case.files):
        yield Finding.of(case.name, "case_unlisted", f"files of {case.name} without a row")
    for path in case.files:
        expected = checksums.get(path)
        try:
            if expected and path.is_file() and (found := checksum(path)) != expected:
                text = f"{path.name} with {found[:12]}, not {expected[:12]}"
                yield Finding.of(case.name, "checksum_differs", text)
        except ScanError as error:
            yield Finding.of_error(case.name, error)
