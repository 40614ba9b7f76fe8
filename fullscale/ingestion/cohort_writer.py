"""Write checked cases into the cohort one at a time, and count what became of each."""

from __future__ import annotations

import hmac
import secrets
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fullscale.ingestion.case_checks import CrossChecks
from fullscale.ingestion.source import Source
from fullscale.runtime.files import write_json
from fullscale.scans.checks import Finding, failure
from fullscale.scans.cohort import (
    FILE_ENDING,
    IGNORE,
    IGNORED_ID,
    Case,
    Cohort,
    image_path,
    label_path,
    read_cohort,
    read_json,
    write_cases,
)

PATIENTS_NAME = "patients.json"


@dataclass
class IngestReport:
    """The result of one call of `ingest`.

    Attributes:
        source: folder of the source.
        layout: key of `fullscale.ingestion.layouts.LAYOUTS`.
        num_found: number of cases of the source; each is accepted, skipped or refused.
        accepted: names of the cases that were added (in a dry run, that would be added).
        skipped: names of the cases that the cohort held already, unchanged.
        num_refused: number of cases that were kept out.
        refused: findings that kept cases out, one or more for each.
        warnings: warnings and notes on accepted cases, and on the source.
        unread: files of the source that belong to no case.
        remapped: (id in the source, id in the cohort) by label name, where the two differ.
    """

    source: str
    layout: str
    num_found: int = 0
    accepted: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    num_refused: int = 0
    refused: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
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
        accepted: codes of refusals of judgement that are warnings in this run.
    """

    layout: str | None = None
    dry_run: bool = False
    replace_changed: bool = False
    training_only: bool = False
    strict: bool = False
    accepted: tuple[str, ...] = ()


@dataclass(frozen=True)
class PreparedCase:
    """A case that was read and checked, with its new files in the folder .incoming."""

    case: str
    patient: str
    annotated: tuple[str, ...]
    patient_id: str = field(default="", repr=False)
    findings: tuple[Finding, ...] = ()
    is_unchanged: bool = False
    source_sha256: str = ""
    voxels_sha256: str = ""
    slice_digests: tuple[str, ...] = ()
    image: Path | None = None
    label: Path | None = None
    image_sha256: str = ""
    label_sha256: str = ""

    @property
    def is_refused(self) -> bool:
        """True if a finding refuses the case."""
        return any(finding.severity == "refused" for finding in self.findings)


class PatientRegister:
    """Find the patient of a case: by spelling, or by the id that a DICOM header gives.

    The file patients.json of the cohort holds a random key, and the name of each patient by the
    HMAC-SHA256 of the header's id under that key; it never holds the id.

    Args:
        root: the cohort.
        patients: names of its patients.
    """

    def __init__(self, root: Path, patients: Iterable[str]) -> None:
        self._path = root / PATIENTS_NAME
        content = read_json(self._path) if self._path.is_file() else {}
        self._key = str(content.get("key") or secrets.token_hex(32))
        self._named = {str(key): str(name) for key, name in content.get("patients", {}).items()}
        self._spelled = {name.casefold(): name for name in patients}

    def find_name(self, patient: str, header_id: str, before: str = "") -> str:
        """Return the name under which the cohort has a patient, or a free one for a new patient.

        Args:
            patient: name in the source; letter case makes no other patient.
            header_id: PatientID of the DICOM header, or empty.
            before: patient of the row that the case replaces, or empty.
        """
        known = self._spelled.get(patient.casefold())
        if not header_id:
            return known or patient
        digest = self._digest(header_id)
        if digest in self._named:
            return self._named[digest]
        # A source names its patients after cases, so equal names need not be one patient.
        is_free = known is None or known == before
        return patient if is_free else f"{patient}_{digest[:8]}"

    def remember(self, patient: str, header_id: str) -> bool:
        """Note the name of a patient; return True if the file must be written."""
        self._spelled.setdefault(patient.casefold(), patient)
        if not header_id or self._digest(header_id) in self._named:
            return False
        self._named[self._digest(header_id)] = patient
        return True

    def write(self) -> None:
        """Write patients.json atomically."""
        write_json(self._path, {"key": self._key, "patients": dict(sorted(self._named.items()))})

    def _digest(self, header_id: str) -> str:
        text = unicodedata.normalize("NFKC", header_id).casefold().strip()
        return hmac.new(bytes.fromhex(self._key), text.encode(), "sha256").hexdigest()


class CohortWriter:
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
        self.patients = PatientRegister(root, patients)
        slices = {each: case.name for case in cohort.cases for each in case.slice_digests}
        self.cross_checks = CrossChecks(voxels, patients, slices)

    def forget_replaced(self, prepared: Iterable[PreparedCase]) -> list[PreparedCase]:
        """Return cases for `add`, which then compares none with content that one of them replaces.

        So two scans may exchange their names. Replacements come first: one that is refused after
        all leaves its old content there, with which the new cases are compared.
        """
        cases = sorted(prepared, key=lambda each: each.case not in self.cases)
        for each in cases:
            if each.case in self.cases and not (each.is_refused or each.is_unchanged):
                self.cross_checks.forget(self.cases[each.case].voxels_sha256)
        return cases

    def add(self, prepared: PreparedCase, report: IngestReport) -> None:
        """Add one case, or report why it is refused."""
        findings = list(prepared.findings)
        old = self.cases.get(prepared.case)
        before = old.patient if old else ""
        if prepared.is_unchanged:
            report.skipped.append(prepared.case)
            self._remember(before, prepared.patient_id)
            return
        patient = self.patients.find_name(prepared.patient, prepared.patient_id, before)
        alike = self.cross_checks.find_alike(prepared.slice_digests)
        if alike != prepared.case and alike in self.cases:
            patient = self.cases[alike].patient
        prepared = replace(prepared, patient=patient)
        if not prepared.is_refused:
            findings += self.cross_checks.check(
                prepared.case, patient, prepared.voxels_sha256, prepared.slice_digests
            )
        refused = [finding for finding in findings if finding.severity == "refused"]
        report.refused += refused
        if refused:
            report.num_refused += 1
            if old:
                self.cross_checks.remember(old.voxels_sha256, old.name)
            return
        report.warnings += findings
        report.accepted.append(prepared.case)
        self._remember(patient, prepared.patient_id)
        if not self.options.dry_run:
            self._write(prepared)

    def check_complete(self, report: IngestReport) -> None:
        """Check that every case found has one outcome, and that accepted ones are in the cohort.

        Raises:
            ScanError: a case is missing, or another program changed the cohort meanwhile.
        """
        num_told = len(report.accepted) + len(report.skipped) + report.num_refused
        if num_told != report.num_found:
            raise failure("cohort_incomplete", f"{report.num_found} cases, {num_told} outcomes")
        if self.options.dry_run or not report.num_usable:
            return
        rows = {case.name for case in read_cohort(self.root).cases}
        if lost := sorted({*report.accepted, *report.skipped} - rows):
            raise failure("cohort_incomplete", f"no row for {', '.join(lost[:10])}")

    def _remember(self, patient: str, header_id: str) -> None:
        """Note a patient, in the cohort before the row that names it."""
        if self.patients.remember(patient, header_id) and not self.options.dry_run:
            self.patients.write()

    def _write(self, prepared: PreparedCase) -> None:
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
            slice_digests=prepared.slice_digests,
            training_only=self.options.training_only,
            accepted=tuple(
                sorted({f.code for f in prepared.findings if f.code in self.options.accepted})
            ),
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
        marks = IGNORE in kept.get("labels", {}) or any(case.ignored for case in self.source.cases)
        return {
            **kept,
            **joined,
            "channel_names": {"0": "CT"},
            "labels": self.labels | ({IGNORE: IGNORED_ID} if marks else {}),
            "numTraining": len(self.cases),
            "file_ending": FILE_ENDING,
        }


def _join_texts(before: object, added: str) -> str:
    """Append a text to a list separated by "; " unless it is in there."""
    before = str(before)
    if not added or f"; {added}; " in f"; {before}; ":
        return before
    return f"{before}; {added}" if before else added
