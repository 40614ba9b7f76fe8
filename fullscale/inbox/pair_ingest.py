"""Ingest the ready pairs of the inbox into a checkout of the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fullscale.inbox.arrivals import Arrivals
from fullscale.inbox.inbox import Inbox, InboxFile
from fullscale.ingestion.cohort_writer import IngestOptions
from fullscale.ingestion.ingest import ingest
from fullscale.runtime.errors import ScanError, StageError
from fullscale.runtime.files import write_json
from fullscale.scans.cohort import (
    FILE_ENDING,
    IGNORE,
    IGNORED_ID,
    Case,
    read_cohort,
    read_json,
    read_source_rows,
    write_source_rows,
)
from fullscale.versioning.data_version import restore_data


@dataclass
class IngestResult:
    """The result for the pairs that were ready.

    Attributes:
        accepted: patient of each case that is now in data/ of the checkout.
        already_in: names of cases that data/ held before, unchanged.
        refused: reason of each case that stays out.
        waiting: reason of each case that changed while it was read.
        known_patients: patients who had a case in data/ before.
    """

    accepted: dict[str, str] = field(default_factory=dict)
    already_in: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, str] = field(default_factory=dict)
    known_patients: set[str] = field(default_factory=set)


def ingest_ready_pairs(
    inbox: Inbox, arrivals: Arrivals, landing: Path, checkout: Path, num_workers: int
) -> IngestResult:
    """Copy ready pairs to this machine and ingest them, for training only.

    Args:
        inbox: only read.
        arrivals: result of `list_arrivals`.
        landing: local folder with the inbox's tables; receives the pairs.
        checkout: worktree of `open_newest`; its data/ is restored first.
        num_workers: processes that check scans; 0 uses every core.

    Raises:
        StageError: the disk is full, or dataset.json of the inbox cannot be used.
    """
    restore_data(checkout)
    data_dir = checkout / "data"
    result = IngestResult()
    before: tuple[Case, ...] = ()
    labels: dict[str, int] = {}
    name = "inbox"
    if (data_dir / "cases.csv").is_file():
        cohort = read_cohort(data_dir)
        before, labels, name = cohort.cases, cohort.labels, cohort.name
    result.known_patients = {case.patient for case in before}
    try:
        for pair in arrivals.ready:
            if not all(_copy_unchanged(inbox, file, landing) for file in pair.files):
                result.waiting[pair.name] = "it changed while it was read"
                for file in pair.files:
                    (landing / file.path).unlink(missing_ok=True)
        copied = [pair.name for pair in arrivals.ready if pair.name not in result.waiting]
        if not copied:
            return result
        _complete_tables(landing, copied, name, labels)
        options = IngestOptions(layout="nnunet", training_only=True)
        report = ingest(landing, data_dir, options, num_workers=num_workers)
    except ScanError as error:
        raise StageError(f"the tables in {inbox.url} cannot be used: {error}") from None
    except OSError as error:
        raise StageError(
            f"scans from {inbox.url} cannot be ingested: {error}; fix that and run again, "
            "nothing was moved"
        ) from error
    patients = {case.name: case.patient for case in read_cohort(data_dir).cases}
    result.accepted = {case: patients[case] for case in report.accepted}
    result.already_in = report.skipped
    for finding in report.refused:
        # The owner of the scan knows the inbox, not the local copy.
        text = str(finding).replace(f"{landing}/", "")
        others = result.refused.get(finding.case)
        result.refused[finding.case] = f"{others}\n{text}" if others else text
    return result


def _copy_unchanged(inbox: Inbox, file: InboxFile, landing: Path) -> bool:
    """Copy a file of the inbox; return False if it is not the listed file any more."""
    target = landing / file.path
    try:
        inbox.read(file.path, target)
    except FileNotFoundError:
        return False
    return inbox.find(file.path) == file and target.stat().st_size == file.size


def _complete_tables(landing: Path, cases: list[str], name: str, labels: dict[str, int]) -> None:
    """Complete dataset.json from the cohort, and reduce cases.csv to the copied cases."""
    path = landing / "dataset.json"
    if not path.is_file() and not labels:
        raise StageError(
            "there is neither a cohort in data/ nor a dataset.json in the inbox, so no label has "
            "a name; begin the cohort with `fullscale ingest`, or put a dataset.json into the inbox"
        )
    ids = {**labels, IGNORE: IGNORED_ID}
    content = read_json(path) if path.is_file() else {"name": name, "labels": ids}
    write_json(path, {**content, "file_ending": FILE_ENDING})
    rows = read_source_rows(landing)
    if rows is not None:
        kept = [row for case, found in rows.items() if case in cases for row in found]
        write_source_rows(landing, kept)
