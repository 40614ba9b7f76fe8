"""Scans one after the other: while one is computed, the next is read and the last one written."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from scans.errors import ScanError
from tasks.ahead import ahead
from tasks.console import StageError, say, track
from tasks.input_checks import Doubt, judge_scan
from tasks.inputs import Scan, read_scan
from tasks.jobs import Job
from tasks.outputs import write_outputs
from tasks.predict import Predictor
from tasks.segment import Model, OrganFound, Segmented, segment_scan

Curable = (ScanError, StageError, OSError)
"""What is wrong with one scan and no reason to stop the others."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        job: which.
        organs: what was found; None if it failed.
        error: why it failed; None if it did not.
    """

    job: Job
    organs: dict[str, OrganFound] | None
    error: str | None


@dataclass(frozen=True, eq=False)
class _Computed:
    scan: Scan
    found: Segmented
    doubts: list[Doubt]


def run_jobs(
    jobs: Sequence[Job], predictor: Predictor, model: Model, *, strict: bool = False
) -> list[Outcome]:
    """Segment and write every scan; a bad one is told of on stderr and the others go on.

    At most four scans are in memory: one computed, one written, one read and one being read.

    Args:
        jobs: what to do.
        predictor: of the model's network.
        model: told of in what is written.
        strict: refuse scans that are not like those that the network was trained on.
    """
    outcomes: list[Outcome] = []
    pending: Future[Outcome] | None = None
    is_single = len(jobs) == 1
    scans = ahead(_read(job) for job in jobs)
    with ThreadPoolExecutor(1, thread_name_prefix="writer") as writer:
        for job, scan in scans if is_single else track(scans, "scans", len(jobs)):
            done = _compute(job, scan, predictor, strict=strict, show_slices=is_single)
            del scan
            if pending is not None:
                outcomes.append(pending.result())
            pending = writer.submit(_write, job, done, model)
            del done
        if pending is not None:
            outcomes.append(pending.result())
    for outcome in outcomes:
        if outcome.error is not None:
            say(f"error: {outcome.job.source.name}: {outcome.error}")
    return outcomes


def _read(job: Job) -> tuple[Job, Scan | str]:
    try:
        return job, read_scan(job.source)
    except Curable as error:
        return job, str(error)


def _compute(
    job: Job, scan: Scan | str, predictor: Predictor, *, strict: bool, show_slices: bool
) -> _Computed | str:
    """What was found, or why nothing was."""
    if isinstance(scan, str):
        return scan
    doubts = judge_scan(scan.volume, predictor.description)
    if strict and doubts:
        return "; ".join(str(each) for each in doubts) + " (refused by --strict)"
    for doubt in doubts:
        say(f"warning: {job.source.name}: {doubt}")
    try:
        found = segment_scan(
            predictor,
            scan.volume,
            keep_probabilities=job.targets.probabilities,
            progress=track if show_slices else None,
        )
    except Curable as error:
        return str(error)
    return _Computed(scan, found, doubts)


def _write(job: Job, done: _Computed | str, model: Model) -> Outcome:
    if isinstance(done, str):
        return Outcome(job, None, done)
    try:
        write_outputs(job.source, done.scan, done.found, done.doubts, model, job.targets)
    except Curable as error:
        return Outcome(job, None, str(error))
    return Outcome(job, done.found.organs, None)
