"""What prefect.yaml says, read as Prefect reads it; that it works is in tests/system."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.actions import DoNothing
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.settings import PREFECT_API_URL
from prefect.workers.process import ProcessJobConfiguration

from flows.devices import LIMIT, VISIBLE
from flows.events import EVENT, RESOURCE_ID, RETRAINING, WANTED
from flows.servers.deployments import (
    FORMER_AUTOMATIONS,
    DeploymentError,
    count_devices,
    deploy,
    set_up,
)
from flows.servers.project_folder import ProjectFolderError, enter_project
from flows.servers.service_settings import POOL, plan_services
from flows.servers.watcher import FLOWS, LOST_AFTER_S

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "prefect.yaml").read_text()
DEPLOYMENTS = {item["name"]: item for item in yaml.safe_load(TEXT)["deployments"]}


def test_every_flow_has_its_deployment():
    assert list(DEPLOYMENTS) == ["reproduce", "watch-inbox", "retrain", "promote-check"]
    assert tuple(DEPLOYMENTS) == FLOWS


@pytest.mark.parametrize("name", list(DEPLOYMENTS))
def test_entry_point_has_the_deployments_name(name):
    word = name.replace("-", "_")
    assert DEPLOYMENTS[name]["entrypoint"] == f"flows/{word}.py:{word}"
    assert DEPLOYMENTS[name]["description"]


@pytest.mark.slow
def test_run_ends_with_its_worker_and_brings_no_command_of_its_own(prefect):
    assert {str(item["work_pool"]) for item in DEPLOYMENTS.values()} == {f"{{'name': '{POOL}'}}"}
    hostile = {
        "command": "touch reached",
        "env": {"PYTHONSTARTUP": "reached.py"},
        "working_dir": "/",
        "stream_output": True,
    }
    with get_client(sync_client=True) as client:
        set_up(client, 1)
        template = client.read_work_pool(POOL).base_job_template
    # As the worker makes it of the pool and of what a run was started with.
    job = asyncio.run(ProcessJobConfiguration.from_template_and_values(template, hostile))
    assert job.command == "python -m fullscale.runtime.processes python -m prefect.engine"
    assert (job.env, job.working_dir, job.stream_output) == ({}, None, False)


def test_runs_work_in_the_folder_of_their_worker(tmp_path, monkeypatch):
    """The folder is not part of a deployment: several workers share it."""
    pull = yaml.safe_load(TEXT)["pull"]
    assert pull == [{f"{enter_project.__module__}.{enter_project.__name__}": {}}]
    monkeypatch.chdir(ROOT)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv("FULLSCALE_ROOT", str(tmp_path / name))
        enter_project()
        assert Path.cwd() == tmp_path / name
    (tmp_path / "one").rmdir()
    monkeypatch.setenv("FULLSCALE_ROOT", str(tmp_path / "one"))
    with pytest.raises(ProjectFolderError, match=r"one cannot be entered \(No such file.*again"):
        enter_project()
    monkeypatch.delenv("FULLSCALE_ROOT")
    with pytest.raises(ProjectFolderError, match="has no FULLSCALE_ROOT; start it with"):
        enter_project()


def test_every_variable_is_set_by_the_services():
    names = set(re.findall(r"\{\{ \$(\w+) \}\}", TEXT))
    assert names == {
        "FULLSCALE_RETRAIN_CRON",
        "FULLSCALE_PROMOTE_CRON",
    }
    assert names <= set(plan_services(ROOT, {}).environment)


@pytest.mark.parametrize("name", ["retrain", "promote-check"])
def test_default_schedule_is_a_cron_that_prefect_knows(name):
    (schedule,) = DEPLOYMENTS[name]["schedules"]
    variable = re.fullmatch(r"\{\{ \$(\w+) \}\}", schedule["cron"])
    assert variable is not None
    CronSchedule(cron=plan_services(ROOT, {}).environment[variable.group(1)])


def test_one_retraining_runs_and_the_others_wait():
    assert DEPLOYMENTS["retrain"]["concurrency_limit"] == {
        "limit": 1,
        "collision_strategy": "ENQUEUE",
    }


@pytest.mark.parametrize("name", ["watch-inbox", "promote-check"])
def test_looks_that_come_too_often_are_left_out(name):
    assert DEPLOYMENTS[name]["concurrency_limit"] == {
        "limit": 1,
        "collision_strategy": "CANCEL_NEW",
    }


def test_scans_that_land_start_one_retraining():
    (trigger,) = DEPLOYMENTS["retrain"]["triggers"]
    assert trigger["expect"] == [EVENT]
    assert trigger["match"] == {"prefect.resource.id": RESOURCE_ID, RETRAINING: WANTED}
    assert trigger["within"] == 10
    assert "event.payload.data_version" in trigger["parameters"]["reason"]


def test_two_late_heartbeats_do_not_end_a_run():
    frequency = plan_services(ROOT, {}).environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]
    assert 2 * int(frequency) < LOST_AFTER_S


def test_number_of_devices_can_be_set():
    assert count_devices({"FULLSCALE_NUM_DEVICES": "4"}) == 4


def test_there_is_a_training_at_a_time_for_each_gpu_or_one():
    assert count_devices({VISIBLE: "0,GPU-5e"}) == 2
    assert count_devices({VISIBLE: ""}) == 1


@pytest.mark.parametrize("text", ["0", "-1", "all", "1.5"])
def test_wrong_number_of_devices_is_told(text):
    with pytest.raises(DeploymentError, match=f"FULLSCALE_NUM_DEVICES is '{text}'; set an integer"):
        count_devices({"FULLSCALE_NUM_DEVICES": text})


PIPELINE = """
definitions:
pull: []
deployments:
  - name: looked
    entrypoint: looked.py:looked
    work_pool: {name: local}
    schedules:
      - cron: "{{ $LOOK_CRON }}"
        slug: look
"""
FLOW = """
from prefect import flow

@flow
def looked():
    pass
"""


@pytest.mark.slow
def test_what_a_person_changed_stays(prefect, tmp_path, monkeypatch):
    (tmp_path / "prefect.yaml").write_text(PIPELINE)
    (tmp_path / "looked.py").write_text(FLOW)
    monkeypatch.setenv("PREFECT_API_URL", PREFECT_API_URL.value())
    monkeypatch.setenv("LOOK_CRON", "0 1 * * *")
    with get_client(sync_client=True) as client:

        def start(num_devices: int) -> None:
            set_up(client, num_devices)
            deploy(client, tmp_path)

        def state() -> tuple[object, ...]:
            deployment = client.read_deployment_by_name("looked/looked")
            (schedule,) = deployment.schedules
            limit = client.read_global_concurrency_limit_by_name(LIMIT).limit
            return deployment.paused, schedule.active, schedule.schedule.cron, limit

        former = AutomationCore(
            name=FORMER_AUTOMATIONS[0],
            trigger=EventTrigger(expect={"never"}, posture=Posture.Reactive),
            actions=[DoNothing()],
        )
        client.create_automation(former)
        start(1)
        assert client.read_automations_by_name(former.name) == []
        assert state() == (False, True, "0 1 * * *", 1)
        deployment = client.read_deployment_by_name("looked/looked")
        client.pause_deployment(deployment.id)
        client.update_deployment_schedule(
            deployment.id, deployment.schedules[0].id, schedule=CronSchedule(cron="5 5 * * *")
        )
        client.upsert_global_concurrency_limit_by_name(LIMIT, 3)
        changed = (True, True, "5 5 * * *", 3)
        start(1)
        assert state() == changed
        client.update_deployment_schedule(
            deployment.id, client.read_deployment_schedules(deployment.id)[0].id, active=False
        )
        monkeypatch.setenv("LOOK_CRON", "0 2 * * *")
        start(2)  # what was changed here is changed there, and stays paused
        assert state() == (True, False, "0 2 * * *", 2)
        client.delete_deployment(deployment.id)
        client.delete_global_concurrency_limit_by_name(LIMIT)
        start(2)
        assert state() == (False, True, "0 2 * * *", 2)
        client.delete_global_concurrency_limit_by_name(LIMIT)
