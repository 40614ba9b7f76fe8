"""Create or update work pool, limits and deployments on a Prefect server.

`python -m flows.servers.deployments` needs no input and may be run again at any time: it creates
what is missing, and changes only what is defined otherwise than when it was applied last.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectNotFound
from prefect.utilities.templating import apply_values
from prefect.variables import Variable
from prefect.workers.process import ProcessWorker

from flows.devices import LIMIT, list_gpus
from flows.servers.service_settings import POOL
from fullscale.runtime.processes import bind_to_parent

JOB_TEMPLATE: dict[str, Any] = {
    "job_configuration": {
        # A run ends with its worker, so that a killed worker leaves no training running.
        "command": "python -m fullscale.runtime.processes python -m prefect.engine",
        # Lines go to Prefect's log only: writing to the pipe of a dead worker would end a run
        # before it can report that it crashed.
        "stream_output": False,
    },
    # Who may start a run may not choose its command or environment.
    "variables": {"type": "object", "properties": {}},
}
"""How the worker of the work pool starts a run."""

APPLIED_VARIABLE = "fullscale_applied"
# What flows/servers/watcher.py does instead.
FORMER_SCHEDULES = ("watch",)
FORMER_AUTOMATIONS = ("run without a sign of life", "run that did not start")


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
    return max(1, len(list_gpus(environment)))


class AppliedDefinitions:
    """Digests of the definitions that were applied last, in a variable on the server.

    A person may change anything on the server. That stays until the definition itself changes.
    """

    def __init__(self, client: SyncPrefectClient) -> None:
        found = client.read_variable_by_name(APPLIED_VARIABLE)
        self._digests = dict(cast("dict[str, str]", found.value)) if found else {}

    def is_current(self, name: str, content: object) -> bool:
        """Return whether this definition is the one that was applied last."""
        return self._digests.get(name) == _digest(content)

    def note(self, name: str, content: object) -> None:
        """Record that a definition was applied."""
        self._digests[name] = _digest(content)
        Variable.set(APPLIED_VARIABLE, self._digests, overwrite=True)


def _digest(content: object) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def set_up(client: SyncPrefectClient, num_devices: int) -> None:
    """Create work pool and limit where missing; update those defined otherwise now."""
    applied = AppliedDefinitions(client)
    pool = WorkPoolCreate(name=POOL, type=ProcessWorker.type, base_job_template=JOB_TEMPLATE)
    if not (applied.is_current(POOL, JOB_TEMPLATE) and _exists(client.read_work_pool, POOL)):
        client.create_work_pool(pool, overwrite=True)
        applied.note(POOL, JOB_TEMPLATE)
    has_limit = _exists(client.read_global_concurrency_limit_by_name, LIMIT)
    if not (applied.is_current(LIMIT, num_devices) and has_limit):
        client.upsert_global_concurrency_limit_by_name(LIMIT, num_devices)
        applied.note(LIMIT, num_devices)
    for name in FORMER_AUTOMATIONS:
        for automation in client.read_automations_by_name(name):
            client.delete_automation(automation.id)


def deploy(client: SyncPrefectClient, root: Path) -> None:
    """Create the deployments of prefect.yaml where missing; update those defined otherwise now.

    What a person paused stays paused.

    Raises:
        DeploymentError: Prefect refused; the message holds its output.
    """
    applied = AppliedDefinitions(client)
    definitions = read_definitions(root)
    paused: dict[str, set[str | None]] = {}
    for name, content in definitions.items():
        full_name = f"{name}/{name}"
        is_there = _exists(client.read_deployment_by_name, full_name)
        if is_there and applied.is_current(full_name, content):
            continue
        paused[name] = _list_paused(client, full_name) if is_there else set()
    if not paused:
        return
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy"]
    command += [part for name in paused for part in ("--name", name)]
    done = subprocess.run(
        bind_to_parent(command),
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise DeploymentError(f"`prefect deploy` failed:\n{done.stdout.strip()}")
    for name, places in paused.items():
        _pause(client, f"{name}/{name}", places)
        applied.note(f"{name}/{name}", definitions[name])


def read_definitions(root: Path) -> dict[str, object]:
    """Return what prefect.yaml says of each deployment, with the values of variables, by name."""
    content = yaml.safe_load((root / "prefect.yaml").read_text(encoding="utf-8"))
    return {
        str(item["name"]): apply_values(
            {"pull": content["pull"], **item}, dict(os.environ), remove_notset=False
        )
        for item in content["deployments"]
    }


def _list_paused(client: SyncPrefectClient, full_name: str) -> set[str | None]:
    """Return the slugs of the paused schedules of a deployment, and "" if it is paused itself."""
    found = client.read_deployment_by_name(full_name)
    slugs = {schedule.slug for schedule in found.schedules if not schedule.active}
    return slugs | ({""} if found.paused else set())


def _pause(client: SyncPrefectClient, full_name: str, places: set[str | None]) -> None:
    """Pause what `_list_paused` returned, and delete schedules that prefect.yaml has no more."""
    found = client.read_deployment_by_name(full_name)
    if "" in places:
        client.pause_deployment(found.id)
    for schedule in found.schedules:
        if schedule.slug in FORMER_SCHEDULES:
            client.delete_deployment_schedule(found.id, schedule.id)
        elif schedule.slug in places:
            client.update_deployment_schedule(found.id, schedule.id, active=False)


def _exists(read: Callable[[str], object], name: str) -> bool:
    try:
        read(name)
    except ObjectNotFound:
        return False
    return True


def main() -> None:
    """Set up the server that PREFECT_API_URL names for the working directory's project."""
    if not os.environ.get("PREFECT_API_URL"):
        sys.exit("error: PREFECT_API_URL is not set; it names the server to set up")
    try:
        num_devices = count_devices(os.environ)
        with get_client(sync_client=True) as client:
            set_up(client, num_devices)
            deploy(client, Path())
    except DeploymentError as error:
        sys.exit(f"error: {error}")
    print(f"pool {POOL} and deployments are up to date; trainings at once: {num_devices}")


if __name__ == "__main__":
    main()
