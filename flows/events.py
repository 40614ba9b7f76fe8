"""The event `scans.landed`: content of a new data version, and whether to start a retraining."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
from prefect.events import Event, Resource
from prefect.events.clients import get_events_client

from fullscale.versioning.data_version import Announcement

EVENT = "scans.landed"
RESOURCE_ID = "fullscale.inbox"
RETRAINING = "fullscale.retraining"
WANTED, WAITING = "wanted", "waiting"
RETRAIN = "retrain"
SOON = timedelta(seconds=60)

RunCondition = Mapping[str, object]


def emit(announcement: Announcement) -> None:
    """Emit `scans.landed` and return when the server has it.

    The label `fullscale.retraining` of its resource is "wanted", which starts the deployment
    `retrain`, or "waiting" where a run of it is scheduled and will find the newest scans. So scans
    that land during hours of training leave one run waiting, not one for each landing.
    """
    asyncio.run(_emit(announcement))


async def _emit(announcement: Announcement) -> None:
    async with get_client() as client:
        retraining = WAITING if await _is_retraining_waiting(client) else WANTED
    event = Event(
        event=EVENT,
        resource=Resource({"prefect.resource.id": RESOURCE_ID, RETRAINING: retraining}),
        payload={
            "data_version": announcement.data_version,
            "num_accepted": len(announcement.cases),
            "num_quarantined": announcement.num_quarantined,
            "cases": list(announcement.cases),
        },
    )
    # emit_event() sends in a thread and reports no failure, so the client is used directly.
    async with get_events_client(reconnection_attempts=3, checkpoint_every=1) as client:
        await client.emit(event)


async def _is_retraining_waiting(client: PrefectClient) -> bool:
    """Return whether a run of the deployment is due and no worker has taken it yet."""
    return bool(await client.read_flow_runs(**any_run(RETRAIN, due_soon())))


def due_soon() -> RunCondition:
    """Return the condition that a run is scheduled for the next `SOON`."""
    due = {"before_": datetime.now(UTC) + SOON}
    return {"state": {"type": {"any_": ["SCHEDULED"]}}, "expected_start_time": due}


def any_run(deployment: str, condition: RunCondition) -> dict[str, Any]:
    """Return the arguments with which a client reads one run of a deployment.

    Args:
        deployment: its name.
        condition: that the run meets, as Prefect's API takes it.
    """
    return {
        "deployment_filter": DeploymentFilter.model_validate({"name": {"any_": [deployment]}}),
        "flow_run_filter": FlowRunFilter.model_validate(condition),
        "limit": 1,
    }
