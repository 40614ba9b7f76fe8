"""Segment scans one after the other; reading and writing overlap with computing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from fullscale.prediction.predictor import Predictor
from fullscale.prediction.segmentation import Model, OrganFound, Segmented, segment_scan
from fullscale.runtime.console import track
from fullscale.runtime.errors import ScanError, StageError
from fullscale.runtime.prefetch import prefetch
from fullscale.scans.dicom_seg_writer import check_referable
from fullscale.serving.input_checks import InputWarning, check_scan
from fullscale.serving.outputs import write_outputs
from fullscale.serving.prediction_jobs import PredictionJob
from fullscale.serving.scan_files import LoadedScan, load_scan

logger = logging.getLogger(__name__)

_ERRORS_OF_ONE_SCAN = (ScanError, StageError, OSError)


@dataclass(frozen=True)
class PredictionOutcome:
    """The result of one job.

    Attributes:
        job: the job.
        organs: measurements of each organ; None if the job failed.
        error: the reason of the failure; None if the job succeeded.
    """

    job: PredictionJob
    organs: dict[str, OrganFound] | None
    error: str | None


@dataclass(frozen=True, eq=False)
class _Computed:
    scan: LoadedScan
    found: Segmented
    input_warnings: list[InputWarning]


def predict(
    jobs: Sequence[PredictionJob], predictor: Predictor, model: Model, *, strict: bool = False
) -> list[PredictionOutcome]:
    """Segment every scan and write its output files.

    A scan that fails is logged as an error and does not stop the others. At most four scans are in
    memory: one being computed, one being written, one ready and one being read.

    Args:
        jobs: scans and their output files.
        predictor: with the network of the model.
        model: its name, version and threshold go into the outputs.
        strict: refuse scans that `check_scan` warns about.

    Returns:
        One outcome for each job, in the same order.
    """
    outcomes: list[PredictionOutcome] = []
    pending: Future[PredictionOutcome] | None = None
    is_single = len(jobs) == 1
    scans = prefetch(_load(job) for job in jobs)
    with ThreadPoolExecutor(1, thread_name_prefix="writer") as writer:
        for job, scan in scans if is_single else track(scans, "scans", len(jobs)):
            done = _compute(job, scan, predictor, strict=strict, show_slices=is_single)
            del scan  # frees the memory before the wait, as does the other `del`
            if pending is not None:
                outcomes.append(pending.result())
            pending = writer.submit(_write, job, done, model)
            del done
        if pending is not None:
            outcomes.append(pending.result())
    for outcome in outcomes:
        if outcome.error is not None:
            logger.error(f"error: {outcome.job.source.name}: {outcome.error}")
    return outcomes


def _load(job: PredictionJob) -> tuple[PredictionJob, LoadedScan | str]:
    """Return the job with its scan, or with the reason why the scan cannot be read."""
    try:
        scan = load_scan(job.source)
        wanted = job.paths.dicom_seg or job.paths.rtstruct
        if wanted is not None and scan.order is not None:
            check_referable(scan.order)
        return job, scan
    except _ERRORS_OF_ONE_SCAN as error:
        return job, str(error)


def _compute(
    job: PredictionJob,
    scan: LoadedScan | str,
    predictor: Predictor,
    *,
    strict: bool,
    show_slices: bool,
) -> _Computed | str:
    """Return the segmentation, or the reason of the failure."""
    if isinstance(scan, str):
        return scan
    input_warnings = check_scan(scan.volume, predictor.description)
    if strict and input_warnings:
        return "; ".join(str(each) for each in input_warnings) + " (refused by --strict)"
    for each in input_warnings:
        logger.warning(f"warning: {job.source.name}: {each}")
    try:
        found = segment_scan(
            predictor,
            scan.volume,
            keep_probabilities=job.paths.probabilities,
            progress=track if show_slices else None,
        )
    except _ERRORS_OF_ONE_SCAN as error:
        return str(error)
    return _Computed(scan, found, input_warnings)


def _write(job: PredictionJob, done: _Computed | str, model: Model) -> PredictionOutcome:
    if isinstance(done, str):
        return PredictionOutcome(job, None, done)
    try:
        write_outputs(job, done.scan, done.found, done.input_warnings, model)
    except _ERRORS_OF_ONE_SCAN as error:
        return PredictionOutcome(job, None, str(error))
    return PredictionOutcome(job, done.found.organs, None)
