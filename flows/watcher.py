"""Look again and again whether there is work, so that idle minutes leave no runs behind.

`python -m flows.watcher` starts a run of `watch-inbox` when the inbox has something new.
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
from prefect.exceptions import PrefectException

from flows.events import any_run, due_soon
from fullscale.inbox.inbox import SETTLE_S, make_inbox
from fullscale.runtime.console import configure_logging
from fullscale.runtime.errors import StageError
from tasks.receive import InboxWatch

INTERVAL_VARIABLE = "FULLSCALE_WATCH_INTERVAL_S"
WATCH_INBOX = "watch-inbox"

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


def main() -> None:
    """Watch for the working directory's project until the program is ended."""
    configure_logging()
    watch = InboxWatch(Path().resolve())
    while True:
        try:
            with get_client(sync_client=True) as client:
                look_into_inbox(client, watch)
        except (httpx.HTTPError, PrefectException) as error:
            logger.warning(f"Prefect did not answer, and is asked again later: {error}")
        time.sleep(float(os.environ[INTERVAL_VARIABLE]))


if __name__ == "__main__":
    main()
