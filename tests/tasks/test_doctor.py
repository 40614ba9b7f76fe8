import shutil
import socket
import subprocess
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from project import ROOT
from typer.testing import CliRunner

from flows.servers.service_settings import plan_services
from tasks.cli import app
from tasks.commands import doctor

GIB = 2**30


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    for server in doctor.SERVERS.values():
        monkeypatch.delenv(server.port_variable, raising=False)
        monkeypatch.delenv(server.url_variable, raising=False)


@pytest.fixture
def web_server():
    """A program that answers 200 to /health below its address, and 404 to all else."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_servers_are_those_that_services_start(tmp_path):
    planned = {service.name: service for service in plan_services(tmp_path, {}).servers}
    for name, server in doctor.SERVERS.items():
        service = planned[name.lower()]
        assert (service.port_variable, service.port) == (server.port_variable, server.port)
        assert service.health_url == f"http://127.0.0.1:{server.port}{server.path}/health"


def test_server_that_runs_is_found(web_server, monkeypatch):
    monkeypatch.setenv("FULLSCALE_MLFLOW_PORT", str(web_server))
    assert str(doctor.check_server("MLflow")) == f"ok  MLflow: runs at port {web_server}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{web_server}/")
    assert doctor.check_server("MLflow").found == f"runs at http://127.0.0.1:{web_server}/"


def test_port_of_another_program_is_told(web_server, monkeypatch):
    monkeypatch.setenv("FULLSCALE_PREFECT_PORT", str(web_server))
    line = doctor.check_server("Prefect")
    assert line.found == f"port {web_server} answers, but not as Prefect does"
    assert "set FULLSCALE_PREFECT_PORT to another one" in line.cure


def test_server_that_is_away_is_told(monkeypatch):
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("FULLSCALE_MLFLOW_PORT", str(port))
    assert doctor.check_server("MLflow").cure == ""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    assert doctor.check_server("MLflow").cure == "start it, or correct MLFLOW_TRACKING_URI"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setenv("FULLSCALE_MLFLOW_PORT", "99999")
    assert doctor.check_server("MLflow").cure == "wanted a port from 1 to 65535"


@pytest.mark.parametrize(
    ("free_gib", "data_gib", "is_enough"), [(6, 1, True), (4, 0, False), (29, 10, False)]
)
def test_disk_holds_three_times_the_scans(free_gib, data_gib, is_enough):
    line = doctor.check_disk(free_gib * GIB, data_gib * GIB)
    assert (line.cure == "") == is_enough


def test_old_python_and_other_packages_are_told(tmp_path):
    assert "3.11 or newer" in doctor.check_python((3, 10)).cure
    assert doctor.check_python((3, 12)).cure == ""
    (tmp_path / "constraints.txt").write_text("# tested\nnumpy==0.1\nno-such-package==1\n")
    line = doctor.check_packages(tmp_path / "constraints.txt")
    assert line.found.startswith("numpy ")
    assert line.found.endswith(", tested 0.1")
    assert line.cure == "run `make setup`"
    assert doctor.check_packages(ROOT / "constraints.txt").cure == ""
    assert doctor.check_packages(tmp_path / "none.txt").cure == "run in the project's folder"


def test_folder_without_a_project_is_told(tmp_path):
    assert "not a git repository" in doctor.check_git(tmp_path).found
    assert "params.yaml is missing" in doctor.check_params(tmp_path).found
    assert "fullscale ingest" in doctor.check_scans(tmp_path).cure


@pytest.mark.slow
def test_doctor_of_a_project_with_scans(scans_repo, monkeypatch):
    """DVC is started several times."""
    shutil.copy(ROOT / "params.yaml", scans_repo)
    shutil.copy(ROOT / "constraints.txt", scans_repo)
    monkeypatch.chdir(scans_repo)
    monkeypatch.setattr(doctor, "FREE_GIB", 0)
    monkeypatch.setattr(doctor, "MEMORY_GIB", 0)
    lines = {line.name: line for line in doctor.examine(scans_repo)}
    assert lines["scans"].found == "3 cases, as data.dvc says"
    remote = scans_repo / "gone"
    subprocess.run(["dvc", "remote", "add", "--force", "--default", "away", remote], check=True)
    (scans_repo / "data/notes.txt").write_text("new")
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "do  scans: 3 cases, others than those of data.dvc; keep them with" in done.output
    assert "do  DVC remote: away," in done.output
    assert "which is no folder; mount or make it" in done.output
