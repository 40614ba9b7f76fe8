"""Servers of a team: PostgreSQL behind both, S3 for artifacts and scans, a password before all."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import httpx
import pytest
import websockets
from running_services import RunningServices, make_project
from team_stores import ObjectStore, Postgres
from watching import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
USER, PASSWORD, API_PASSWORD = "radiology", "word for the models", "word for the runs"
MODEL_NAME = "organs"

# What a stage does with MLflow, as a run's program with no more than the worker's environment.
STAGE = f"""
from pathlib import Path
import pandas
from fullscale.tracking.registry import ModelPackage, log_model
from fullscale.tracking.store import connect, default_store

store = default_store(Path())
client, experiment_id = connect(store)
run = client.create_run(experiment_id, run_name="unet3plus")
client.log_metric(run.info.run_id, "val/dice", 0.9)
client.log_text(run.info.run_id, "told", "words.txt")
Path("weights.bin").write_bytes(b"weights")
log_model(
    store, run.info.run_id, "{MODEL_NAME}",
    ModelPackage(
        {{"weights": Path("weights.bin")}}, (), Path("team_model.py"), {{}}, ["mlflow"],
        ["scan"], ["scan"], pandas.DataFrame({{"scan": ["words"]}}),
    ),
)
client.set_terminated(run.info.run_id)
"""
MODEL = """
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

class Model(PythonModel):
    def predict(self, context, model_input, params=None):
        return model_input

set_model(Model())
"""
CODE = """
import mlflow, sys
from pathlib import Path
from fullscale.tracking.registry import download_model, find_alias
from fullscale.tracking.store import connect, default_store
client, _ = connect(default_store(Path()))
version = client.get_model_version(sys.argv[1], "1")
folder = download_model(default_store(Path()), version, Path("fetched"))
print((folder / "weights.bin").read_bytes())
"""


@pytest.fixture(scope="module")
def database():
    postgres = Postgres()
    postgres.start()
    yield postgres
    postgres.stop()


@pytest.fixture(scope="module")
def objects():
    store = ObjectStore("team")
    yield store
    store.stop()


@pytest.fixture(scope="module")
def kept_services(tmp_path_factory, database, objects):
    project = make_project(tmp_path_factory.mktemp("team") / "project")
    project.environment |= objects.environment | {
        "MLFLOW_BACKEND_STORE_URI": database.url("mlflow"),
        "MLFLOW_ARTIFACTS_DESTINATION": "s3://team/mlflow",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": database.url("prefect", "postgresql+asyncpg"),
        "MLFLOW_TRACKING_USERNAME": USER,
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        "PREFECT_API_AUTH_STRING": f"{USER}:{API_PASSWORD}",
        "FULLSCALE_PROMOTE_CRON": "* * * * * */20",
    }
    (project.root / "stage.py").write_text(STAGE)
    (project.root / "team_model.py").write_text(MODEL)
    services = RunningServices(project)
    yield services
    services.kill_left()


@pytest.fixture
def services(kept_services):
    """Services that run, also where the test before has ended them."""
    kept_services.start_if_ended()
    return kept_services


@pytest.fixture(scope="module")
def finished_run(kept_services):
    """A run by the worker whose program tracked and registered a model."""
    services = kept_services
    services.start_if_ended()
    run_id, *_ = services.start_training("PYTHONPATH=. exec python stage.py")
    assert wait_until(lambda: services.state(run_id) in ("Completed", "Failed"), 180)
    assert services.state(run_id) == "Completed", services.log()
    return run_id


def test_run_with_credentials_goes_through(services, finished_run):
    answer = httpx.get(
        f"{services.mlflow_url}/api/2.0/mlflow/model-versions/get",
        params={"name": MODEL_NAME, "version": "1"},
        auth=(USER, PASSWORD),
        timeout=30,
    )
    assert answer.json()["model_version"]["status"] == "READY"


def test_runs_and_users_stand_in_postgresql(services, finished_run, database):
    assert database.count("mlflow", "runs") == 1
    assert database.count("mlflow", "model_versions") == 1
    assert database.count("mlflow", "users") == 1
    assert database.count("prefect", "flow_run") >= 1
    assert not (services.project.root / "mlruns/mlflow.db").exists()
    assert not list((services.project.root / ".prefect").glob("*.db"))


def test_artifacts_stand_in_s3(finished_run, objects):
    names = {Path(key).name for key in objects.keys("mlflow/")}
    assert {"words.txt", "weights.bin"} <= names


def test_registered_model_comes_back(services, finished_run):
    project = services.project
    project.environment |= {"MLFLOW_TRACKING_URI": services.mlflow_url}
    try:
        assert "b'weights'" in project.run("python", "-c", CODE, MODEL_NAME)
    finally:
        del project.environment["MLFLOW_TRACKING_URI"]


def test_schedule_fires_on_postgresql(services):
    assert wait_until(lambda: services.runs("promote-check", "Completed"), 90), services.log()


def test_scans_travel_through_s3(services, objects):
    project = services.project
    project.run("dvc", "remote", "add", "--local", "--default", "team", "s3://team/dvc")
    (project.root / "scan.txt").write_text("voxels")
    project.run("dvc", "add", "scan.txt")
    project.run("dvc", "push", "scan.txt.dvc")
    assert len(objects.keys("dvc/files/md5/")) == 1
    (project.root / "scan.txt").unlink()
    shutil.rmtree(project.root / ".dvc/cache")
    project.run("dvc", "pull", "scan.txt.dvc")
    assert (project.root / "scan.txt").read_text() == "voxels"


MLFLOW_REQUESTS = [
    ("POST", "/api/2.0/mlflow/experiments/search", {"max_results": 5}),
    ("POST", "/api/2.0/mlflow/experiments/create", {"name": "stolen"}),
    ("POST", "/api/2.0/mlflow/runs/search", {"experiment_ids": ["1"]}),
    ("POST", "/ajax-api/2.0/mlflow/runs/search", {"experiment_ids": ["1"]}),
    ("GET", f"/api/2.0/mlflow/model-versions/get?name={MODEL_NAME}&version=1", None),
    ("GET", "/api/2.0/mlflow/registered-models/search", None),
    ("POST", "/api/2.0/mlflow/registered-models/alias", {"name": MODEL_NAME, "alias": "champion"}),
    ("GET", "/api/2.0/mlflow-artifacts/artifacts", None),
    ("PUT", "/api/2.0/mlflow-artifacts/artifacts/1/run/artifacts/weights.bin", {}),
    ("GET", "/get-artifact?path=words.txt&run_uuid=0", None),
    ("GET", "/api/2.0/mlflow/users/list", None),
    ("POST", "/api/2.0/mlflow/users/create", {"username": "x", "password": "a long password"}),
    ("POST", "/graphql", {"query": "{ __typename }"}),
]
PREFECT_REQUESTS = [
    ("POST", "/api/flows/filter", {}),
    ("POST", "/api/flow_runs/filter", {}),
    ("POST", "/api/deployments/filter", {}),
    ("POST", "/api/flows/", {"name": "stolen"}),
    ("POST", "/api/logs/filter", {}),
    ("POST", "/api/artifacts/filter", {}),
    ("POST", "/api/block_documents/filter", {}),
    ("POST", "/api/variables/filter", {}),
    ("POST", "/api/work_pools/filter", {}),
    ("GET", "/api/admin/settings", None),
    ("POST", "/api/admin/database/clear", {"confirm": True}),
]
WRONG = [None, ("admin", "password1234"), ("admin", "password"), (USER, "wrong word here")]


@pytest.mark.parametrize("auth", WRONG)
@pytest.mark.parametrize(("method", "path", "content"), MLFLOW_REQUESTS)
def test_mlflow_tells_strangers_nothing(services, finished_run, method, path, content, auth):
    answer = httpx.request(method, services.mlflow_url + path, json=content, auth=auth, timeout=30)
    assert answer.status_code == 401, answer.text
    assert MODEL_NAME not in answer.text


@pytest.mark.parametrize("auth", [None, (USER, PASSWORD), ("admin", "pass"), (USER, "")])
@pytest.mark.parametrize(("method", "path", "content"), PREFECT_REQUESTS)
def test_prefect_tells_strangers_nothing(services, finished_run, method, path, content, auth):
    answer = httpx.request(method, services.prefect_url + path, json=content, auth=auth, timeout=30)
    assert answer.status_code == 401, answer.text
    assert answer.json() == {"exception_message": "Unauthorized"}


@pytest.mark.parametrize("path", ["/api/events/in", "/api/events/out", "/api/logs/out"])
def test_prefect_lets_no_stranger_listen_or_speak(services, path):
    async def speak() -> str:
        url = services.prefect_url.replace("http", "ws", 1) + path
        try:
            async with websockets.connect(url, subprotocols=["prefect"]) as socket:
                await socket.send(json.dumps({"type": "auth", "token": "admin:pass"}))
                return str(json.loads(await socket.recv()).get("type"))
        except websockets.exceptions.WebSocketException:
            return "hung up"

    assert asyncio.run(speak()) in ("auth_failure", "hung up")


def test_health_is_open_for_probes(services):
    assert httpx.get(f"{services.mlflow_url}/health", timeout=30).status_code == 200
    assert httpx.get(f"{services.prefect_url}/api/health", timeout=30).status_code == 200


def test_credentials_open_both(services):
    request = {"max_results": 5}
    url = f"{services.mlflow_url}/api/2.0/mlflow/experiments/search"
    assert httpx.post(url, json=request, auth=(USER, PASSWORD), timeout=30).status_code == 200
    assert len(services.post("deployments/filter")) == 4


def test_no_password_is_seen_among_the_processes_or_in_the_log(services, finished_run):
    lines = [" ".join(each.cmdline()) for each in services.processes()]
    assert any("mlflow server" in line for line in lines)
    for secret in (PASSWORD, API_PASSWORD, "database%20password", "an access key"):
        assert not any(secret in line for line in lines)
        assert secret not in services.log()


def test_another_password_than_the_first_is_told(services, monkeypatch):
    assert services.stop() == []
    environment = services.project.environment
    monkeypatch.setitem(environment, "MLFLOW_TRACKING_PASSWORD", "another word for the models")
    # MLflow's server is asked first, so one of Prefect need not be started.
    monkeypatch.setitem(environment, "PREFECT_API_URL", "http://127.0.0.1:9/api")
    told = services.project.run("python", "-m", "flows.services", code=1)
    assert "error: MLflow answers code 401 to 'radiology'" in told
    assert "docs/operations.md" in told
    assert "another word" not in told
