"""Look again and again whether there is work, so that idle minutes leave no runs behind.

`python -m flows.watcher` starts a run of `watch-inbox` when the inbox has something new, and takes
up a retraining that crashed. `make services` runs it beside the worker.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import PrefectException
from prefect.states import Scheduled

from flows.events import RETRAIN, SOON
from flows.notify import chosen_block, notify
from fullscale.inbox.inbox import SETTLE_S
from fullscale.runtime.console import configure_logging
from fullscale.runtime.errors import StageError
from tasks.receive import InboxWatch, find_inbox

INTERVAL_VARIABLE = "FULLSCALE_WATCH_INTERVAL_S"
WATCH_INBOX = "watch-inbox"
MAX_CRASHES = 1  # what crashed twice needs a person
LEFT_TAG = "left to a person"

logger = logging.getLogger("fullscale.watcher")


def look_into_inbox(client: SyncPrefectClient, watch: InboxWatch) -> UUID | None:
    """Start a run of `watch-inbox` if it would find something; return its id.

    None starts while another one is under way, or while the deployment is paused.
    """
    deployment = client.read_deployment_by_name(f"{WATCH_INBOX}/{WATCH_INBOX}")
    if deployment.paused or find_unfinished(client, WATCH_INBOX):
        return None
    inbox = deployment.parameters.get("inbox") or find_inbox(watch.root, os.environ)
    try:
        if not watch.has_news(inbox, deployment.parameters.get("settle_s", SETTLE_S)):
            return None
    except (OSError, StageError):
        pass  # the run tells people of it
    return client.create_flow_run_from_deployment(deployment.id).id


def take_up_crashed(client: SyncPrefectClient) -> UUID | None:
    """Schedule the newest retraining again if it crashed once; return its id.

    After another crash people get a message. A run that is under way, or waits, continues the work
    of the one that crashed.
    """
    if find_unfinished(client, RETRAIN):
        return None
    ended = {"state": {"type": {"any_": [str(state.value) for state in TERMINAL_STATES]}}}
    runs = _read_runs(client, RETRAIN, ended, FlowRunSort.END_TIME_DESC)
    if not runs or runs[0].state is None or not runs[0].state.is_crashed():
        return None
    run = runs[0]
    num_crashes = sum(state.is_crashed() for state in client.read_flow_run_states(run.id))
    if num_crashes > MAX_CRASHES:
        if LEFT_TAG not in run.tags:
            body = f"{run.name} crashed {num_crashes} times. It is not taken up again by itself."
            notify(chosen_block(os.environ), "Retraining crashed again", body, logger)
            client.update_flow_run(run.id, tags=[*run.tags, LEFT_TAG])
        return None
    message = "Taken up again after a crash; it continues from its last checkpoint."
    client.set_flow_run_state(run.id, Scheduled(message=message))
    return run.id


def find_unfinished(client: SyncPrefectClient, deployment: str) -> bool:
    """Return whether a run of a deployment is under way, or due soon."""
    due = {"before_": datetime.now(UTC) + SOON}
    under_way = {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING", "PAUSED"]}}}
    is_due = {"state": {"type": {"any_": ["SCHEDULED"]}}, "expected_start_time": due}
    return any(
        _read_runs(client, deployment, wanted, FlowRunSort.ID_DESC)
        for wanted in (under_way, is_due)
    )


def _read_runs(
    client: SyncPrefectClient, deployment: str, wanted: Mapping[str, object], sort: FlowRunSort
) -> list[FlowRun]:
    return client.read_flow_runs(
        deployment_filter=DeploymentFilter.model_validate({"name": {"any_": [deployment]}}),
        flow_run_filter=FlowRunFilter.model_validate(wanted),
        sort=sort,
        limit=1,
    )


def main() -> None:
    """Watch for the working directory's project until the program is ended."""
    configure_logging()
    watch = InboxWatch(Path().resolve())
    while True:
        try:
            with get_client(sync_client=True) as client:
                look_into_inbox(client, watch)
                if run_id := take_up_crashed(client):
                    logger.info(f"retraining {run_id} crashed and is taken up again")
        except (httpx.HTTPError, PrefectException) as error:
            logger.warning(f"Prefect did not answer, and is asked again later: {error}")
        time.sleep(float(os.environ[INTERVAL_VARIABLE]))


if __name__ == "__main__":
    main()
