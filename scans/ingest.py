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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scans.checks import failure
from scans.cohort import (
    BACKGROUND,
    FILE_ENDING,
    Case,
    Cohort,
    check_annotated,
    check_case_name,
    image_path,
    label_path,
    read_cohort,
    read_json,
    write_cases,
    write_json,
)
from scans.errors import ScanError
from scans.files import file_sha256
from scans.layouts import Source, SourceCase, read_source
from scans.volume import Volume, write_volume

Progress = Callable[[Iterable[SourceCase], str, int], Iterator[SourceCase]]


@dataclass(frozen=True)
class Refusal:
    """Why a case stayed out: the parts of a `ScanError`."""

    case: str
    code: str
    found: str
    wanted: str
    cure: str


@dataclass
class IngestReport:
    """What became of a source.

    Attributes:
        source: its folder.
        layout: key of `scans.layouts.LAYOUTS`.
        accepted: names of the cases that went in now.
        skipped: names of the cases that were in already, unchanged.
        refused: what stayed out, and why.
        remapped: label names whose id in the cohort is not the source's, as (source, cohort).
    """

    source: str
    layout: str
    accepted: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    remapped: dict[str, tuple[int, int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain lists and mappings."""
        return asdict(self)


def ingest(
    source: Path,
    data_dir: Path,
    *,
    layout: str | None = None,
    dry_run: bool = False,
    replace: bool = False,
    progress: Progress | None = None,
) -> IngestReport:
    """Bring a folder of annotated scans into the cohort.

    Args:
        source: folder in a layout of `scans.layouts.LAYOUTS`; it is only read.
        data_dir: the cohort, made if it is not there.
        layout: key of `LAYOUTS`; None finds out.
        dry_run: read and check everything, write nothing.
        replace: let a case of the same name and other content take the old one's place.
        progress: wraps the cases, as `tasks.console.track` does.

    Returns:
        What went in, what was there already, what was refused. The refused are also written to
        quarantine.json beside `data_dir`.

    Raises:
        ScanError: the source has no known layout, or `data_dir` is something else than a cohort.
    """
    described = read_source(source, layout)
    cohort = _open_cohort(data_dir, described)
    labels, remapped = _merged_labels(cohort.labels, described.labels)
    report = IngestReport(str(source), described.layout, remapped=remapped)
    writer = _Writer(data_dir, described, labels, {case.name: case for case in cohort.cases})
    cases = described.cases
    for case in progress(cases, "ingest", len(cases)) if progress else cases:
        try:
            done = writer.add(case, dry_run=dry_run, replace=replace)
        except ScanError as error:
            report.refused.append(
                Refusal(case.name, error.code, error.found, error.wanted, error.cure)
            )
        else:
            (report.accepted if done else report.skipped).append(case.name)
    if not dry_run:
        shutil.rmtree(writer.incoming, ignore_errors=True)
        write_json(data_dir.with_name("quarantine.json"), report.to_json())
    return report


class _Writer:
    """Adds cases of one source to a cohort, one at a time."""

    def __init__(
        self, root: Path, source: Source, labels: dict[str, int], cases: dict[str, Case]
    ) -> None:
        self.root = root
        self.source = source
        self.labels = labels
        self.cases = cases
        self.incoming = root / ".incoming"

    def add(self, case: SourceCase, *, dry_run: bool, replace: bool) -> bool:
        """Check and write one case; False if it is there already."""
        name = check_case_name(case.name)
        check_annotated(name, case.annotated, self.labels)
        digest = self._source_digest(case)
        before = self.cases.get(name)
        if before is not None:
            if before.source_sha256 == digest:
                return False
            if not replace:
                raise failure("case_exists", f"{name}, which came from {before.source}")
        scan, labels = case.load()
        labels_ZYX = self._mapped_ids(name, labels)
        if not dry_run:
            self._write(case, digest, scan, labels_ZYX)
        return True

    def _write(
        self, case: SourceCase, digest: str, scan: Volume, labels_ZYX: NDArray[np.uint8]
    ) -> None:
        name = case.name
        for folder in (self.incoming, self.root / "imagesTr", self.root / "labelsTr"):
            folder.mkdir(parents=True, exist_ok=True)
        affine = scan.geometry.own_affine
        image, label = (self.incoming / f"{name}-{part}{FILE_ENDING}" for part in ("ct", "label"))
        write_volume(image, scan.to_own_grid(scan.values_ZYX), affine)
        write_volume(label, scan.to_own_grid(labels_ZYX), affine)
        row = Case(
            name=name,
            patient=case.patient,
            annotated=case.annotated,
            source=f"{self.source.layout}:{self.source.name}",
            image=image_path(self.root, name),
            label=label_path(self.root, name),
            image_sha256=file_sha256(image),
            label_sha256=file_sha256(label),
            source_sha256=digest,
        )
        label.replace(row.label)
        image.replace(row.image)
        self.cases[name] = row
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

    def _source_digest(self, case: SourceCase) -> str:
        """Checksum of all that decides what the case becomes."""
        digest = hashlib.sha256()
        for path in case.files:
            if not path.is_file():
                raise failure("file_missing", f"no file {path}")
            digest.update(file_sha256(path).encode())
        mapping = sorted((key, self.labels[key]) for key in self.source.labels)
        digest.update(repr((case.patient, case.annotated, mapping)).encode())
        return digest.hexdigest()

    def _mapped_ids(self, name: str, labels: Volume) -> NDArray[np.uint8]:
        """Label ids of the source turned into those of the cohort."""
        present = np.zeros(256, dtype=bool)
        for plane in labels.values_ZYX:
            present[plane] = True
        known = {0, *self.source.labels.values()}
        if unknown := [int(value) for value in np.flatnonzero(present) if value not in known]:
            raise failure("label_unknown", f"{name}: ids {unknown}; named are {sorted(known)}")
        new_id = np.zeros(256, dtype=np.uint8)
        for label, value in self.source.labels.items():
            new_id[value] = self.labels[label]
        if (new_id[present] == np.flatnonzero(present)).all():
            return labels.values_ZYX
        return new_id[labels.values_ZYX]


def _open_cohort(data_dir: Path, source: Source) -> Cohort:
    """The cohort, or an empty one where the folder is missing or holds no case yet."""
    has_rows = (data_dir / "cases.csv").is_file()
    if not has_rows and data_dir.is_dir():
        own = {"dataset.json", "dataset.json.part", "cases.csv.part"}
        own |= {"imagesTr", "labelsTr", ".incoming"}
        if strange := sorted(path.name for path in data_dir.iterdir() if path.name not in own):
            raise failure("not_a_cohort", f"{data_dir} holding {', '.join(strange[:5])}")
    if has_rows:
        return read_cohort(data_dir)
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
