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
from dataclasses import replace
from functools import partial
from pathlib import Path
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from fullscale.ingestion.case_checks import inspect_case
from fullscale.ingestion.cohort_writer import (
    PATIENTS_NAME,
    CohortWriter,
    IngestOptions,
    IngestReport,
    PreparedCase,
)
from fullscale.ingestion.layouts import read_source
from fullscale.ingestion.source import Source, SourceCase, rename_labels
from fullscale.runtime.errors import ScanError
from fullscale.runtime.files import file_sha256, write_json
from fullscale.runtime.locks import acquire_lock
from fullscale.scans.checks import Finding, failure
from fullscale.scans.cohort import (
    BACKGROUND,
    FILE_ENDING,
    IGNORED_ID,
    Case,
    Cohort,
    check_annotated,
    checksum,
    read_cohort,
)
from fullscale.scans.parallel import Compute, map_cases
from fullscale.scans.volume import Volume, write_volume

Progress = Callable[[Iterable["PreparedCase"], str, int], Iterator["PreparedCase"]]


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
        ScanError: the source has no known layout, `data_dir` is not a cohort, or it changed while
            the run wrote it.
    """
    parsed = read_source(source, options.layout)
    if options.dry_run:
        return _ingest(parsed, source, data_dir, options, num_workers, progress)
    # Two runs at once would write each other's table.
    with acquire_lock(data_dir.parent / ".cache" / f"ingest-{data_dir.name}.lock"):
        return _ingest(parsed, source, data_dir, options, num_workers, progress)


def _ingest(
    parsed: Source,
    source: Path,
    data_dir: Path,
    options: IngestOptions,
    num_workers: int,
    progress: Progress | None,
) -> IngestReport:
    cohort = _open_cohort(data_dir, parsed)
    parsed = rename_labels(parsed, cohort.labels)
    labels, remapped = _merge_labels(cohort.labels, parsed.labels)
    report = IngestReport(str(source), parsed.layout, remapped=remapped)
    report.num_found = len(parsed.cases) + len(parsed.refused)
    report.num_refused = len(parsed.refused)
    report.warnings += parsed.findings
    report.unread += [str(path.relative_to(source)) for path in parsed.unread]
    report.refused += [Finding.from_error(case, error) for case, error in parsed.refused]
    incoming = data_dir / ".incoming"
    prepare = partial(
        _prepare,
        source=replace(parsed, cases=(), refused=()),  # small to send to the workers
        labels=labels,
        known={case.name.casefold(): case for case in cohort.cases},
        incoming=None if options.dry_run else incoming.resolve(),
        replace_changed=options.replace_changed,
        strict=options.strict,
        accepted=options.accepted,
    )
    results = map_cases(prepare, parsed.cases, Compute(num_workers=num_workers))
    total = len(parsed.cases)
    writer = CohortWriter(data_dir, parsed, labels, cohort, options)
    shown = progress(results, "ingest", total) if progress else results
    for prepared in writer.forget_replaced(shown) if options.replace_changed else shown:
        writer.add(prepared, report)
    if not options.dry_run:
        shutil.rmtree(incoming, ignore_errors=True)
    writer.check_complete(report)
    if not options.dry_run:
        write_json(data_dir.with_name("quarantine.json"), report.to_json())
    return report


def _prepare(
    case: SourceCase,
    *,
    source: Source,
    labels: dict[str, int],
    known: dict[str, Case],
    incoming: Path | None,
    replace_changed: bool,
    strict: bool,
    accepted: tuple[str, ...],
) -> PreparedCase:
    """Read, check and write one case to the folder .incoming; runs in a worker process."""
    blank = PreparedCase(case.name, case.patient, case.annotated, case.patient_id)
    try:
        check_annotated(case.name, case.annotated, labels)
        digest = _source_digest(case, source, labels)
        # Names that differ in letter case only are one file on some systems.
        old = known.get(case.name.casefold())
        if old is not None and (old.name, old.source_sha256) == (case.name, digest):
            return replace(blank, is_unchanged=True)
        if old is not None and not (replace_changed and old.name == case.name):
            raise failure("case_exists", f"{case.name}; {old.name} came from {old.source}")
    except ScanError as error:
        return replace(blank, findings=(Finding.from_error(case.name, error),))
    result = inspect_case(case, source.labels, strict=strict, accepted=accepted)
    checked = replace(blank, findings=tuple(result.findings), source_sha256=digest)
    if result.is_refused or result.scan is None or result.labels is None or result.facts is None:
        return checked
    checked = replace(
        checked,
        voxels_sha256=result.facts.voxels_sha256,
        slice_digests=result.facts.slice_digests,
    )
    if incoming is None:
        return checked
    incoming.mkdir(parents=True, exist_ok=True)
    image, label = (incoming / f"{uuid4().hex}{FILE_ENDING}" for _ in range(2))
    geometry = result.scan.geometry
    write_volume(image, geometry.to_own_grid(result.scan.values_ZYX), geometry.own_affine)
    new_labels = _map_ids(result.labels, source.labels, labels, case.ignored)
    write_volume(label, geometry.to_own_grid(new_labels), geometry.own_affine)
    return replace(
        checked,
        image=image,
        label=label,
        image_sha256=file_sha256(image),
        label_sha256=file_sha256(label),
    )


def _source_digest(case: SourceCase, source: Source, labels: dict[str, int]) -> str:
    """Return the SHA-256 of everything that determines the ingested case."""
    digest = hashlib.sha256()
    for path in case.files:
        digest.update(checksum(path).encode())
    mapping = sorted((value, labels[name]) for name, value in source.labels.items())
    mapping += [(case.ignored, IGNORED_ID)] if case.ignored else []
    digest.update(repr((case.patient, case.annotated, mapping)).encode())
    return digest.hexdigest()


def _map_ids(
    labels: Volume, source: dict[str, int], cohort: dict[str, int], ignored: int
) -> NDArray[np.uint8]:
    """Return the label map (Z, Y, X) with the cohort's ids instead of the source's."""
    new_ids = {value: cohort[name] for name, value in source.items()}
    if ignored:
        new_ids[ignored] = IGNORED_ID
    if all(new == value for value, new in new_ids.items()):
        return labels.values_ZYX
    new_id = np.zeros(256, dtype=np.uint8)
    new_id[list(new_ids)] = list(new_ids.values())
    return np.asarray(new_id[labels.values_ZYX])


def _open_cohort(data_dir: Path, source: Source) -> Cohort:
    """Read the cohort; return an empty one if the folder is missing or holds no case yet."""
    if (data_dir / "cases.csv").is_file():
        return read_cohort(data_dir)
    if data_dir.is_dir():
        # A killed first run leaves these; anything else is somebody's data.
        own = {"dataset.json", "dataset.json.part", "cases.csv.part"}
        own |= {"imagesTr", "labelsTr", ".incoming", PATIENTS_NAME, f"{PATIENTS_NAME}.part"}
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
    if len(merged) > IGNORED_ID:
        raise failure("labels_too_many", f"{len(merged) - 1} labels in all")
    moved = {name: (value, merged[name]) for name, value in added.items() if merged[name] != value}
    return merged, moved
