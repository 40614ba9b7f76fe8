"""Train on the newest scans, judge the result, and commit it on a branch that people merge.

`python -m flows.retrain REASON` starts it by hand.
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
from prefect.runtime import flow_run
from prefect.settings import get_current_settings

from flows.artifacts import show_results, show_status
from flows.events import emit
from flows.notify import chosen_block, notify
from flows.run_log import add_library_lines
from flows.stages import (
    StageFailedError,
    TransientError,
    push,
    restore_checkout,
    run_logged,
    run_stages,
)
from fullscale.evaluation.score_files import read_verdict
from fullscale.params import load_params
from fullscale.reporting.text_summary import registry_line, verdict_lines
from fullscale.runtime.errors import StageError
from fullscale.tracking.pages import models_url
from fullscale.tracking.store import Store, connect, default_store
from fullscale.versioning.data_version import Announcement, is_remote_in_git, open_newest
from fullscale.versioning.git import CODE_VARIABLE, SCANS_BRANCH, find_commit, git
from fullscale.versioning.provenance import read_data_version
from fullscale.versioning.retraining import (
    clear_pending,
    count_failure,
    find_data_since,
    list_pending,
    list_untrained_changes,
    mark_pending,
    newest_branch,
    publish,
    push_branches,
    read_commit_message,
)
from fullscale.versioning.worktree import RETRAIN, open_checkout
from fullscale.workspace import open_workspace

GIT_REMOTE_VARIABLE = "FULLSCALE_GIT_REMOTE"
# Absent from versions that train a network once, whose parameters and outputs have other names.
LAYOUT_FILE = "model/ensemble.py"
NOTHING = "nothing to do"
NOT_PUSHED = (
    "Not pushed: the DVC remote is a folder inside the git repository, and scans of patients do "
    "not belong in git. They and the results are in this machine's DVC cache alone. Add a remote: "
    "dvc remote add --local --default team URL"
)


@dataclass(frozen=True)
class RetrainResult:
    """The end of a retraining.

    Attributes:
        status: the promotion gate's, or "nothing to do".
        data_version: MD5 of the scans in question.
    """

    status: str
    data_version: str


def name_run() -> str:
    """Return the name of a retraining's run: date, beginning of the reason, branch of the code."""
    reason = str(flow_run.parameters.get("reason", "by hand")).partition(",")[0]
    branch = os.environ.get(CODE_VARIABLE)
    code = f", code of {branch}" if branch else ""
    return f"retrain {datetime.now(UTC).date()} {reason}{code}"


@flow(name="retrain", flow_run_name=name_run, log_prints=True)
def retrain(root: Path | None = None, reason: str = "by hand") -> str:
    """Bring the results up to date with scans, code and parameters, if they are not.

    The scans are those of the branch `scans`, code and parameters those of the branch that
    FULLSCALE_CODE_BRANCH names, or of the one that is checked out.

    All work is done in a separate checkout, `root`/.cache/checkouts/retrain. The next run continues
    one that was killed: first on its own scans where it had started to register, so that every
    registered version gets its branch, then on the newest. Scans that land during a run are
    trained on next: by the deployment that the event `scans.landed` starts, if no run of it waits
    already, or, without a server, by this run.

    Args:
        root: the project; None is the working directory.
        reason: why, for messages and the commit.

    Returns:
        The promotion gate's status: pass, fail or undecided; or "nothing to do".

    Raises:
        StageFailedError: a stage, or the way to the DVC remote, failed.
        StageError: it is unknown which code to train, the checkout cannot be made, or parameters
            are wrong.
    """
    add_library_lines()
    root = (root or Path()).resolve()
    block, code_branch = chosen_block(os.environ), os.environ.get(CODE_VARIABLE)
    try:
        publish_pending(root, block, code_branch)
        while True:
            scans_before = find_commit(root, f"refs/heads/{SCANS_BRANCH}")
            outcome = retrain_once(root, reason, block, code_branch)
            push_to_git(root, os.environ.get(GIT_REMOTE_VARIABLE), block)
            landed = find_data_since(root, scans_before, outcome.data_version)
            if landed is None:
                show_status(outcome.status)
                return outcome.status
            get_run_logger().info("scans landed meanwhile: data version %s", landed.data_version)
            if _announce(landed):
                show_status(outcome.status)
                return outcome.status
            reason = f"scans landed during a retraining, data version {landed.data_version}"
    except Exception as error:
        notify(block, "Retraining failed", f"Reason to retrain: {reason}\n{error}")
        raise


def retrain_once(
    root: Path, reason: str, block: str | None, code_branch: str | None
) -> RetrainResult:
    """Retrain on the newest scans and code, if anything changed; call it in a flow."""
    with open_newest(root, RETRAIN, code_branch) as folder:
        return bring_up_to_date(root, folder, reason, block)


def push_to_git(root: Path, remote: str | None, block: str | None) -> None:
    """Push the branches that a git remote lacks, if one is named; say so where that fails.

    A remote that is away or refuses does not fail the run: the next one tries again.
    """
    if not remote:
        return
    try:
        for branch in push_branches(root, remote):
            get_run_logger().info("pushed %s to %s", branch, remote)
    except StageError as error:
        get_run_logger().error("not pushed to %s, the next run tries again: %s", remote, error)
        notify(block, f"Branches are not pushed to {remote}", f"The next run tries again.\n{error}")


def publish_pending(root: Path, block: str | None, code_branch: str | None) -> None:
    """Publish results of earlier scans that a killed run had registered but not published.

    Those of the newest scans are left to the run itself. DVC's cache holds what was computed, so
    little is done twice. Results that cannot be published do not delay newer scans: the log says
    why, and the next `MAX_FAILURES` runs try again.

    Raises:
        TransientError: MLflow or the DVC remote is away.
    """
    pending = list_pending(root)
    if not pending:
        return
    logger = get_run_logger()
    with open_newest(root, RETRAIN, code_branch) as folder:
        newest = git(folder, "rev-parse", "HEAD")
    for commit in pending:
        if commit == newest:
            continue
        with open_checkout(root, RETRAIN, commit) as folder:
            if commit not in list_pending(root):  # another run published it while this one waited
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


def bring_up_to_date(root: Path, folder: Path, reason: str, block: str | None) -> RetrainResult:
    """Train, judge, register, publish and notify, if anything in a checkout changed.

    Scans and artefacts are pushed before the branch is made, so that others can fetch all that it
    names, unless the only DVC remote is inside the git repository. Where pushing failed, the next
    run finds all stages done, and pushes. Where a run was killed before it notified people of a
    branch, that is done now.
    """
    logger = get_run_logger()
    data_version = read_data_version(folder)
    restore_checkout(folder)
    commit = git(folder, "rev-parse", "HEAD")
    changes = list_untrained_changes(folder)
    lines = [f"Reason: {reason}", f"Scans: data version {data_version}"]
    if not changes:
        logger.info("nothing to do: no scan, code or parameter changed (%s)", reason)
        _show([*lines, "Nothing to do: no scan, code or parameter changed."])
        if commit in list_pending(root):
            branch = newest_branch(folder)
            if branch and find_commit(root, f"{branch}^") == commit:
                notify_result(root, branch, block)
            clear_pending(root, commit)
        return RetrainResult(NOTHING, data_version)
    for line in changes:
        logger.info("changed: %s", line)
    store = default_store(root)
    if store.artifact_location is not None:
        # The experiment keeps the artifact folder it was created with: that must be the project's,
        # not the checkout's, so it is created here.
        connect(store)
    if (folder / LAYOUT_FILE).is_file():
        status, found = train_and_judge(root, folder, store)
    else:
        status, found = run_older_version(folder, store)
    lines += found
    if is_remote_in_git(folder, root):
        logger.warning("%s", NOT_PUSHED)
        lines.append(NOT_PUSHED)
    else:
        push(folder)
    subject = f"Retrain on scans {data_version[:8]}: {status}"
    branch = _publish(folder, data_version, "\n".join([subject, "", *lines]))
    _show([*lines, f"Branch: {branch}", *(f"Changed: {line}" for line in changes)])
    notify_result(root, branch, block)
    clear_pending(root, commit)
    return RetrainResult(status, data_version)


def train_and_judge(root: Path, folder: Path, store: Store) -> tuple[str, list[str]]:
    """Run all stages in a checkout and show their results in the Prefect run.

    Returns:
        The promotion gate's status, and lines about the verdict.
    """
    params = load_params(folder / "params.yaml")
    commit = git(folder, "rev-parse", "HEAD")
    test_set_before = _test_set(folder)
    run_stages(
        params,
        folder,
        {"MLFLOW_TRACKING_URI": store.uri},
        devices_root=root,
        before_register=partial(mark_pending, root, commit),
    )
    verdict = show_results(params, folder, store)
    is_same = verdict["test_set"] == test_set_before
    lines = [
        *verdict_lines(verdict),
        f"Test set {verdict['test_set']}: {'unchanged' if is_same else f'was {test_set_before}'}",
        registry_line(params, verdict, store),
    ]
    return str(verdict["status"]), lines


@task(task_run_name="older-version")
def run_older_version(folder: Path, store: Store) -> tuple[str, list[str]]:
    """Complete the stages of a checkout whose code is of an older version of this project.

    Its own code runs them. Their files are not read: their formats may have changed.

    Returns:
        A status and lines as `train_and_judge` does.
    """
    run_logged(["dvc", "--wait-for-lock", "repro"], folder, {"MLFLOW_TRACKING_URI": store.uri})
    return "by an older version", [
        "An older version of this project made these results; its verdict is in reports/gate.json."
    ]


def notify_result(root: Path, branch: str, block: str | None) -> None:
    """Send the commit message of a retraining's branch to the notification block, if one is set."""
    subject, body = read_commit_message(root, branch)
    where = f"Look at {branch} in {root}, at the Prefect run, and at MLflow "
    where += f"({models_url(default_store(root).uri)})."
    status = subject.rpartition(": ")[2]
    notify(block, f"Retraining: {status}", "\n".join([body, f"Branch: {branch}", where]))


@task(task_run_name="publish")
def _publish(folder: Path, data_version: str, message: str) -> str:
    return publish(folder, datetime.now(UTC).date(), data_version, message)


def _test_set(folder: Path) -> str | None:
    """Return the test set of the verdict in a checkout, if it has one."""
    workspace = open_workspace(folder)
    return str(read_verdict(workspace)["test_set"]) if workspace.verdict.is_file() else None


def _show(lines: list[str]) -> None:
    create_markdown_artifact(
        key="retraining",
        markdown="\n".join(f"- {line}" for line in lines),
        description="What was retrained, why, and with which result",
    )


def _announce(landed: Announcement) -> bool:
    """Emit `scans.landed` for scans that landed during a run; return False without a server."""
    if not get_current_settings().api.url:
        return False
    emit(landed)
    return True


def main() -> None:
    """Run the flow on the working directory; the command line's arguments are the reason."""
    retrain(Path(), " ".join(sys.argv[1:]) or "by hand")


if __name__ == "__main__":
    main()
