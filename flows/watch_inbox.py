"""Watch the inbox: scans that landed become a data version, and whoever listens is told.

`python -m flows.watch_inbox` looks once; a deployment looks on schedule.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.settings import PREFECT_API_URL

from flows.events import EVENT, emit
from fullscale.params import load_params
from fullscale.runtime.errors import ScanError, StageError
from fullscale.versioning.data_version import find_unannounced, mark_announced
from tasks.receive import Outcome, receive

INBOX_VARIABLE = "FULLSCALE_INBOX"

Result = TypeVar("Result")


@flow(name="watch-inbox", log_prints=True)
def watch_inbox(
    root: Path | None = None, inbox: str | None = None, settle_s: float = 60
) -> Outcome:
    """Look into the inbox once: take in good pairs, quarantine bad ones, tell of a new version.

    Args:
        root: the project; None is the working directory.
        inbox: folder or URL; None is what FULLSCALE_INBOX says, or the folder inbox of the
            project, which is made.
        settle_s: for how long a file must not have been written to count as complete.

    Returns:
        What became of everything in the inbox.
    """
    root = (root or Path()).resolve()
    url = inbox or os.environ.get(INBOX_VARIABLE)
    if url is None:
        url = str(root / "inbox")
        for folder in ("imagesTr", "labelsTr"):
            (root / "inbox" / folder).mkdir(parents=True, exist_ok=True)
    num_workers = load_params(root / "params.yaml").compute.num_workers
    announce(root)  # what a run that was killed had no time to tell
    outcome = receive(root, url, settle_s, num_workers=num_workers, run_step=run_as_task)
    show_outcome(outcome)
    announce(root)
    return outcome


def run_as_task(name: str, step: Callable[[], Result]) -> Result:
    """Run a step as a task of its own; one that fails for no reason of ours is tried again."""

    @task(
        name=name,
        cache_policy=NO_CACHE,
        retries=2,
        retry_delay_seconds=10,
        retry_condition_fn=is_transient,
    )
    def run() -> Result:
        return step()

    return run()


def is_transient(_task: Any, _run: Any, state: Any) -> bool:
    """Whether a failed step may succeed when it is tried again, as when a network is away."""
    return not isinstance(state.result(raise_on_failure=False), StageError | ScanError)


def announce(root: Path) -> None:
    """Emit `scans.landed` for the newest data version, unless that was done.

    The server has the event before it is noted as told, so one that is lost is sent again.
    """
    announcement = find_unannounced(root)
    if announcement is None:
        return
    logger = get_run_logger()
    if not PREFECT_API_URL.value():
        logger.warning(
            "Data version %s is not announced: PREFECT_API_URL names no server that would hear "
            "it. The next run with a server announces it.",
            announcement.data_version,
        )
        return
    emit(announcement)
    mark_announced(root, announcement)
    logger.info("Announced data version %s as %s", announcement.data_version, EVENT)


def show_outcome(outcome: Outcome) -> None:
    """Leave what became of each pair, and the new data version, as artifacts of the run."""
    for entry in outcome.fates:
        print(" ".join(part for part in (printable(entry.case), entry.fate, entry.why) if part))
    if outcome.fates:
        create_table_artifact(
            key="inbox",
            table=[
                {"case": printable(entry.case), "fate": entry.fate, "why": entry.why}
                for entry in outcome.fates
            ],
            description="What became of everything in the inbox",
        )
    if outcome.data_version is not None:
        create_markdown_artifact(key="data-version", markdown="\n".join(version_lines(outcome)))


def version_lines(outcome: Outcome) -> list[str]:
    """A new data version as markdown: its cases, and which of their patients are new."""
    num_quarantined = len(outcome.names("quarantined"))
    num_waiting = len(outcome.names("waiting"))
    return [
        f"## Data version {outcome.data_version}",
        "",
        f"{len(outcome.patients)} accepted for training, {num_quarantined} quarantined, "
        f"{num_waiting} waiting.",
        "",
        "| case | patient | |",
        "| --- | --- | --- |",
        *(
            f"| {case} | {as_cell(patient)} | "
            f"{'new patient' if patient in outcome.new_patients else 'known patient'} |"
            for case, patient in sorted(outcome.patients.items())
        ),
    ]


def as_cell(text: str) -> str:
    """Text that a table in markdown shows as it is."""
    marks = "\\`*_{}[]()<>#+-!|"
    return "".join(f"\\{char}" if char in marks else char for char in printable(text))


def printable(text: str) -> str:
    """Text without characters that could hide something from who reads it."""
    return text if text.isprintable() else ascii(text)


def main() -> None:
    """Look into the inbox of the working directory once."""
    watch_inbox(Path())


if __name__ == "__main__":
    main()
