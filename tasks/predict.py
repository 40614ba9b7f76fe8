"""Scans one after the other: while one is computed, the next is read and the last one written."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fullscale.prediction.predictor import Predictor
from fullscale.prediction.segmentation import Model, OrganFound, Segmented, segment_scan
from fullscale.runtime.console import say, track
from fullscale.runtime.errors import ScanError, StageError
from fullscale.runtime.prefetch import ahead
from fullscale.serving.input_checks import Doubt, judge_scan
from fullscale.serving.outputs import Targets, write_outputs
from fullscale.serving.scan_files import NIFTI_SUFFIXES, Scan, ScanInput, find_inputs, read_scan

_SUFFIXES = {
    "OUT": NIFTI_SUFFIXES,
    "--preview": (".png",),
    "--statistics": (".json",),
    "--dicom-seg": (".dcm",),
}

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


@dataclass(frozen=True)
class Job:
    """One scan and what becomes of it."""

    source: ScanInput
    targets: Targets


def plan_jobs(
    source: Path,
    target: Path,
    *,
    probabilities: bool = False,
    preview: Path | None = None,
    statistics: Path | None = None,
    dicom_seg: Path | None = None,
) -> list[Job]:
    """Find the scans and name what is written for each.

    Args:
        source: a NIfTI file, a DICOM series' folder, or a folder of either.
        target: a .nii or .nii.gz file for a single scan, else a folder. So are the others: files
            for a single scan, else folders.
        probabilities: write them beside the label map.
        preview: of pictures.
        statistics: of JSON.
        dicom_seg: of DICOM segmentations; scans that are not DICOM have none.

    Raises:
        StageError: there is no scan, or a name does not suit.
    """
    inputs, is_single = find_inputs(source)
    if dicom_seg is not None and not any(each.is_dicom for each in inputs):
        raise StageError(
            f"--dicom-seg refers to a DICOM series, and {source} holds none; leave it out"
        )
    places = {
        "OUT": target,
        "--preview": preview,
        "--statistics": statistics,
        "--dicom-seg": dicom_seg,
    }
    named = {option: path for option, path in places.items() if path is not None}
    if is_single:
        _check_files(source, named)
        return [Job(inputs[0], Targets(target, probabilities, preview, statistics, dicom_seg))]
    _check_folders(source, named)

    def place(folder: Path | None, name: str) -> Path | None:
        return None if folder is None else folder / name

    return [
        Job(
            each,
            Targets(
                target / f"{each.name}.nii.gz",
                probabilities,
                place(preview, f"{each.name}.png"),
                place(statistics, f"{each.name}.json"),
                place(dicom_seg, f"{each.name}.dcm") if each.is_dicom else None,
            ),
        )
        for each in inputs
    ]


def _check_files(source: Path, named: dict[str, Path]) -> None:
    for option, path in named.items():
        if not path.name.lower().endswith(_SUFFIXES[option]) or path.is_dir():
            raise StageError(
                f"found {option} {path}; for a single scan wanted a file named "
                f"{' or '.join(_SUFFIXES[option])}"
            )
        if path.resolve() == source.resolve():
            raise StageError(f"IN and {option} are both {source}; name another file to write")


def _check_folders(source: Path, named: dict[str, Path]) -> None:
    for option, path in named.items():
        if path.is_file() or path.name.lower().endswith(_SUFFIXES[option]):
            raise StageError(
                f"found {option} {path}; for a folder of scans wanted a folder, which gets a file "
                "for each"
            )
        if path.resolve().is_relative_to(source.resolve()):
            raise StageError(
                f"{option} {path} lies in {source}, where another run would take what this one "
                "writes for scans; name a folder outside"
            )
