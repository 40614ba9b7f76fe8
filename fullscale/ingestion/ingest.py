"""Ingest annotated scans into the cohort; refuse unusable cases with a reason.

The source is only read. Files are rewritten as plain NIfTI (int16 HU, uint8 labels, the source's
axis order and affine, no text in the header), so equal scans give equal bytes. A case belongs to
the cohort once its row is in cases.csv, and the row is written after both files are complete.
Therefore a killed run leaves no incomplete case, and the next run continues where it stopped.
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
from fullscale.runtime.files import file_sha256, write_json
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
)
from fullscale.scans.parallel import Compute, map_cases
from fullscale.scans.volume import Volume, write_volume

Progress = Callable[[Iterable["_PreparedCase"], str, int], Iterator["_PreparedCase"]]


@dataclass
class IngestReport:
    """The result of one call of `ingest`.

    Attributes:
        source: folder of the source.
        layout: key of `fullscale.ingestion.layouts.LAYOUTS`.
        accepted: names of the cases that were added (in a dry run, that would be added).
        skipped: names of the cases that the cohort held already, unchanged.
        refused: findings that kept cases out.
        warnings: warnings and notes on accepted cases.
        remapped: (id in the source, id in the cohort) by label name, where the two differ.
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
        """Number of cases of the source that are in the cohort after this run."""
        return len(self.accepted) + len(self.skipped)

    def to_json(self) -> dict[str, Any]:
        """Return plain lists and mappings."""
        return asdict(self)


@dataclass(frozen=True)
class IngestOptions:
    """Settings of `ingest`.

    Attributes:
        layout: key of `fullscale.ingestion.layouts.LAYOUTS`; None detects the layout.
        dry_run: read and check everything, write nothing.
        replace_changed: replace a case of the same name if its content differs.
        training_only: keep the added cases out of every test set.
        strict: refuse cases for what is otherwise a warning.
    """

    layout: str | None = None
    dry_run: bool = False
    replace_changed: bool = False
    training_only: bool = False
    strict: bool = False


_DEFAULTS = IngestOptions()


def ingest(
    source: Path,
    data_dir: Path,
    options: IngestOptions = _DEFAULTS,
    *,
    num_workers: int = 1,
    progress: Progress | None = None,
) -> IngestReport:
    """Add the usable cases of a folder of annotated scans to the cohort.

    Args:
        source: folder in a layout of `fullscale.ingestion.layouts.LAYOUTS`; only read.
        data_dir: the cohort; created if it is missing.
        options: settings.
        num_workers: parallel processes; 0 uses every core.
        progress: wraps the results, as `fullscale.runtime.console.track` does.

    Returns:
        The accepted, skipped and refused cases. The report is also written to quarantine.json
        next to `data_dir`.

    Raises:
        ScanError: the source has no known layout, or `data_dir` is not a cohort.
    """
    parsed = read_source(source, options.layout)
    cohort = _open_cohort(data_dir, parsed)
    labels, remapped = _merge_labels(cohort.labels, parsed.labels)
    report = IngestReport(str(source), parsed.layout, remapped=remapped)
    report.refused += [Finding.from_error(case, error) for case, error in parsed.refused]
    incoming = data_dir / ".incoming"
    prepare = partial(
        _prepare,
        source=replace(parsed, cases=(), refused=()),  # small to send to the workers
        labels=labels,
        known={case.name: (case.source_sha256, case.source) for case in cohort.cases},
        incoming=None if options.dry_run else incoming.resolve(),
        replace_changed=options.replace_changed,
        strict=options.strict,
    )
    results = map_cases(prepare, parsed.cases, Compute(num_workers=num_workers))
    total = len(parsed.cases)
    writer = _CohortWriter(data_dir, parsed, labels, cohort, options)
    for prepared in progress(results, "ingest", total) if progress else results:
        writer.add(prepared, report)
    if not options.dry_run:
        shutil.rmtree(incoming, ignore_errors=True)
        write_json(data_dir.with_name("quarantine.json"), report.to_json())
    return report


@dataclass(frozen=True)
class _PreparedCase:
    """A case that was read and checked, with its new files in the folder .incoming."""

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
    strict: bool,
) -> _PreparedCase:
    """Read, check and write one case to the folder .incoming; runs in a worker process."""
    blank = _PreparedCase(case.name, case.patient, case.annotated)
    try:
        check_annotated(case.name, case.annotated, labels)
        digest = _source_digest(case, source, labels)
        known_digest, origin = known.get(case.name, ("", ""))
        if known_digest == digest:
            return replace(blank, is_unchanged=True)
        if origin and not replace_changed:
            raise failure("case_exists", f"{case.name}, which came from {origin}")
    except ScanError as error:
        return replace(blank, findings=(Finding.from_error(case.name, error),))
    result = inspect_case(case, source.labels, strict=strict)
    checked = replace(blank, findings=tuple(result.findings), source_sha256=digest)
    if result.is_refused or result.scan is None or result.labels is None or result.facts is None:
        return checked
    checked = replace(checked, voxels_sha256=result.facts.voxels_sha256)
    if incoming is None:
        return checked
    incoming.mkdir(parents=True, exist_ok=True)
    image, label = (incoming / f"{case.name}-{part}{FILE_ENDING}" for part in ("ct", "label"))
    geometry = result.scan.geometry
    write_volume(image, geometry.to_own_grid(result.scan.values_ZYX), geometry.own_affine)
    new_labels = _map_ids(result.labels, source.labels, labels)
    write_volume(label, geometry.to_own_grid(new_labels), geometry.own_affine)
    return replace(
        checked,
        image=image,
        label=label,
        image_sha256=file_sha256(image),
        label_sha256=file_sha256(label),
    )


class _CohortWriter:
    """Add prepared cases to a cohort, one at a time."""

    def __init__(
        self,
        root: Path,
        source: Source,
        labels: dict[str, int],
        cohort: Cohort,
        options: IngestOptions,
    ) -> None:
        self.root = root
        self.source = source
        self.labels = labels
        self.options = options
        self.cases = {case.name: case for case in cohort.cases}
        patients: dict[str, list[str]] = {}
        for case in cohort.cases:
            patients.setdefault(case.patient, []).append(case.name)
        voxels = {case.voxels_sha256: case.name for case in cohort.cases if case.voxels_sha256}
        self.cross_checks = CrossChecks(voxels, patients)

    def add(self, prepared: _PreparedCase, report: IngestReport) -> None:
        """Add one case, or report why it is refused."""
        findings = list(prepared.findings)
        if prepared.is_unchanged:
            report.skipped.append(prepared.case)
            return
        if not prepared.is_refused:
            findings += self.cross_checks.check(
                prepared.case, prepared.patient, prepared.voxels_sha256
            )
        refused = [finding for finding in findings if finding.severity == "refused"]
        report.refused += refused
        if refused:
            return
        report.warnings += findings
        report.accepted.append(prepared.case)
        if not self.options.dry_run:
            self._write(prepared)

    def _write(self, prepared: _PreparedCase) -> None:
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
            training_only=self.options.training_only,
        )
        if prepared.image is None or prepared.label is None:
            raise ValueError(f"case {prepared.case} was checked, but not written")
        for folder in (row.image.parent, row.label.parent):
            folder.mkdir(parents=True, exist_ok=True)
        # The row comes last: files without a row are not part of the cohort.
        prepared.label.replace(row.label)
        prepared.image.replace(row.image)
        self.cases[row.name] = row
        write_json(self.root / "dataset.json", self._dataset())
        write_cases(self.root, self.cases.values())

    def _dataset(self) -> dict[str, Any]:
        path = self.root / "dataset.json"
        kept = read_json(path) if path.is_file() else {}
        joined = {
            key: _join_texts(kept.get(key, ""), getattr(self.source, key))
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
    """Return the SHA-256 of everything that determines the ingested case."""
    digest = hashlib.sha256()
    for path in case.files:
        digest.update(checksum(path).encode())
    mapping = sorted((value, labels[name]) for name, value in source.labels.items())
    digest.update(repr((case.patient, case.annotated, mapping)).encode())
    return digest.hexdigest()


def _map_ids(labels: Volume, source: dict[str, int], cohort: dict[str, int]) -> NDArray[np.uint8]:
    """Return the label map (Z, Y, X) with the cohort's ids instead of the source's."""
    new_id = np.zeros(256, dtype=np.uint8)
    for name, value in source.items():
        new_id[value] = cohort[name]
    if all(new_id[value] == value for value in source.values()):
        return labels.values_ZYX
    return np.asarray(new_id[labels.values_ZYX])


def _open_cohort(data_dir: Path, source: Source) -> Cohort:
    """Read the cohort; return an empty one if the folder is missing or holds no case yet."""
    if (data_dir / "cases.csv").is_file():
        return read_cohort(data_dir)
    if data_dir.is_dir():
        # A killed first run leaves these; anything else is somebody's data.
        own = {"dataset.json", "dataset.json.part", "cases.csv.part"}
        own |= {"imagesTr", "labelsTr", ".incoming"}
        if foreign := sorted(path.name for path in data_dir.iterdir() if path.name not in own):
            raise failure("not_a_cohort", f"{data_dir} holding {', '.join(foreign[:5])}")
    return Cohort(data_dir, source.name, {BACKGROUND: 0}, ())


def _merge_labels(
    labels: dict[str, int], added: dict[str, int]
) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
    """Add the labels of a source to those of the cohort; new names get the next free id.

    nnU-Net requires ids without gaps, so a source's id is kept only if it is the next one.

    Returns:
        All labels, and (id in the source, id in the cohort) of each name whose id differs.
    """
    merged = dict(labels)
    for name in sorted(added, key=lambda key: added[key]):
        merged.setdefault(name, len(merged))
    if len(merged) > 256:
        raise failure("dataset_json", f"{len(merged)} labels in all; a label map holds 255")
    moved = {name: (value, merged[name]) for name, value in added.items() if merged[name] != value}
    return merged, moved


def _join_texts(before: object, added: str) -> str:
    """Append a text to a list separated by "; " unless it is in there."""
    before = str(before)
    if not added or f"; {added}; " in f"; {before}; ":
        return before
    return f"{before}; {added}" if before else added
