"""The folder in which a network's trainings are tracked: what begins, goes on or waits there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from fullscale.runtime.console import say
from fullscale.runtime.errors import StageError
from fullscale.tracking.errors import LostRunError, UnreachableError
from fullscale.tracking.journal import RUNNING, Journal, RunDescription, list_journals, now_ms
from fullscale.tracking.remote_run import OpenStore, RemoteRun
from fullscale.tracking.sender import count_values, describe_unsent, send_all


class FolderInUseError(StageError):
    """Another process tracks a training in the folder."""


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other processes from a folder; a kill lets go of it.

    Raises:
        FolderInUseError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FolderInUseError(
            f"another process tracks a training in {folder}; wait until it ends, or end it"
        ) from None
    try:
        yield
    finally:
        lock.release()


def begin(
    folder: Path, description: RunDescription, open_store: OpenStore
) -> tuple[Journal, RemoteRun]:
    """A new run in its store; what earlier ones left in the folder is sent first.

    What was sent is cleared away. What cannot be sent stays beside the new run.

    Raises:
        StageError: the store does not answer.
    """
    open_store(description)
    for earlier in list_journals(folder):
        send_left(earlier, open_store)
        if earlier.is_sent():
            shutil.rmtree(earlier.folder)
    journal = Journal.create(folder, description)
    remote = RemoteRun(journal, open_store)
    try:
        remote.link()
    except StageError:
        shutil.rmtree(journal.folder)
        raise
    return journal, remote


def go_on(
    journal: Journal, description: RunDescription, open_store: OpenStore
) -> tuple[Journal, RemoteRun]:
    """The recorded run, running once more; in another store it begins anew with all its values.

    Args:
        journal: of the recorded run.
        description: as a new run would be described: its store and tags count.
        open_store: as for `RemoteRun`.

    Raises:
        StageError: the run is in another store than before, and that does not answer.
    """
    remote = RemoteRun(journal, open_store)
    recorded = journal.run
    if recorded.store_uri != description.store_uri or recorded.run_id is None:
        open_store(description)
        moved = replace(
            recorded,
            store_uri=description.store_uri,
            artifact_location=description.artifact_location,
            run_id=None,
        )
        journal.describe(moved)
        remote.link()
    if journal.status != RUNNING:
        journal.add_status(RUNNING, now_ms())
    for key, value in description.tags.items():
        if recorded.tags.get(key) != value:
            journal.add_tag(key, value, now_ms())
    return journal, remote


def send_left(journal: Journal, open_store: OpenStore) -> None:
    """Send what a training that is over left behind, to the store it was tracked in."""
    if journal.status == RUNNING:
        last_ms = journal.rows[-1].timestamp_ms if journal.rows else journal.run.started_ms
        journal.add_status("KILLED", last_ms)
    if journal.is_sent():
        return
    num_values = count_values(journal.unsent_rows())
    try:
        send_all(journal, RemoteRun(journal, open_store))
    except (UnreachableError, LostRunError) as error:
        say(f"{error}")
        say(describe_unsent(journal))
    else:
        say(
            f"MLflow at {journal.run.store_uri} now has the {num_values} values of run "
            f"{journal.run.run_id} that were kept in {journal.folder}"
        )
