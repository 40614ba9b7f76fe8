"""Runs of trainings in MLflow, through outages of its server."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fullscale.runtime.console import say
from fullscale.tracking.journal import Journal, RunDescription, list_journals, now_ms
from fullscale.tracking.run_folder import FolderInUseError, begin, go_on, hold, send_left
from fullscale.tracking.sender import Sender
from fullscale.tracking.store import Store, open_run
from fullscale.tracking.system_metrics import SystemMetrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAIN_TIMEOUT_S = 60.0
INTERRUPTED_DRAIN_TIMEOUT_S = 5.0  # who interrupts waits for the end
SIGNAL_CODES = (129, 130, 143)


class TrainingRun:
    """One training as MLflow sees it while it happens. No call waits for the server."""

    def __init__(self, journal: Journal, sender: Sender, system: SystemMetrics) -> None:
        self._journal = journal
        self._sender = sender
        self._system = system

    @property
    def run_id(self) -> str:
        """MLflow's id; another one once a store that lost the run answers again."""
        return str(self._journal.run.run_id)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Add values at a step, and how busy the machine was since the last time.

        Left out are values that are not a number, and those that the run has at this step, because
        a training that goes on repeats the epochs after its last checkpoint.
        """
        self._journal.add_metrics({**metrics, **self._system.averages()}, step, now_ms())
        self._sender.wake()

    def log_picture(self, figure: Figure, path: str) -> None:
        """Store a picture under an artifact path that ends in .png."""
        self._journal.outbox.add_picture(figure, path)
        self._sender.wake()

    def log_files(self, folder: Path, path: str) -> None:
        """Store a folder's files under an artifact path.

        They are sent from where they are: one that changes or goes before the server could have it
        is left out, and the log says so.
        """
        self._journal.outbox.add_files(folder, path)
        self._sender.wake()

    def set_tag(self, key: str, value: str) -> None:
        """Describe the run."""
        self._journal.add_tag(key, value, now_ms())
        self._sender.wake()


@contextmanager
def training_run(
    store: Store,
    name: str,
    parameters: Mapping[str, Any],
    tags: Mapping[str, str],
    data_version: str,
    folder: Path,
    *,
    resume: bool = False,
) -> Iterator[TrainingRun]:
    """A run that ends as FINISHED, as FAILED on an error, or as KILLED on an interruption.

    What it is told is written to `folder` first and sent from there in the background, so the
    training neither waits for the server nor loses anything to its outage. What could not be sent
    by the end stays there, and `send_leftovers` or the next training sends it.

    Args:
        store: where it is kept.
        name: the run's name, a network's.
        parameters: flat mapping of what was set.
        tags: what describes the run.
        data_version: MD5 of the annotated scans, shown as the run's data set.
        folder: this network's own, for what is not sent yet.
        resume: go on with the run that `folder` holds, whether the store answers or not. Where it
            holds none, or the store no longer knows it, a new run begins with all that was logged.

    Raises:
        StageError: another process uses `folder`, or a new run is needed and the store does not
            answer.
    """
    description = RunDescription(
        key=f"{now_ms()}-{secrets.token_hex(4)}",
        store_uri=store.uri,
        artifact_location=store.artifact_location,
        name=name,
        parameters={key: str(value) for key, value in parameters.items()},
        tags=dict(tags),
        data_version=data_version,
        started_ms=now_ms(),
    )
    with hold(folder):
        recorded = list_journals(folder)[-1:] if resume else []
        journal, remote = (
            go_on(recorded[0], description, open_run)
            if recorded
            else begin(folder, description, open_run)
        )
        sender = Sender(journal, remote)
        status, timeout_s = "FINISHED", DRAIN_TIMEOUT_S
        try:
            with SystemMetrics() as system:
                yield TrainingRun(journal, sender, system)
        except BaseException as error:
            if _is_interruption(error):
                status, timeout_s = "KILLED", INTERRUPTED_DRAIN_TIMEOUT_S
            else:
                status = "FAILED"
            raise
        finally:
            journal.add_status(status, now_ms())
            sender.close(timeout_s)


def send_leftovers(store: Store, folder: Path) -> None:
    """Send what trainings left in `folder` because the server did not answer to the end.

    A run whose training was killed outright is marked as KILLED. A training that is using the
    folder now is left alone. What still cannot be sent stays, and the log says where.

    Args:
        store: the one in use now. Values of a run that was tracked in another one go to that.
        folder: as given to `training_run`; it need not exist.
    """
    if not folder.is_dir():
        return
    try:
        with hold(folder):
            for journal in list_journals(folder):
                if journal.run.store_uri != store.uri and not journal.is_sent():
                    say(
                        f"run {journal.run.run_id} was tracked at {journal.run.store_uri}, not at "
                        f"{store.uri}, and what {journal.folder} keeps of it goes there"
                    )
                send_left(journal, open_run)
    except FolderInUseError:
        say(f"a training is using {folder}; it sends what is kept there itself")


def _is_interruption(error: BaseException) -> bool:
    """Whether a signal ended the training: a hang-up, Ctrl-C or a request to terminate."""
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, SystemExit) and error.code in SIGNAL_CODES
    )
