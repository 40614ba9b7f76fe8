"""Train on the newest scans, judge, and leave the results on a branch; people merge it.

`python -m flows.retrain REASON` does it by hand.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.settings import get_current_settings

from flows.notify import chosen_block, notify
from flows.showing import show_results
from flows.stages import push, restore_checkout, run_stages
from flows.watch_inbox import emit
from tasks.checkouts import SCANS_BRANCH, find_commit
from tasks.data_version import Announcement, open_newest
from tasks.params import load_params
from tasks.provenance import read_data_version
from tasks.publish import landed_since, list_news, publish
from tasks.summary import read_report, registry_line, verdict_lines
from tasks.tracking import connect, default_store

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
    killed is taken up there by the next. Scans that land meanwhile are trained on next: by the
    deployment that the event `scans.landed` starts, or, without a server, by this run.

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
    """One retraining, if there is anything to learn; call it in a flow.

    Scans and artefacts are pushed before the branch is made, so that it names nothing that others
    cannot fetch; where pushing failed, the next run finds all stages done, and pushes.
    """
    logger = get_run_logger()
    with open_newest(root, CHECKOUT) as folder:
        params = load_params(folder / "params.yaml")
        data_version = read_data_version(folder)
        restore_checkout(folder)
        news = list_news(folder)
        found = [f"Reason: {reason}", f"Scans: data version {data_version}"]
        if not news:
            logger.info("nothing to do: no scan, code or parameter changed (%s)", reason)
            _show([*found, "Nothing to do: no scan, code or parameter changed."])
            return Outcome(NOTHING, data_version)
        for line in news:
            logger.info("changed: %s", line)
        store = default_store(root)
        if store.artifact_location is not None:
            connect(store)  # who makes the experiment decides where its files go: not the checkout
        test_set_before = _test_set(folder)
        run_stages(params, folder, {"MLFLOW_TRACKING_URI": store.uri}, devices_root=root)
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
    told.append(f"Branch: {branch}")
    _show([*told, *(f"Changed: {line}" for line in news)])
    where = f"Look at {branch} in {root}, at the Prefect run, and at MLflow ({store.uri})."
    notify(block, f"Retraining: {verdict['status']}", "\n".join([*told, where]))
    return Outcome(str(verdict["status"]), data_version)


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
