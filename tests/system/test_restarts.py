"""Processes of `make services` are killed: nothing is lost, left or blocked."""

from __future__ import annotations

import os
import shutil
import signal
import time

import pytest
from running_services import (
    DEPLOYMENTS,
    UNTIL_GO,
    RunningServices,
    make_project,
    write_trainer,
)
from watching import is_alive, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ELSEWHERE = "http://127.0.0.1:9"
"""Of a server that the services then do not start; nobody asks it."""


@pytest.fixture(scope="module")
def project(tmp_path_factory, empty_databases):
    project = make_project(tmp_path_factory.mktemp("restarts") / "project", empty_databases)
    project.environment["FULLSCALE_WATCH_INTERVAL_S"] = "5"
    return project


@pytest.fixture(scope="module")
def idle_project(tmp_path_factory, empty_databases):
    """Another project, whose services do not run: a test that starts some leaves none."""
    return make_project(tmp_path_factory.mktemp("idle") / "project", empty_databases)


@pytest.fixture
def services(project, empty_databases):
    """Services that remember no run: one that crashed is taken up, perhaps during the next test."""
    folder = project.root / ".prefect"
    shutil.rmtree(folder)
    shutil.copytree(empty_databases / ".prefect", folder)
    services = RunningServices(project)
    services.start()
    yield services
    services.kill_left()


def test_killed_worker_leaves_a_crashed_run_a_free_device_and_no_orphan(services):
    run_id, flow_pid, trainer_pid = services.start_training("exec sleep 300")
    assert services.num_busy_devices() == 1
    write_trainer(services.project, "true")  # of the run that takes its work up
    (worker,) = services.find("prefect worker start")
    killed_s = time.monotonic()
    worker.kill()
    assert wait_until(lambda: services.state(run_id) == "Crashed", 60), services.log()
    assert wait_until(lambda: services.num_busy_devices() == 0, 60)
    assert wait_until(lambda: not is_alive(flow_pid) and not is_alive(trainer_pid), 30)
    assert time.monotonic() - killed_s < 60
    assert wait_until(lambda: "takes up a retraining that crashed" in services.log(), 60)
    assert wait_until(lambda: services.runs("retrain", "Completed"), 90), services.log()
    (taken_up,) = services.runs("retrain", "Completed")
    assert taken_up["parameters"]["reason"].startswith("taken up after a crash of ")
    run_id, *_ = services.start_training("true")  # no place in the queue was kept
    assert wait_until(lambda: services.state(run_id) == "Completed", 90), services.log()


def test_run_survives_a_restart_of_its_server(services):
    run_id, *_ = services.start_training(UNTIL_GO)
    (server,) = services.find("flows.servers.prefect_server")
    server.kill()
    assert wait_until(lambda: services.state(run_id) == "", 10)
    assert wait_until(lambda: services.state(run_id) == "Running", 60), services.log()
    (services.project.root / "go").touch()
    assert wait_until(lambda: services.state(run_id) == "Completed", 90), services.log()
    assert wait_until(lambda: services.num_busy_devices() == 0, 90)


def test_killed_flow_is_seen_by_its_worker(services):
    run_id, flow_pid, trainer_pid = services.start_training("exec sleep 300")
    write_trainer(services.project, "true")
    os.kill(flow_pid, signal.SIGKILL)
    assert wait_until(lambda: services.state(run_id) == "Crashed", 30), services.log()
    assert wait_until(lambda: not is_alive(trainer_pid), 30)
    assert wait_until(lambda: services.num_busy_devices() == 0, 90)


def test_run_that_vanished_is_seen_as_crashed(services):
    run_id, flow_pid, trainer_pid = services.start_training("exec sleep 300")
    write_trainer(services.project, "true")
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


def test_request_to_end_ends_everything_and_services_start_again(services):
    run_id, flow_pid, trainer_pid = services.start_training("exec sleep 300")
    write_trainer(services.project, "true")
    begin_s = time.monotonic()
    assert services.stop(signal.SIGTERM) == []
    assert time.monotonic() - begin_s < 30
    assert services.process.returncode == 0
    assert services.log().endswith("stopped\n")
    assert not is_alive(flow_pid)
    assert not is_alive(trainer_pid)
    services.start()
    assert services.deployment_names() == DEPLOYMENTS
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


def test_interruption_of_the_start_leaves_nothing(idle_project):
    services = RunningServices(idle_project)
    with services.log_path.open("wb") as log:
        services.process = services.launch(log)
    assert wait_until(lambda: services.find("mlflow server"), 30)
    pids = services.stop(signal.SIGINT)
    assert pids == []
    assert services.process.returncode == 0
    assert "Traceback" not in services.log().partition("stopped")[2]


def test_server_that_does_not_start_is_told_with_its_own_words(idle_project, monkeypatch):
    environment = idle_project.environment
    monkeypatch.setitem(environment, "MLFLOW_BACKEND_STORE_URI", "nonsense://database")
    monkeypatch.setitem(environment, "PREFECT_API_URL", f"{ELSEWHERE}/api")
    told = idle_project.run("python", "-m", "flows.services", code=1)
    assert "error: mlflow did not start; it ended with code 1:" in told
    assert "nonsense" in told.partition("error: mlflow did not start")[2]
    assert not RunningServices(idle_project).has_ports()


def test_missing_flow_is_told(idle_project, monkeypatch):
    monkeypatch.setitem(idle_project.environment, "MLFLOW_TRACKING_URI", ELSEWHERE)
    path = idle_project.root / "flows/promote_check.py"
    path.rename(path.with_suffix(".away"))
    try:
        told = idle_project.run("python", "-m", "flows.services", code=1)
    finally:
        path.with_suffix(".away").rename(path)
    assert "error: the deployments were not made" in told
    assert "promote_check.py" in told.partition("error: the deployments were not made")[2]
