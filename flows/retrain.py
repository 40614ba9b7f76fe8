"""Train on the newest scans, judge, and leave the results on a branch; people merge it.

`python -m flows.retrain REASON` does it by hand.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.settings import get_current_settings

from flows.artifacts import show_results
from flows.events import emit
from flows.notify import chosen_block, notify
from flows.stages import StageFailedError, TransientError, push, restore_checkout, run_stages
from fullscale.params import load_params
from fullscale.reporting.text_summary import read_report, registry_line, verdict_lines
from fullscale.runtime.errors import StageError
from fullscale.tracking.store import connect, default_store
from fullscale.versioning.data_version import Announcement, open_newest
from fullscale.versioning.git import SCANS_BRANCH, find_commit, git
from fullscale.versioning.provenance import read_data_version
from fullscale.versioning.retraining import (
    count_failure,
    forget_begun,
    landed_since,
    list_begun,
    list_news,
    newest_branch,
    note_begun,
    publish,
    read_message,
)
from fullscale.versioning.worktree import open_checkout

CHECKOUT = "retrain"
NOTHING = "nothing to do"


@dataclass(frozen=True)
class Outcome:
    """How a retraining ended.

    Attributes:
        status: of the gate, or "nothing to do".
        data_version: MD5 of the scans it looked at.
    """

    status: str
    data_version: str


@flow(name="retrain", log_prints=True)
def retrain(root: Path | None = None, reason: str = "by hand") -> str:
    """Bring the results up to date with scans, code and parameters; do nothing if they are.

    All work is done in a checkout of its own, `root`/.cache/checkouts/retrain. A run that was
    killed is taken up there by the next: on its own scans where it had begun to register, so that
    no registered version lacks its branch, then on the newest. Scans that land meanwhile are
    trained on next: by the deployment that the event `scans.landed` starts, if no run of it waits
    already, or, without a server, by this run.

    Args:
        root: the project; None is the working directory.
        reason: why, for whoever reads of it.

    Returns:
        The gate's status: pass, fail or undecided; or "nothing to do".

    Raises:
        StageFailedError: a stage, or the way to the DVC remote, failed.
        StageError: the checkout cannot be made, or parameters are wrong.
    """
    root = (root or Path()).resolve()
    block = chosen_block(os.environ)
    try:
        finish_begun(root, block)
        while True:
            scans_before = find_commit(root, f"refs/heads/{SCANS_BRANCH}")
            outcome = retrain_once(root, reason, block)
            landed = landed_since(root, scans_before, outcome.data_version)
            if landed is None:
                return outcome.status
            get_run_logger().info("scans landed meanwhile: data version %s", landed.data_version)
            if _announce(landed):
                return outcome.status
            reason = f"scans landed during a retraining, data version {landed.data_version}"
    except Exception as error:
        notify(block, "Retraining failed", f"Reason to retrain: {reason}\n{error}")
        raise


def retrain_once(root: Path, reason: str, block: str | None) -> Outcome:
    """One retraining on the newest scans, if there is anything to learn; call it in a flow."""
    with open_newest(root, CHECKOUT) as folder:
        return bring_up_to_date(root, folder, reason, block)


def finish_begun(root: Path, block: str | None) -> None:
    """Publish and tell of earlier scans' results that a run had no time for once it registered.

    Those of the newest scans are left to the run itself. DVC's cache has what was computed, so
    little is done twice. Results that fail for good do not hold up newer scans: the log says why,
    and the next runs try again, a few times.

    Raises:
        TransientError: MLflow or the DVC remote is away.
    """
    begun = list_begun(root)
    if not begun:
        return
    logger = get_run_logger()
    with open_newest(root, CHECKOUT) as folder:
        newest = git(folder, "rev-parse", "HEAD")
    for commit in begun:
        if commit == newest:
            continue
        with open_checkout(root, CHECKOUT, commit) as folder:
            if commit not in list_begun(root):  # another run, which had the checkout, has done it
                continue
            reason = f"a run on {commit[:8]} ended before its results were published"
            logger.info("first of all: %s", reason)
            try:
                bring_up_to_date(root, folder, reason, block)
            except TransientError:
                raise
            except (StageFailedError, StageError) as error:
                count_failure(root, commit)
                logger.error("the results of %s are not published: %s", commit[:8], error)


def bring_up_to_date(root: Path, folder: Path, reason: str, block: str | None) -> Outcome:
    """Train, judge, register, publish and tell, if there is anything to learn in a checkout.

    Scans and artefacts are pushed before the branch is made, so that it names nothing that others
    cannot fetch; where pushing failed, the next run finds all stages done, and pushes. Where a run
    was killed before it told of a branch, that is done now.
    """
    logger = get_run_logger()
    params = load_params(folder / "params.yaml")
    data_version = read_data_version(folder)
    restore_checkout(folder)
    commit = git(folder, "rev-parse", "HEAD")
    news = list_news(folder)
    found = [f"Reason: {reason}", f"Scans: data version {data_version}"]
    if not news:
        logger.info("nothing to do: no scan, code or parameter changed (%s)", reason)
        _show([*found, "Nothing to do: no scan, code or parameter changed."])
        if commit in list_begun(root):
            branch = newest_branch(folder)
            if branch and find_commit(root, f"{branch}^") == commit:
                tell(root, branch, block)
            forget_begun(root, commit)
        return Outcome(NOTHING, data_version)
    for line in news:
        logger.info("changed: %s", line)
    store = default_store(root)
    if store.artifact_location is not None:
        connect(store)  # who makes the experiment decides where its files go: not the checkout
    test_set_before = _test_set(folder)
    run_stages(
        params,
        folder,
        {"MLFLOW_TRACKING_URI": store.uri},
        devices_root=root,
        before_register=partial(note_begun, root, commit),
    )
    verdict = show_results(params, folder, store)
    told = [
        *found,
        *verdict_lines(verdict),
        f"Test set {verdict['test_set']}: "
        + ("unchanged" if verdict["test_set"] == test_set_before else f"was {test_set_before}"),
        registry_line(params, verdict, store),
    ]
    push(folder)
    subject = f"Retrain on scans {data_version[:8]}: {verdict['status']}"
    branch = _publish(folder, data_version, "\n".join([subject, "", *told]))
    _show([*told, f"Branch: {branch}", *(f"Changed: {line}" for line in news)])
    tell(root, branch, block)
    forget_begun(root, commit)
    return Outcome(str(verdict["status"]), data_version)


def tell(root: Path, branch: str, block: str | None) -> None:
    """Send what a branch's commit says of a retraining."""
    subject, body = read_message(root, branch)
    where = f"Look at {branch} in {root}, at the Prefect run, and at MLflow "
    where += f"({default_store(root).uri})."
    status = subject.rpartition(": ")[2]
    notify(block, f"Retraining: {status}", "\n".join([body, f"Branch: {branch}", where]))


@task(task_run_name="publish")
def _publish(folder: Path, data_version: str, message: str) -> str:
    return publish(folder, datetime.now(UTC).date(), data_version, message)


def _test_set(folder: Path) -> str | None:
    """The test set of the verdict that was there before, if there was one."""
    path = folder / "reports/gate.json"
    return str(read_report(path)["test_set"]) if path.exists() else None


def _show(lines: list[str]) -> None:
    create_markdown_artifact(key="retraining", markdown="\n".join(f"- {line}" for line in lines))


def _announce(landed: Announcement) -> bool:
    """Tell the server of scans that landed during a run; False where no server would hear."""
    if not get_current_settings().api.url:
        return False
    emit(landed)
    return True


def main() -> None:
    """Run the flow on the working directory; the arguments are the reason."""
    retrain(Path(), " ".join(sys.argv[1:]) or "by hand")


if __name__ == "__main__":
    main()
