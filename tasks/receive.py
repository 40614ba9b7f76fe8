"""From the inbox into the data: look, take in, make a data version, sort away.

A pair is copied to .cache/inbox/landing and taken into data/ of a checkout; what lies in the inbox
is only read until its data version is committed. Then what is to be moved is written down, and
moved. So a run that is killed anywhere leaves every file in the inbox or where it belongs, and the
next run ends as if nothing had been: it moves what is written down, and recognises what is in the
data already.
"""

from __future__ import annotations

import csv
import io
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from fullscale.ingestion.arrivals import Arrivals, Pair, sort_files
from fullscale.ingestion.inbox import Inbox, InboxFile
from fullscale.ingestion.inbox_moves import is_interrupted, plan_moves, sort_away
from fullscale.ingestion.ingest import ingest
from fullscale.runtime.errors import ScanError, StageError
from fullscale.runtime.files import write_atomically
from fullscale.runtime.locks import hold
from fullscale.scans.cohort import FILE_ENDING, Case, read_cohort, read_json, read_table, write_json
from fullscale.versioning.data_version import commit_data, open_newest, restore_data
from fullscale.versioning.provenance import read_data_version

HOME = Path(".cache/inbox")
"""Where work on the inbox stands: what landed, what is to be moved, what was announced."""
LOOK_APART_S = 1.0
CASE_COLUMNS = ("case", "patient", "annotated")

Result = TypeVar("Result")


class RunStep(Protocol):
    """Runs a step under a name, as a task of Prefect say."""

    def __call__(self, name: str, step: Callable[[], Result]) -> Result:
        """Give what the step gives."""
        ...


@dataclass(frozen=True)
class Fate:
    """What became of a pair or file.

    Attributes:
        case: its name, or the path of a file that belongs to no case.
        fate: accepted, already in, quarantined or waiting.
        why: the reason; empty where it was accepted.
    """

    case: str
    fate: str
    why: str = ""


@dataclass
class Outcome:
    """What a run did.

    Attributes:
        fates: of everything in the inbox.
        data_version: MD5 of the new data; None where no pair was accepted.
        patients: patient of each accepted case.
        new_patients: those of them who had no case before.
    """

    fates: list[Fate] = field(default_factory=list)
    data_version: str | None = None
    patients: dict[str, str] = field(default_factory=dict)
    new_patients: tuple[str, ...] = ()

    def names(self, fate: str) -> list[str]:
        """Cases of one fate."""
        return [entry.case for entry in self.fates if entry.fate == fate]


@dataclass
class Taken:
    """What became of pairs that were ready.

    Attributes:
        accepted: now in data/ of the checkout, with their patients.
        already_in: were there, unchanged.
        refused: stay out, each with the reason.
        waiting: changed while they were read.
        old_patients: who had a case before.
    """

    accepted: dict[str, str] = field(default_factory=dict)
    already_in: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, str] = field(default_factory=dict)
    old_patients: set[str] = field(default_factory=set)


def run_plainly(name: str, step: Callable[[], Result]) -> Result:
    """Run a step and nothing else."""
    return step()


def receive(
    root: Path, url: str, settle_s: float, *, num_workers: int = 1, run_step: RunStep = run_plainly
) -> Outcome:
    """Look into the inbox once, and give what is ready its place.

    Args:
        root: the project; nothing in it changes outside .cache and .git.
        url: of the inbox, see `Inbox`.
        settle_s: for how long a file must not have been written to count as complete.
        num_workers: processes that check scans at a time; 0 uses every core.
        run_step: runs each step.

    Raises:
        StageError: inbox, disk, dvc or git fails; run again when that is cured, nothing is lost.
    """
    home = root.resolve() / HOME
    with hold(home / "lock"):
        if is_interrupted(home):
            run_step("sort away", partial(sort_away, home))
        inbox = Inbox(url)
        landing = home / "landing"
        arrivals = run_step("look", partial(look, inbox, settle_s, landing))
        taken, version, is_new = Taken(), "", False
        if arrivals.ready:
            with open_newest(root, "inbox") as checkout:
                work = partial(take_in, inbox, arrivals, landing, checkout, num_workers)
                taken = run_step("ingest", work)
                is_new = bool(taken.accepted)
                num_refused = len(taken.refused) + len(arrivals.hostile)
                if is_new:
                    work_on = partial(commit_data, checkout, list(taken.accepted), num_refused)
                    version = run_step("version", work_on)
                elif taken.already_in:
                    version = read_data_version(checkout)
        pairs = {pair.name: pair for pair in (*arrivals.ready, *arrivals.hostile)}
        refused = taken.refused | {pair.name: pair.why for pair in arrivals.hostile}
        inside = [pairs[name] for name in (*taken.accepted, *taken.already_in)]
        outside = [(pairs[name], why) for name, why in refused.items()]
        if inside or outside:
            plan_moves(home, inbox, version, inside, outside)
            run_step("sort away", partial(sort_away, home))
        shutil.rmtree(landing, ignore_errors=True)
    fates = [
        *(Fate(name, "accepted") for name in taken.accepted),
        *(Fate(name, "already in", "the same pair is in the data") for name in taken.already_in),
        *(Fate(name, "quarantined", why) for name, why in refused.items()),
        *(Fate(pair.name, "waiting", pair.why) for pair in arrivals.waiting),
        *(Fate(name, "waiting", why) for name, why in taken.waiting.items()),
    ]
    new = {patient for patient in taken.accepted.values() if patient not in taken.old_patients}
    return Outcome(fates, version if is_new else None, taken.accepted, tuple(sorted(new)))


def look(inbox: Inbox, settle_s: float, landing: Path) -> Arrivals:
    """Tell what is ready from what waits, after two looks at the inbox.

    Args:
        inbox: only read.
        settle_s: as for `receive`.
        landing: emptied; then it holds the inbox's tables, where pairs are ready.

    Raises:
        StageError: there is no inbox, or its cases.csv cannot be used.
    """
    shutil.rmtree(landing, ignore_errors=True)
    before = inbox.list_files()
    if not before:
        return Arrivals()
    time.sleep(min(settle_s, LOOK_APART_S))
    arrivals = sort_files(before, inbox.list_files(), time.time(), settle_s)
    if not arrivals.ready:
        return arrivals
    for table in arrivals.tables:
        if not table.is_plain:
            raise StageError(f"{table.path} in {inbox.url} is a link; put the file itself there")
        inbox.read(table.path, landing / table.path)
    if not (landing / "cases.csv").is_file():
        return arrivals
    try:
        rows = read_table(landing / "cases.csv", CASE_COLUMNS)
    except ScanError as error:
        raise StageError(f"cases.csv in {inbox.url} cannot be used: {error}") from None
    listed = {row["case"] for row in rows}
    for pair in arrivals.ready:
        if pair.name not in listed:
            why = "cases.csv has no row for it, so its patient is not known"
            arrivals.waiting.append(Pair(pair.name, pair.files, why))
    arrivals.ready = [pair for pair in arrivals.ready if pair.name in listed]
    return arrivals


def take_in(
    inbox: Inbox, arrivals: Arrivals, landing: Path, checkout: Path, num_workers: int
) -> Taken:
    """Bring ready pairs into data/ of a checkout, for training only.

    Args:
        inbox: only read.
        arrivals: of `look`.
        landing: holds the inbox's tables.
        checkout: of `open_newest`; its data/ is restored first.
        num_workers: processes that check scans at a time; 0 uses every core.

    Raises:
        StageError: the disk is full, or dataset.json of the inbox cannot be used.
    """
    restore_data(checkout)
    data_dir = checkout / "data"
    taken = Taken()
    before: tuple[Case, ...] = ()
    labels: dict[str, int] = {}
    name = "inbox"
    if (data_dir / "cases.csv").is_file():
        cohort = read_cohort(data_dir)
        before, labels, name = cohort.cases, cohort.labels, cohort.name
    taken.old_patients = {case.patient for case in before}
    try:
        for pair in arrivals.ready:
            if not all(_land(inbox, file, landing) for file in pair.files):
                taken.waiting[pair.name] = "it changed while it was read"
                for file in pair.files:
                    (landing / file.path).unlink(missing_ok=True)
        landed = [pair.name for pair in arrivals.ready if pair.name not in taken.waiting]
        if not landed:
            return taken
        _write_tables(landing, landed, name, labels)
        report = ingest(
            landing, data_dir, layout="nnunet", training_only=True, num_workers=num_workers
        )
    except ScanError as error:
        raise StageError(f"the tables in {inbox.url} cannot be used: {error}") from None
    except OSError as error:
        raise StageError(
            f"scans from {inbox.url} cannot be taken in: {error}; cure that and run again, "
            "nothing was moved"
        ) from error
    patients = {case.name: case.patient for case in read_cohort(data_dir).cases}
    taken.accepted = {case: patients[case] for case in report.accepted}
    taken.already_in = report.skipped
    for finding in report.refused:
        words = str(finding).replace(f"{landing}/", "")
        said = taken.refused.get(finding.case)
        taken.refused[finding.case] = f"{said}\n{words}" if said else words
    return taken


def _land(inbox: Inbox, file: InboxFile, landing: Path) -> bool:
    """Copy a file of the inbox; whether it was still the one that was looked at."""
    target = landing / file.path
    try:
        inbox.read(file.path, target)
    except FileNotFoundError:
        return False
    return inbox.find(file.path) == file and target.stat().st_size == file.size


def _write_tables(landing: Path, cases: list[str], name: str, labels: dict[str, int]) -> None:
    """Complete dataset.json from the cohort, and keep the rows of the cases that landed."""
    path = landing / "dataset.json"
    if not path.is_file() and not labels:
        raise StageError(
            "there is neither a cohort in data/ nor a dataset.json in the inbox, so no label has "
            "a name; begin the cohort with `fullscale ingest`, or put a dataset.json into the inbox"
        )
    given = read_json(path) if path.is_file() else {"name": name, "labels": labels}
    write_json(path, {**given, "file_ending": FILE_ENDING})
    path = landing / "cases.csv"
    if not path.is_file():
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, CASE_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for row in read_table(path, CASE_COLUMNS) if row["case"] in cases)
    write_atomically(path, text.getvalue())
