"""Watch the inbox: make a data version of scans that landed, and announce it.

`python -m flows.watch_inbox` checks once. flows/servers/watcher.py starts the deployment when scans
arrive.
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
from flows.run_log import add_library_lines
from fullscale.inbox.inbox import SETTLE_S, make_inbox
from fullscale.params import load_params
from fullscale.runtime.errors import ScanError, StageError, TransientStageError
from fullscale.versioning.data_version import find_unannounced, mark_announced
from fullscale.versioning.git import CODE_VARIABLE
from tasks.receive import InboxResult, receive

Result = TypeVar("Result")


@flow(name="watch-inbox", log_prints=True)
def watch_inbox(
    root: Path | None = None, inbox: str | None = None, settle_s: float = SETTLE_S
) -> InboxResult:
    """Check the inbox once: ingest good pairs, quarantine bad ones, announce a new data version.

    Args:
        root: the project; None is the working directory.
        inbox: folder or URL; None is the value of FULLSCALE_INBOX, or the folder inbox of the
            project, which is created.
        settle_s: seconds without a write after which a file counts as complete.

    Returns:
        The result for everything in the inbox.
    """
    add_library_lines()
    root = (root or Path()).resolve()
    url = inbox or make_inbox(root, os.environ)
    num_workers = load_params(root / "params.yaml").compute.num_workers
    announce(root)  # a version that a killed run made but did not announce
    outcome = receive(
        root,
        url,
        settle_s,
        num_workers=num_workers,
        run_step=run_as_task,
        code_branch=os.environ.get(CODE_VARIABLE),
    )
    show_outcome(outcome)
    announce(root)
    return outcome


def run_as_task(name: str, step: Callable[[], Result]) -> Result:
    """Run a step as one task; retry it unless its error is one that only a user can fix."""

    @task(
        name=name,
        cache_policy=NO_CACHE,
        retries=2,
        retry_delay_seconds=10,
        retry_condition_fn=may_succeed_later,
    )
    def run() -> Result:
        return step()

    return run()


def may_succeed_later(_task: Any, _run: Any, state: Any) -> bool:
    """Return whether to retry a failed step: its error is not one that only a user can fix."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, TransientStageError) or not isinstance(error, StageError | ScanError)


def announce(root: Path) -> None:
    """Emit `scans.landed` for the newest data version, unless that was done.

    The version is marked as announced only after the server has the event, so a lost event is sent
    again.
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


def show_outcome(outcome: InboxResult) -> None:
    """Log the result of each pair, and show all of them and the new data version as artifacts."""
    for entry in outcome.cases:
        parts = (printable(entry.case), entry.status, entry.reason)
        get_run_logger().info(" ".join(part for part in parts if part))
    if outcome.cases:
        create_table_artifact(
            key="inbox",
            table=[
                {"case": printable(entry.case), "status": entry.status, "reason": entry.reason}
                for entry in outcome.cases
            ],
            description="Result for everything in the inbox",
        )
    if outcome.data_version is not None:
        create_markdown_artifact(
            key="data-version",
            markdown="\n".join(version_lines(outcome)),
            description="The newest data version, and the scans that it added",
        )


def version_lines(outcome: InboxResult) -> list[str]:
    """Return a new data version as lines of markdown: its cases, and which patients are new."""
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
    """Escape text so that a table in markdown shows it unchanged."""
    marks = "\\`*_{}[]()<>#+-!|"
    return "".join(f"\\{char}" if char in marks else char for char in printable(text))


def printable(text: str) -> str:
    """Return text with invisible and control characters escaped."""
    return text if text.isprintable() else ascii(text)


def main() -> None:
    """Check the inbox of the working directory once."""
    watch_inbox(Path())


if __name__ == "__main__":
    main()
