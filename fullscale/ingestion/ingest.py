"""Annotated scans into the cohort: everything usable goes in, everything else is explained.

The source is only read. Files are written again as plain NIfTI (int16 HU, uint8 labels, own axes
and affine, no text in the header), so the same scan always becomes the same bytes. A case is in
the cohort when its row is in cases.csv, and the row is written after both files are complete: a
run that is killed leaves no half case, and the next run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fullscale.ingestion.case_checks import CrossChecks, inspect_case
from fullscale.ingestion.layouts import read_source
from fullscale.ingestion.source import Source, SourceCase
from fullscale.runtime.errors import ScanError
from fullscale.runtime.files import file_sha256
from fullscale.scans.checks import Finding, failure
from fullscale.scans.cohort import (
    BACKGROUND,
    FILE_ENDING,
    Case,
    Cohort,
    check_annotated,
    checksum,
    image_path,
    label_path,
    read_cohort,
    read_json,
    write_cases,
    write_json,
)
from fullscale.scans.parallel import Compute, map_cases
from fullscale.scans.volume import Volume, write_volume

Progress = Callable[[Iterable["_Prepared"], str, int], Iterator["_Prepared"]]


@dataclass
class IngestReport:
    """What became of a source.

    Attributes:
        source: its folder.
        layout: key of `fullscale.ingestion.layouts.LAYOUTS`.
        accepted: names of the cases that went in now (or would, in a dry run).
        skipped: names of the cases that were in already, unchanged.
        refused: what stayed out, and why.
        warnings: what went in and deserves a look, and notes on what was done.
        remapped: label names whose id in the cohort is not the source's, as (source, cohort).
    """

    source: str
    layout: str
    accepted: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    refused: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    remapped: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def num_usable(self) -> int:
        """Cases of the source that are in the cohort after this run."""
        return len(self.accepted) + len(self.skipped)

    def to_json(self) -> dict[str, Any]:
        """Plain lists and mappings."""
        return asdict(self)


def ingest(
    source: Path,
    data_dir: Path,
    *,
    layout: str | None = None,
    dry_run: bool = False,
    replace_changed: bool = False,
    training_only: bool = False,
    num_workers: int = 1,
    progress: Progress | None = None,
) -> IngestReport:
    """Bring a folder of annotated scans into the cohort.

    Args:
        source: folder in a layout of `fullscale.ingestion.layouts.LAYOUTS`; it is only read.
        data_dir: the cohort, made if it is not there.
        layout: key of `LAYOUTS`; None finds out.
        dry_run: read and check everything, write nothing.
        replace_changed: let a case of the same name and other content take the old one's place.
        training_only: keep the cases that go in out of every test set.
        num_workers: processes at a time; 0 uses every core.
        progress: wraps the results, as `fullscale.runtime.console.track` does.

    Returns:
        What went in, what was there already, what was refused. It is also written to
        quarantine.json beside `data_dir`.

    Raises:
        ScanError: the source has no known layout, or `data_dir` is something else than a cohort.
    """
    described = read_source(source, layout)
    cohort = _open_cohort(data_dir, described)
    labels, remapped = _merged_labels(cohort.labels, described.labels)
    report = IngestReport(str(source), described.layout, remapped=remapped)
    report.refused += [Finding.of_error(case, error) for case, error in described.refused]
    incoming = data_dir / ".incoming"
    work = partial(
        _prepare,
        source=replace(described, cases=(), refused=()),
        labels=labels,
        known={case.name: (case.source_sha256, case.source) for case in cohort.cases},
        incoming=None if dry_run else incoming.resolve(),
        replace_changed=replace_changed,
    )
    results = map_cases(work, described.cases, Compute(num_workers=num_workers))
    total = len(described.cases)
    entry = _Entry(data_dir, described, labels, cohort, training_only=training_only)
    for prepared in progress(results, "ingest", total) if progress else results:
        entry.take(prepared, report, dry_run=dry_run)
    if not dry_run:
        shutil.rmtree(incoming, ignore_errors=True)
        write_json(data_dir.with_name("quarantine.json"), report.to_json())
    return report


@dataclass(frozen=True)
class _Prepared:
    """A case that was read and checked, with its new files beside the cohort."""

    case: str
    patient: str
    annotated: tuple[str, ...]
    findings: tuple[Finding, ...] = ()
    is_unchanged: bool = False
    source_sha256: str = ""
    voxels_sha256: str = ""
    image: Path | None = None
    label: Path | None = None
    image_sha256: str = ""
    label_sha256: str = ""

    @property
    def is_refused(self) -> bool:
        return any(finding.severity == "refused" for finding in self.findings)


def _prepare(
    case: SourceCase,
    *,
    source: Source,
    labels: dict[str, int],
    known: dict[str, tuple[str, str]],
    incoming: Path | None,
    replace_changed: bool,
) -> _Prepared:
    """Read, check and write one case beside the cohort; runs in a worker."""
    blank = _Prepared(case.name, case.patient, case.annotated)
    try:
        check_annotated(case.name, case.annotated, labels)
        digest = _source_digest(case, source, labels)
        before, origin = known.get(case.name, ("", ""))
        if before == digest:
            return replace(blank, is_unchanged=True)
        if origin and not replace_changed:
            raise failure("case_exists", f"{case.name}, which came from {origin}")
    except ScanError as error:
        return replace(blank, findings=(Finding.of_error(case.name, error),))
    seen = inspect_case(case, source.labels)
    checked = replace(blank, findings=tuple(seen.findings), source_sha256=digest)
    if seen.is_refused or seen.scan is None or seen.labels is None or seen.facts is None:
        return checked
    checked = replace(checked, voxels_sha256=seen.facts.voxels_sha256)
    if incoming is None:
        return checked
    incoming.mkdir(parents=True, exist_ok=True)
    image, label = (incoming / f"{case.name}-{part}{FILE_ENDING}" for part in ("ct", "label"))
    geometry = seen.scan.geometry
    write_volume(image, geometry.to_own_grid(seen.scan.values_ZYX), geometry.own_affine)
    new_labels = _mapped_ids(seen.labels, source.labels, labels)
    write_volume(label, geometry.to_own_grid(new_labels), geometry.own_affine)
    return replace(
        checked,
        image=image,
        label=label,
        image_sha256=file_sha256(image),
        label_sha256=file_sha256(label),
    )


class _Entry:
    """Takes prepared cases into a cohort, one at a time."""

    def __init__(
        self,
        root: Path,
        source: Source,
        labels: dict[str, int],
        cohort: Cohort,
        *,
        training_only: bool,
    ) -> None:
        self.root = root
        self.source = source
        self.labels = labels
        self.training_only = training_only
        self.cases = {case.name: case for case in cohort.cases}
        patients: dict[str, list[str]] = {}
        for case in cohort.cases:
            patients.setdefault(case.patient, []).append(case.name)
        voxels = {case.voxels_sha256: case.name for case in cohort.cases if case.voxels_sha256}
        self.across = CrossChecks(voxels, patients)

    def take(self, prepared: _Prepared, report: IngestReport, *, dry_run: bool) -> None:
        """Let one case in, or say why not."""
        findings = list(prepared.findings)
        if prepared.is_unchanged:
            report.skipped.append(prepared.case)
            return
        if not prepared.is_refused:
            findings += self.across.check(prepared.case, prepared.patient, prepared.voxels_sha256)
        refused = [finding for finding in findings if finding.severity == "refused"]
        report.refused += refused
        if refused:
            return
        report.warnings += findings
        report.accepted.append(prepared.case)
        if not dry_run:
            self._write(prepared)

    def _write(self, prepared: _Prepared) -> None:
        row = Case(
            name=prepared.case,
            patient=prepared.patient,
            annotated=prepared.annotated,
            source=f"{self.source.layout}:{self.source.name}",
            image=image_path(self.root, prepared.case),
            label=label_path(self.root, prepared.case),
            image_sha256=prepared.image_sha256,
            label_sha256=prepared.label_sha256,
            source_sha256=prepared.source_sha256,
            voxels_sha256=prepared.voxels_sha256,
            training_only=self.training_only,
        )
        if prepared.image is None or prepared.label is None:
            raise ValueError(f"case {prepared.case} was checked, but not written")
        for folder in (row.image.parent, row.label.parent):
            folder.mkdir(parents=True, exist_ok=True)
        prepared.label.replace(row.label)
        prepared.image.replace(row.image)
        self.cases[row.name] = row
        write_json(self.root / "dataset.json", self._dataset())
        write_cases(self.root, self.cases.values())

    def _dataset(self) -> dict[str, Any]:
        path = self.root / "dataset.json"
        kept = read_json(path) if path.is_file() else {}
        joined = {
            key: _joined(kept.get(key, ""), getattr(self.source, key))
            for key in ("name", "licence", "reference")
        }
        return {
            **kept,
            **joined,
            "channel_names": {"0": "CT"},
            "labels": self.labels,
            "numTraining": len(self.cases),
            "file_ending": FILE_ENDING,
        }


def _source_digest(case: SourceCase, source: Source, labels: dict[str, int]) -> str:
    """Checksum of all that decides what the case becomes."""
    digest = hashlib.sha256()
    for path in case.files:
        digest.update(checksum(path).encode())
    mapping = sorted((value, labels[name]) for name, value in source.labels.items())
    digest.update(repr((case.patient, case.annotated, mapping)).encode())
    return digest.hexdigest()


def _mapped_ids(
    labels: Volume, source: dict[str, int], cohort: dict[str, int]
) -> NDArray[np.uint8]:
    """Label ids of the source turned into those of the cohort."""
    new_id = np.zeros(256, dtype=np.uint8)
    for name, value in source.items():
        new_id[value] = cohort[name]
    if all(new_id[value] == value for value in source.values()):
        return labels.values_ZYX
    return np.asarray(new_id[labels.values_ZYX])


def _open_cohort(data_dir: Path, source: Source) -> Cohort:
    """The cohort, or an empty one where the folder is missing or holds no case yet."""
    if (data_dir / "cases.csv").is_file():
        return read_cohort(data_dir)
    if data_dir.is_dir():
        own = {"dataset.json", "dataset.json.part", "cases.csv.part"}
        own |= {"imagesTr", "labelsTr", ".incoming"}
        if strange := sorted(path.name for path in data_dir.iterdir() if path.name not in own):
            raise failure("not_a_cohort", f"{data_dir} holding {', '.join(strange[:5])}")
    return Cohort(data_dir, source.name, {BACKGROUND: 0}, ())


def _merged_labels(
    labels: dict[str, int], added: dict[str, int]
) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
    """Labels of the cohort with those of a source; new names get the next free id.

    nnU-Net wants ids without gaps, so a source's id is kept only where it is the next one.
    """
    merged = dict(labels)
    for name in sorted(added, key=lambda key: added[key]):
        merged.setdefault(name, len(merged))
    if len(merged) > 256:
        raise failure("dataset_json", f"{len(merged)} labels in all; a label map holds 255")
    moved = {name: (value, merged[name]) for name, value in added.items() if merged[name] != value}
    return merged, moved


def _joined(before: object, added: str) -> str:
    """Both texts, each once."""
    parts = [part for part in str(before).split("; ") if part]
    return "; ".join(parts if not added or added in parts else [*parts, added])
