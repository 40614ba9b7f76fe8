"""Look again and again whether there is work, so that idle minutes leave no runs behind.

`python -m flows.servers.watcher` starts a run of `watch-inbox` when the inbox has something new,
marks runs without a sign of life as crashed, and takes up a retraining that crashed.
`make services` runs it beside the worker.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import PrefectException
from prefect.states import Crashed

from flows.events import RETRAIN, any_run, due_soon
from flows.notify import chosen_block, notify
from fullscale.inbox.inbox import SETTLE_S, make_inbox
from fullscale.runtime.console import configure_logging
from fullscale.runtime.errors import StageError
from fullscale.versioning.data_version import newest_data_version
from tasks.receive import InboxWatch

INTERVAL_VARIABLE = "FULLSCALE_WATCH_INTERVAL_S"
WATCH_INBOX = "watch-inbox"
FLOWS = ("reproduce", WATCH_INBOX, RETRAIN, "promote-check")
# Heartbeats come every 30 s: two may be late or lost while the server restarts.
LOST_AFTER_S = 90.0
# A worker needs some seconds from taking a run to its first line; a starved machine, minutes.
STALLED_AFTER_S = 300.0
TAKEN_UP, LEFT = "taken up after a crash", "left to a person"

logger = logging.getLogger("fullscale.watcher")


def look_into_inbox(client: SyncPrefectClient, watch: InboxWatch) -> UUID | None:
    """Start a run of `watch-inbox` if it would find something; return its id.

    None starts while another one is under way, or while the deployment is paused.
    """
    deployment = client.read_deployment_by_name(f"{WATCH_INBOX}/{WATCH_INBOX}")
    if deployment.paused or find_unfinished(client, WATCH_INBOX):
        return None
    inbox = deployment.parameters.get("inbox") or make_inbox(watch.root, os.environ)
    try:
        if not watch.has_news(inbox, deployment.parameters.get("settle_s", SETTLE_S)):
            return None
    except (OSError, StageError):
        pass  # the run tells people of it
    return client.create_flow_run_from_deployment(deployment.id).id


def find_unfinished(client: SyncPrefectClient, deployment: str) -> bool:
    """Return whether a run of a deployment is under way, or due soon."""
    under_way = {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING", "PAUSED"]}}}
    return any(
        client.read_flow_runs(**any_run(deployment, condition))
        for condition in (under_way, due_soon())
    )


class LostRuns:
    """Runs whose process or worker is gone: nothing was heard of them for some time.

    A person's other flows, and runs that no deployment started, are left alone. Only times of this
    machine count, from when it first saw a run's latest event: clocks of others may be wrong, and a
    server that was away has no events of that time.
    """

    def __init__(self) -> None:
        self._heard: dict[UUID, tuple[str, float]] = {}

    def mark(self, client: SyncPrefectClient, now_s: float) -> list[str]:
        """Mark runs as crashed; return their names.

        Args:
            client: of the server.
            now_s: a clock that runs evenly.
        """
        under_way = {"state": {"type": {"any_": ["PENDING", "RUNNING"]}}}
        heard, lost = {}, []
        for run in client.read_flow_runs(
            flow_filter=FlowFilter.model_validate({"name": {"any_": list(FLOWS)}}),
            flow_run_filter=FlowRunFilter.model_validate(under_way),
        ):
            if run.deployment_id is None:
                continue
            sign = f"{run.state_id} {_latest_event(client, run.id)}"
            before, since_s = self._heard.get(run.id, ("", now_s))
            heard[run.id] = (sign, since_s if sign == before else now_s)
            silent_s = now_s - heard[run.id][1]
            is_running = run.state_type is StateType.RUNNING
            if silent_s < (LOST_AFTER_S if is_running else STALLED_AFTER_S):
                continue
            what = "its process or its machine" if is_running else "the worker that took it"
            message = f"No sign of life for {silent_s:.0f} s: {what} is gone."
            client.set_flow_run_state(run.id, Crashed(message=message))
            lost.append(run.name)
        self._heard = heard
        return lost


def _latest_event(client: SyncPrefectClient, run_id: UUID) -> str:
    """Return the id of the latest event of a run, such as a heartbeat; "" without one."""
    wanted = {"filter": {"resource": {"id": [f"prefect.flow-run.{run_id}"]}}, "limit": 1}
    answer = client.request("POST", "/events/filter", json=wanted).raise_for_status()
    return "".join(event["id"] for event in answer.json()["events"])


def take_up_crashed(client: SyncPrefectClient, root: Path) -> UUID | None:
    """Start a run in place of the newest retraining if that crashed; return its id.

    It continues from the last checkpoint. There is one such run for each data version; people get a
    message of the next crash. None starts while another one is under way or waits, or while the
    deployment is paused.
    """
    deployment = client.read_deployment_by_name(f"{RETRAIN}/{RETRAIN}")
    if deployment.paused or find_unfinished(client, RETRAIN):
        return None
    ended = {"state": {"type": {"any_": sorted(state.value for state in TERMINAL_STATES)}}}
    order = FlowRunSort.END_TIME_DESC
    crashed = client.read_flow_runs(**any_run(RETRAIN, ended), sort=order)[:1]
    if not crashed or not crashed[0].state or not crashed[0].state.is_crashed():
        return None
    taken_up = client.create_flow_run_from_deployment(
        deployment.id,
        parameters={"reason": f"taken up after a crash of {crashed[0].name}"},
        tags=[TAKEN_UP],
        # With a key that was used before, Prefect returns the run that was made then.
        idempotency_key=f"{TAKEN_UP}: {newest_data_version(root)}",
    )
    if taken_up.state is None or not taken_up.state.is_final():
        return taken_up.id
    _leave_to_person(client, crashed[0])
    return None


def _leave_to_person(client: SyncPrefectClient, run: FlowRun) -> None:
    """Tell people once that a run crashed and is not taken up."""
    if LEFT in run.tags:
        return
    body = (
        f"{run.name} crashed: {run.state.message if run.state else ''}\n"
        "A run of the same scans was taken up after a crash before, so this one is not. The next "
        "run continues from its last checkpoint."
    )
    notify(chosen_block(os.environ), "Retraining crashed again", body, logger)
    client.update_flow_run(run.id, tags=[*run.tags, LEFT])


def main() -> None:
    """Watch for the working directory's project until the program is ended."""
    configure_logging()
    root = Path().resolve()
    watch, lost_runs = InboxWatch(root), LostRuns()
    while True:
        try:
            with get_client(sync_client=True) as client:
                look_into_inbox(client, watch)
                for name in lost_runs.mark(client, time.monotonic()):
                    logger.warning(f"{name} gave no sign of life and is marked as crashed")
                if run_id := take_up_crashed(client, root):
                    logger.info(f"run {run_id} takes up a retraining that crashed")
        except StageError as error:
            logger.warning(str(error))
        except (httpx.HTTPError, PrefectException) as error:
            logger.warning(f"Prefect did not answer, and is asked again later: {error}")
        time.sleep(float(os.environ[INTERVAL_VARIABLE]))


if __name__ == "__main__":
    main()
