"""`make services` as a user meets it: what it sets up, and what it survives."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta

import psutil
import pytest
from running_services import RunningServices, emit, make_project, write_trainer
from watching import is_alive, wait_until

from flows.deployments import lost_run_automation, stalled_run_automation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
DEPLOYMENTS = ["promote-check", "reproduce", "retrain", "watch-inbox"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = make_project(tmp_path_factory.mktemp("services") / "project")
    project.environment["FULLSCALE_PROMOTE_CRON"] = "* * * * * */20"  # every 20 s
    return project


@pytest.fixture(scope="module")
def services(project):
    services = RunningServices(project)
    services.start()
    yield services
    services.kill_left()


def deployment_names(services):
    return sorted(item["name"] for item in services.post("deployments/filter"))


def test_start_prints_where_everything_is(services):
    assert f"MLflow   {services.mlflow_url}\n" in services.log()
    assert f"Prefect  {services.prefect_url}\n" in services.log()
    assert "trainings at once: 1" in services.log()


def test_start_sets_prefect_up(services):
    assert deployment_names(services) == DEPLOYMENTS
    assert services.api.get("work_pools/local").json()["type"] == "process"
    assert services.api.get("v2/concurrency_limits/fullscale-device").json()["limit"] == 1
    retrain = services.deployment("retrain")
    assert retrain["global_concurrency_limit"]["limit"] == 1
    assert retrain["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    names = {item["name"] for item in services.post("automations/filter")}
    assert {"scans landed", "run without a sign of life"} <= names


def test_services_need_less_than_a_gigabyte_and_a_half(services):
    keeper = psutil.Process(services.process.pid)
    sizes = [each.memory_info().rss for each in (keeper, *services.processes())]
    assert sum(sizes) < 1.5e9


def test_schedule_fires(services):
    assert wait_until(lambda: services.runs("promote-check", "Completed"), 90), services.log()
    assert (services.project.root / "promote_check.txt").read_text() == "looked"
    run = services.runs("promote-check", "Completed")[0]
    assert run["created_by"]["type"] == "SCHEDULE"
    services.pause("promote-check")  # its runs would take the processors from the other tests


def test_landed_scans_start_a_retraining_that_says_why(services):
    write_trainer(services.project, "true")
    for num_accepted in (2, 3):  # a burst is one reason to train
        emit(services.project, services.prefect_url, "0a1b2c3d", num_accepted)
    assert wait_until(lambda: services.runs("retrain", "Completed"), 90), services.log()
    reasons = {run["parameters"]["reason"] for run in services.runs("retrain", "Completed")}
    assert "2 scans landed in data version 0a1b2c3d" in reasons


def test_second_retraining_waits_for_the_first(services):
    first, *_ = services.start_training("sleep 25")
    second = services.start_run("retrain")
    assert wait_until(lambda: services.state(second) == "AwaitingConcurrencySlot", 40)
    assert services.state(first) == "Running"
    emit(services.project, services.prefect_url, "landed meanwhile", 1)  # the second is enough
    assert wait_until(lambda: services.state(first) == "Completed", 90)
    write_trainer(services.project, "true")
    assert wait_until(lambda: services.state(second) == "Completed", 120), services.log()
    reasons = [run["parameters"].get("reason", "") for run in services.post("flow_runs/filter")]
    assert not any("landed meanwhile" in reason for reason in reasons)


def test_killed_worker_leaves_a_crashed_run_a_free_device_and_no_orphan(services):
    run_id, flow_pid, trainer_pid = services.start_training("exec sleep 300")
    assert services.num_busy_devices() == 1
    (worker,) = services.find("prefect worker start")
    killed_s = time.monotonic()
    worker.kill()
    assert wait_until(lambda: services.state(run_id) == "Crashed", 60), services.log()
    assert wait_until(lambda: services.num_busy_devices() == 0, 60)
    assert wait_until(lambda: not is_alive(flow_pid) and not is_alive(trainer_pid), 30)
    assert time.monotonic() - killed_s < 60
    run_id, *_ = services.start_training("true")
    assert wait_until(lambda: services.state(run_id) == "Completed", 90), services.log()


def test_run_survives_a_restart_of_its_server(services):
    run_id, *_ = services.start_training("sleep 40")
    (server,) = services.find("flows.prefect_server")
    server.kill()
    assert wait_until(lambda: services.state(run_id) == "", 10)
    assert wait_until(lambda: services.state(run_id) == "Running", 60), services.log()
    assert wait_until(lambda: services.state(run_id) == "Completed", 90), services.log()
    assert wait_until(lambda: services.num_busy_devices() == 0, 90)


def test_killed_flow_is_seen_by_its_worker(services):
    run_id, flow_pid, trainer_pid = services.start_training("exec sleep 300")
    os.kill(flow_pid, signal.SIGKILL)
    assert wait_until(lambda: services.state(run_id) == "Crashed", 30), services.log()
    assert wait_until(lambda: not is_alive(trainer_pid), 30)
    assert wait_until(lambda: services.num_busy_devices() == 0, 90)


def test_run_that_vanished_is_seen_as_crashed(services):
    run_id, flow_pid, trainer_pid = services.start_training("exec sleep 300")
    (worker,) = services.find("prefect worker start")
    killed_s = time.monotonic()
    worker.suspend()  # or it would tell of the flow's end
    os.kill(flow_pid, signal.SIGKILL)
    worker.kill()
    assert wait_until(lambda: not is_alive(trainer_pid), 30)
    assert wait_until(lambda: services.num_busy_devices() == 0, 90)
    assert time.monotonic() - killed_s < 90
    assert wait_until(lambda: services.state(run_id) == "Crashed", 300), services.log()
    run_id, *_ = services.start_training("true")
    assert wait_until(lambda: services.state(run_id) == "Completed", 90), services.log()


@pytest.mark.parametrize(
    ("automation", "state", "event"),
    [
        (lost_run_automation(), {"type": "RUNNING"}, None),
        (stalled_run_automation(), {"type": "PENDING"}, None),
        (stalled_run_automation(), {"type": "PENDING", "name": "Submitting"}, None),
        (
            stalled_run_automation(),
            {"type": "PENDING", "name": "Submitting"},
            "prefect.flow-run.pull-step.executed",
        ),
    ],
    ids=[
        "before its first heartbeat",
        "after it was taken",
        "while it was submitted",
        "after its folder was set",
    ],
)
def test_run_whose_process_went_early_is_seen_as_crashed(services, automation, state, event):
    # As it is but for the time, of which 10 s is the least that Prefect allows.
    trigger = automation.trigger.model_copy(update={"within": timedelta(seconds=10)})
    hasty = automation.model_copy(update={"name": "hasty", "trigger": trigger})

    automation_id = services.post("automations/", hasty.model_dump(mode="json"))["id"]
    try:
        run_id = services.start_run("promote-check", {"type": "PENDING"})
        if state != {"type": "PENDING"}:
            services.post(f"flow_runs/{run_id}/set_state", {"state": state})
        if event is not None:
            services.tell("promote-check", run_id, event)
        assert wait_until(lambda: services.state(run_id) == "Crashed", 120), services.log()
    finally:
        services.delete(f"automations/{automation_id}")
    message = services.api.get(f"flow_runs/{run_id}").json()["state"]["message"]
    assert message == automation.description


def test_second_services_say_that_the_port_is_in_use(services):
    told = services.project.run("python", "-m", "flows.services", code=1)
    port = services.project.environment["FULLSCALE_MLFLOW_PORT"]
    assert f"error: port {port} for mlflow is in use" in told
    assert "set FULLSCALE_MLFLOW_PORT to another port" in told
    assert "Traceback" not in told
    assert services.process.poll() is None


def test_request_to_end_ends_everything_and_services_start_again(services):
    run_id, flow_pid, trainer_pid = services.start_training("exec sleep 300")
    begin_s = time.monotonic()
    assert services.stop(signal.SIGTERM) == []
    assert time.monotonic() - begin_s < 30
    assert services.process.returncode == 0
    assert services.log().endswith("stopped\n")
    assert not is_alive(flow_pid)
    assert not is_alive(trainer_pid)
    services.start()
    assert deployment_names(services) == DEPLOYMENTS
    assert services.state(run_id) == "Crashed"
    assert services.num_busy_devices() == 0


def test_killed_keeper_takes_everything_with_it(services):
    _, _, trainer_pid = services.start_training("exec sleep 300")
    pids = [process.pid for process in services.processes()]
    flows = services.find("prefect.engine")
    services.process.kill()
    services.process.wait()
    assert wait_until(lambda: not is_alive(trainer_pid) and not services.has_ports(), 60)
    for flow in flows:  # it tries for minutes to tell a server that is gone
        if flow.is_running():
            flow.kill()
    assert wait_until(lambda: not any(is_alive(pid) for pid in pids), 60)


def test_interruption_of_the_start_leaves_nothing(project):
    services = RunningServices(project)
    with services.log_path.open("wb") as log:
        services.process = services.launch(log)
    assert wait_until(lambda: services.find("mlflow server"), 30)
    pids = services.stop(signal.SIGINT)
    assert pids == []
    assert services.process.returncode == 0
    assert "Traceback" not in services.log().partition("stopped")[2]


def test_server_that_does_not_start_is_told_with_its_own_words(project):
    project.environment["MLFLOW_BACKEND_STORE_URI"] = "nonsense://database"
    try:
        told = project.run("python", "-m", "flows.services", code=1)
    finally:
        del project.environment["MLFLOW_BACKEND_STORE_URI"]
    assert "error: mlflow did not start; it ended with code 1:" in told
    assert "nonsense" in told.partition("error: mlflow did not start")[2]
    assert not RunningServices(project).has_ports()


def test_missing_flow_is_told(project):
    path = project.root / "flows/promote_check.py"
    path.rename(path.with_suffix(".away"))
    try:
        told = project.run("python", "-m", "flows.services", code=1)
    finally:
        path.with_suffix(".away").rename(path)
    assert "error: the deployments were not made" in told
    assert "promote_check.py" in told.partition("error: the deployments were not made")[2]
