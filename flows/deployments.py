"""Create or update work pool, limits, deployments and automations on a Prefect server.

`python -m flows.deployments` needs no input and may be run again at any time.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.workers.process import ProcessWorker

from flows.devices import LIMIT
from flows.service_settings import POOL
from fullscale.runtime.processes import bind_to_parent

LOST_RUN = "run without a sign of life"
# Heartbeats come every 30 s: two may be late or lost while the server restarts.
LOST_AFTER_S = 90
STALLED_RUN = "run that did not start"
# A worker needs some seconds from taking a run to its first line; a starved machine, minutes.
STALLED_AFTER_S = 300


class DeploymentError(Exception):
    """The deployments could not be made."""


def count_devices(environment: Mapping[str, str]) -> int:
    """Return how many trainings may run at once: FULLSCALE_NUM_DEVICES, else one a GPU, or one.

    Raises:
        DeploymentError: the variable is not a positive integer.
    """
    text = environment.get("FULLSCALE_NUM_DEVICES")
    if text:
        if not text.isdecimal() or int(text) < 1:
            raise DeploymentError(
                f"FULLSCALE_NUM_DEVICES is {text!r}; set an integer of at least 1, or unset it"
            )
        return int(text)
    import torch

    return max(1, torch.cuda.device_count())


def lost_run_automation() -> AutomationCore:
    """Return an automation that marks a run as crashed when its heartbeats stop.

    It detects a process that died without reporting it, as in a power cut. The server emits
    `Running` itself, so a process that dies before its first heartbeat is found too. Runs that no
    deployment started send no heartbeats by default, and are not checked.
    """
    heartbeat, ended = "prefect.flow-run.heartbeat", ("Completed", "Failed", "Cancelled", "Crashed")
    return _crash_automation(
        name=LOST_RUN,
        why=f"No heartbeat for {LOST_AFTER_S} s: the process or its machine is gone.",
        after={heartbeat, "prefect.flow-run.Running"},
        expect={heartbeat, *(f"prefect.flow-run.{state}" for state in ended)},
        within_s=LOST_AFTER_S,
    )


def stalled_run_automation() -> AutomationCore:
    """Return an automation that marks a run as crashed when its worker died before starting it.

    Such a run would stay pending for ever: no other worker takes it. A worker's events from before
    the start, such as pull steps, do not count as a start.
    """
    return _crash_automation(
        name=STALLED_RUN,
        why=f"Not started {STALLED_AFTER_S} s after a worker took it: the worker is gone.",
        after={
            "prefect.flow-run.Pending",
            "prefect.flow-run.Submitting",
            "prefect.flow-run.pull-step.executed",
        },
        expect={"prefect.flow-run.*"},
        within_s=STALLED_AFTER_S,
    )


def _crash_automation(
    name: str, why: str, after: set[str], expect: set[str], within_s: float
) -> AutomationCore:
    """Return an automation: crashed if an event of `after` is not followed by one of `expect`."""
    return AutomationCore(
        name=name,
        description=why,
        trigger=EventTrigger(
            posture=Posture.Proactive,
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=ResourceSpecification({"prefect.resource.role": "deployment"}),
            after=after,
            expect=expect,
            for_each={"prefect.resource.id"},
            threshold=1,
            within=timedelta(seconds=within_s),
        ),
        actions=[
            ChangeFlowRunState(name="Crashed", state=StateType.CRASHED, force=False, message=why)
        ],
    )


async def set_up(client: PrefectClient, num_devices: int) -> None:
    """Create or update work pool, limit and automations."""
    template = ProcessWorker.get_default_base_job_template()
    pool = WorkPoolCreate(name=POOL, type=ProcessWorker.type, base_job_template=template)
    await client.create_work_pool(pool, overwrite=True)
    await client.upsert_global_concurrency_limit_by_name(LIMIT, num_devices)
    for automation in (lost_run_automation(), stalled_run_automation()):
        found = await client.read_automations_by_name(automation.name)
        for present in found:
            await client.update_automation(present.id, automation)
        if not found:
            await client.create_automation(automation)


async def _set_up(num_devices: int) -> None:
    async with get_client() as client:
        await set_up(client, num_devices)


def deploy(root: Path) -> None:
    """Create or update the deployments of prefect.yaml.

    Raises:
        DeploymentError: Prefect refused; the message holds its output.
    """
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(
        bind_to_parent(command),
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise DeploymentError(f"`prefect deploy --all` failed:\n{done.stdout.strip()}")


def main() -> None:
    """Set up the server that PREFECT_API_URL names for the working directory's project."""
    if not os.environ.get("PREFECT_API_URL"):
        sys.exit("error: PREFECT_API_URL is not set; it names the server to set up")
    try:
        num_devices = count_devices(os.environ)
        asyncio.run(_set_up(num_devices))
        deploy(Path())
    except DeploymentError as error:
        sys.exit(f"error: {error}")
    print(f"pool {POOL} and deployments are up to date; trainings at once: {num_devices}")


if __name__ == "__main__":
    main()
