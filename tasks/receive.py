"""Receive scans from the inbox: check them, commit a new data version, move the originals.

A pair is copied to .cache/inbox/landing and ingested into data/ of a checkout; the inbox is only
read until the data version is committed. Then the planned moves are written to a file and made. A
run that is killed at any point therefore leaves every file in the inbox or in its final place. The
next run finishes the planned moves and recognises pairs that the data already hold.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from fullscale.inbox.arrivals import list_arrivals
from fullscale.inbox.inbox import LOCK, WORK_DIR, Inbox
from fullscale.inbox.moves import has_planned_moves, make_moves, plan_moves
from fullscale.inbox.pair_ingest import IngestResult, ingest_ready_pairs
from fullscale.runtime.locks import acquire_lock
from fullscale.versioning.data_version import commit_data, find_unannounced, open_newest
from fullscale.versioning.provenance import read_data_version
from fullscale.versioning.worktree import INBOX

Result = TypeVar("Result")


class RunStep(Protocol):
    """Run a named step, for example as a Prefect task."""

    def __call__(self, name: str, step: Callable[[], Result]) -> Result:
        """Return the result of the step."""
        ...


@dataclass(frozen=True)
class CaseOutcome:
    """The result for one case, or for one file of the inbox that belongs to no case.

    Attributes:
        case: name of the case, or path of the file.
        status: accepted, already in, quarantined or waiting.
        reason: empty if the case was accepted.
    """

    case: str
    status: str
    reason: str = ""


@dataclass
class InboxResult:
    """The result of one run.

    Attributes:
        cases: one entry for everything in the inbox.
        data_version: MD5 of the new data; None if no pair was accepted.
        patients: patient of each accepted case.
        new_patients: patients among them who had no case before.
    """

    cases: list[CaseOutcome] = field(default_factory=list)
    data_version: str | None = None
    patients: dict[str, str] = field(default_factory=dict)
    new_patients: tuple[str, ...] = ()

    def names(self, status: str) -> list[str]:
        """Return the names of the cases with a status."""
        return [entry.case for entry in self.cases if entry.status == status]


class InboxWatch:
    """Find out whether `receive` would do anything, or say anything new, without doing it.

    Args:
        root: the project.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._waiting: list[tuple[str, str]] = []

    def has_news(self, url: str, settle_s: float) -> bool:
        """Return whether pairs can be received, others wait than before, or work was left.

        Args:
            url: folder or URL of the inbox.
            settle_s: see `receive`.

        Raises:
            StageError: the inbox is missing, or a table in it cannot be used.
        """
        work_dir = self.root / WORK_DIR
        arrivals = list_arrivals(Inbox(url), settle_s, work_dir / "look")
        waiting = [(pair.name, pair.reason) for pair in arrivals.waiting]
        before, self._waiting = self._waiting, waiting
        return bool(
            arrivals.ready
            or arrivals.unsafe
            or (waiting and waiting != before)
            or has_planned_moves(work_dir)
            or find_unannounced(self.root)
        )


def run_directly(name: str, step: Callable[[], Result]) -> Result:
    """Run a step as a plain call."""
    return step()


def receive(
    root: Path,
    url: str,
    settle_s: float,
    *,
    num_workers: int = 1,
    run_step: RunStep = run_directly,
    code_branch: str | None = None,
) -> InboxResult:
    """Read the inbox once; accept, quarantine or leave every file in it.

    Args:
        root: the project; nothing in it changes outside .cache and .git.
        url: folder or URL of the inbox, see `Inbox`.
        settle_s: a file counts as complete if it was not written for this long, in seconds.
        num_workers: processes that check scans; 0 uses every core.
        run_step: runs each step.
        code_branch: see `find_code`; scans that people added on it count as in the data.

    Raises:
        StageError: inbox, disk, dvc or git fails. No scan is lost; run again when that is fixed.
    """
    work_dir = root.resolve() / WORK_DIR
    with acquire_lock(root.resolve() / LOCK):
        if has_planned_moves(work_dir):
            run_step("move files", partial(make_moves, work_dir))
        inbox = Inbox(url)
        landing = work_dir / "landing"
        arrivals = run_step("list inbox", partial(list_arrivals, inbox, settle_s, landing))
        result, version, is_new = IngestResult(), "", False
        if arrivals.ready:
            with open_newest(root, INBOX, code_branch) as checkout:
                step = partial(ingest_ready_pairs, inbox, arrivals, landing, checkout, num_workers)
                result = run_step("ingest", step)
                is_new = bool(result.accepted)
                num_refused = len(result.refused) + len(arrivals.unsafe)
                if is_new:
                    commit = partial(commit_data, checkout, list(result.accepted), num_refused)
                    version = run_step("commit data version", commit)
                elif result.already_in:
                    version = read_data_version(checkout)
        pairs = {pair.name: pair for pair in (*arrivals.ready, *arrivals.unsafe)}
        refused = result.refused | {pair.name: pair.reason for pair in arrivals.unsafe}
        accepted = [pairs[name] for name in (*result.accepted, *result.already_in)]
        quarantined = [(pairs[name], reason) for name, reason in refused.items()]
        if accepted or quarantined:
            plan_moves(work_dir, inbox, version, accepted, quarantined)
            run_step("move files", partial(make_moves, work_dir))
        shutil.rmtree(landing, ignore_errors=True)
    already = "the same pair is in the data"
    cases = [
        *(CaseOutcome(name, "accepted") for name in result.accepted),
        *(CaseOutcome(name, "already in", already) for name in result.already_in),
        *(CaseOutcome(name, "quarantined", reason) for name, reason in refused.items()),
        *(CaseOutcome(pair.name, "waiting", pair.reason) for pair in arrivals.waiting),
        *(CaseOutcome(name, "waiting", reason) for name, reason in result.waiting.items()),
    ]
    new_patients = set(result.accepted.values()) - result.known_patients
    return InboxResult(
        cases, version if is_new else None, result.accepted, tuple(sorted(new_patients))
    )
