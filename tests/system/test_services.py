"""`make services` as a user meets it: what it sets up, and what it survives."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from datetime import timedelta
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import psutil
import pytest
from browser import find_browser
from playwright.sync_api import sync_playwright
from running_services import (
    DEPLOYMENTS,
    UNTIL_GO,
    RunningServices,
    emit,
    free_port,
    make_project,
    write_trainer,
)
from watching import wait_until

from fullscale.runtime.processes import stage_environment
from fullscale.tracking.store import Store, connect

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = make_project(tmp_path_factory.mktemp("services") / "project")
    project.environment["FULLSCALE_PROMOTE_CRON"] = "* * * * * */20"  # every 20 s
    for name in ("HTTP_PROXY", "http_proxy"):  # nobody is there
        project.environment[name] = f"http://127.0.0.1:{free_port()}"
    project.environment["PREFECT_SERVER_SERVICES_DB_VACUUM_LOOP_SECONDS"] = "10"  # not an hour
    return project


@pytest.fixture(scope="module")
def former_revision(project, empty_databases):
    """Of a database of Prefect that lacks the newest migration, and has one variable."""
    database = project.root / ".prefect/prefect.db"
    shutil.copytree(empty_databases / ".prefect", database.parent)
    project.run("prefect", "server", "database", "downgrade", "-y", "--revision", "-1")
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("INSERT INTO variable (name, value) VALUES ('of_before', '\"kept\"')")
    return read_revision(project)


def read_revision(project):
    """Return the newest migration of a project's database of Prefect."""
    with closing(sqlite3.connect(project.root / ".prefect/prefect.db")) as connection:
        (revision,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    return revision


@pytest.fixture(scope="module")
def services(project, former_revision):
    services = RunningServices(project)
    services.start()
    yield services
    services.kill_left()


def test_start_prints_where_everything_is(services):
    assert f"MLflow   {services.mlflow_url}/#/models?" in services.log()
    assert (services.project.root / "inbox/labelsTr").is_dir()
    assert f"Prefect  {services.prefect_url}\n" in services.log()
    assert "Code     branch main\n" in services.log()
    assert "trainings at once: 1" in services.log()


def test_start_sets_prefect_up(services):
    assert services.deployment_names() == DEPLOYMENTS
    assert services.get("work_pools/local")["type"] == "process"
    assert services.get("v2/concurrency_limits/fullscale-device")["limit"] == 1
    retrain = services.deployment("retrain")
    assert retrain["global_concurrency_limit"]["limit"] == 1
    assert retrain["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    assert [item["name"] for item in services.post("automations/filter")] == ["scans landed"]


def test_database_of_the_version_before_is_upgraded(services, former_revision):
    assert services.get("variables/name/of_before")["value"] == "kept"
    assert read_revision(services.project) != former_revision


class HostilePage(SimpleHTTPRequestHandler):
    """A page of another origin that reads deployments and starts one with a command of its own."""

    def do_GET(self):
        page = HOSTILE.replace("API", self.server.api).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(page)


HOSTILE = """<script>
const api = "API";
const outcome = {};
const attempt = async (name, path, options) => {
  try { outcome[name] = (await fetch(api + path, options)).type } catch { outcome[name] = "refused" }
};
(async () => {
  const plain = {method: "POST", headers: {"Content-Type": "text/plain"}, body: "{}"};
  await attempt("read", "deployments/filter", {...plain, headers: {"Content-Type": "application/json"}});
  await attempt("blind", "deployments/filter", {...plain, mode: "no-cors"});
  await new Promise((done) => {
    const socket = new WebSocket(api.replace("http", "ws") + "events/in");
    socket.onopen = () => { outcome.socket = "open"; done(); };
    socket.onclose = () => { outcome.socket ??= "refused"; done(); };
  });
  document.title = JSON.stringify(outcome);
})();
</script>"""  # noqa: E501


def test_page_of_another_site_reaches_nothing(services):
    own = f"127.0.0.1:{urlsplit(services.prefect_url).port}"
    rebound = own.replace("127.0.0.1", "rebound.example.org")
    with ThreadingHTTPServer(("127.0.0.1", 0), HostilePage) as server, sync_playwright() as tool:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        # The attacker's name resolves to this machine, once their page is open (DNS rebinding).
        browser = tool.chromium.launch(
            executable_path=find_browser(),
            args=["--no-sandbox", "--host-resolver-rules=MAP *.example.org 127.0.0.1"],
        )
        for api in (own, rebound):
            server.api = f"http://{api}/api/"
            page = browser.new_page()
            page.goto(f"http://evil.example.org:{server.server_port}/")
            page.wait_for_function("document.title.startsWith('{')")
            outcome = json.loads(page.title())
            assert (outcome["read"], outcome["socket"]) == ("refused", "refused")
        rebinding = browser.new_page().goto(f"http://{rebound}/api/deployments/filter")
        assert rebinding.status == 400
        for name in (own, own.replace("127.0.0.1", "localhost")):  # the pages still work
            page = browser.new_page()
            page.goto(f"http://{name}/deployments")
            page.get_by_text("promote-check").first.wait_for(timeout=60_000)
        browser.close()
        server.shutdown()


def test_server_takes_files_itself_and_keeps_them_where_stages_without_it_look(services):
    client, experiment_id = connect(Store(services.mlflow_url))
    run = client.create_run(experiment_id).info
    client.log_text(run.run_id, "through the server", "note.txt")
    assert run.artifact_uri.startswith("mlflow-artifacts:/")
    place = services.project.root / "mlruns/artifacts" / run.artifact_uri.partition(":/")[2]
    assert (place / "note.txt").read_text() == "through the server"


def test_services_need_less_than_a_gigabyte_and_a_half(services):
    keeper = psutil.Process(services.process.pid)
    sizes = [each.memory_info().rss for each in (keeper, *services.processes())]
    assert sum(sizes) < 1.5e9


def test_status_shows_the_next_scheduled_run(services):
    def read() -> dict:
        told = services.project.run(sys.executable, "-m", "tasks.cli", "status", "--json")
        return json.loads(told)["runs"]

    assert wait_until(lambda: read()["next"], 90), read()
    assert read()["api"] == f"{services.prefect_url}/api"


def test_schedule_fires(services):
    def ended():
        runs = services.runs("promote-check", "Completed")
        kinds = {run["id"]: (run["created_by"] or {}).get("type") for run in runs}
        return {run_id for run_id, kind in kinds.items() if kind == "SCHEDULE"}

    assert wait_until(ended, 90), services.log()
    assert ended() & set((services.project.root / "promote_check.txt").read_text().split())
    services.pause("promote-check")  # its runs would take the processors from the other tests


def test_old_runs_and_events_are_forgotten(services):
    """Runs that ended more than a month ago, and events of more than a week ago."""
    runs = {
        age: services.start_run("promote-check", {"type": "COMPLETED"})
        for age in (1, 6, 8, 29, 31, 60)  # in days
    }
    path = services.project.root / ".prefect/prefect.db"
    with closing(sqlite3.connect(path, timeout=60)) as database, database:
        for age, run_id in runs.items():
            changed = database.execute(
                "UPDATE flow_run SET end_time = datetime(end_time, ?) WHERE id = ?",
                (f"-{age} days", run_id),
            )
            assert changed.rowcount == 1
    for age, run_id in runs.items():
        services.tell("promote-check", run_id, f"aged.{age}", timedelta(days=age))

    def remembered() -> tuple[set[int], set[str]]:
        wanted = {"flow_runs": {"id": {"any_": list(runs.values())}}}
        found = {run["id"] for run in services.post("flow_runs/filter", wanted)}
        events = services.post("events/filter", {"filter": {"event": {"prefix": ["aged."]}}})
        names = {event["event"] for event in events["events"]}
        return {age for age, run_id in runs.items() if run_id in found}, names

    assert wait_until(lambda: remembered() == ({1, 6, 8, 29}, {"aged.1", "aged.6"}), 90)


def test_landed_scans_start_a_retraining_that_says_why(services):
    write_trainer(services.project, "true")
    for num_accepted in (2, 3):  # a burst is one reason to train
        emit(services.project, services.prefect_url, "0a1b2c3d", num_accepted)

    def reasons():
        return {run["parameters"].get("reason") for run in services.runs("retrain", "Completed")}

    wanted = "+2 scans, data version 0a1b2c3d"
    assert wait_until(lambda: wanted in reasons(), 90), services.log()


def test_second_retraining_waits_for_the_first(services):
    first, *_ = services.start_training(UNTIL_GO)
    second = services.start_run("retrain")
    assert wait_until(lambda: services.state(second) == "AwaitingConcurrencySlot", 40)
    assert services.state(first) == "Running"
    emit(services.project, services.prefect_url, "landed meanwhile", 1)  # the second is enough
    (services.project.root / "go").touch()
    assert wait_until(lambda: services.state(first) == "Completed", 90)
    write_trainer(services.project, "true")
    assert wait_until(lambda: services.state(second) == "Completed", 120), services.log()
    reasons = [run["parameters"].get("reason", "") for run in services.post("flow_runs/filter")]
    assert not any("landed meanwhile" in reason for reason in reasons)


def test_run_works_in_the_folder_of_whoever_takes_it(services, tmp_path):
    """Not in that of whoever made the deployment last: two clones may share a server."""
    project = services.project
    shutil.copytree(project.root / "flows", tmp_path / "flows")
    own = project.root / "promote_check.txt"
    own.touch()
    for folder in (tmp_path, tmp_path / "gone"):
        run_id = services.start_run("promote-check", {"type": "PENDING"})
        variables = {
            "FULLSCALE_ROOT": str(folder),
            "PREFECT_API_URL": f"{services.prefect_url}/api",
        }
        environment = stage_environment(project.environment | variables)
        command = [sys.executable, "-m", "prefect.engine", run_id]  # as a worker starts it
        subprocess.run(command, cwd=tmp_path, env=environment, timeout=120, check=False)
        if folder == tmp_path:
            assert services.state(run_id) == "Completed"
    told = f"project folder {folder} cannot be entered"
    wanted = {"logs": {"flow_run_id": {"any_": [run_id]}}}
    assert wait_until(lambda: told in str(services.post("logs/filter", wanted)), 30)
    [first] = (tmp_path / "promote_check.txt").read_text().split()
    assert not {first, run_id} & set(own.read_text().split())


def test_second_services_say_that_the_port_is_in_use(services):
    told = services.project.run("python", "-m", "flows.services", code=1)
    port = services.project.environment["FULLSCALE_MLFLOW_PORT"]
    assert f"error: port {port} for mlflow is in use" in told
    assert "set FULLSCALE_MLFLOW_PORT to another port" in told
    assert "Traceback" not in told
    assert services.process.poll() is None
