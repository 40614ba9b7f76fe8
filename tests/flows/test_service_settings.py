from __future__ import annotations

import stat
from datetime import timedelta
from pathlib import Path

import pytest
from prefect.settings import load_profiles
from prefect.settings.models.server import ServerSettings

from flows.servers.service_settings import (
    SettingsError,
    check_credentials,
    plan_services,
    write_server_files,
)

ROOT = Path("/project")
CREDENTIALS = {
    "MLFLOW_TRACKING_USERNAME": "radiology",
    "MLFLOW_TRACKING_PASSWORD": "a long secret word",
    "PREFECT_API_AUTH_STRING": "radiology:another long secret",
}


def servers(environment, root=ROOT):
    return {service.name: service for service in plan_services(root, environment).servers}


def test_nothing_set_gives_local_servers_on_loopback():
    services = plan_services(ROOT, {})
    assert services.mlflow_url == "http://127.0.0.1:5000"
    assert services.prefect_url == "http://127.0.0.1:4200"
    assert services.environment["PREFECT_API_URL"] == "http://127.0.0.1:4200/api"
    mlflow, prefect = services.servers
    assert "127.0.0.1" in mlflow.command
    assert "127.0.0.1" in prefect.command
    assert mlflow.environment["MLFLOW_BACKEND_STORE_URI"] == "sqlite:////project/mlruns/mlflow.db"
    assert mlflow.environment["MLFLOW_ARTIFACTS_DESTINATION"] == "file:///project/mlruns/artifacts"
    assert "MLFLOW_DEFAULT_ARTIFACT_ROOT" not in mlflow.environment
    assert mlflow.environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert "basic-auth" not in mlflow.command
    assert prefect.environment["PREFECT_HOME"] == "/project/.prefect"
    assert "PREFECT_SERVER_API_AUTH_STRING" not in prefect.environment


def test_ports_come_from_the_environment():
    services = plan_services(
        ROOT, {"FULLSCALE_MLFLOW_PORT": "5901", "FULLSCALE_PREFECT_PORT": "5902"}
    )
    assert [service.port for service in services.servers] == [5901, 5902]
    assert services.mlflow_url == "http://127.0.0.1:5901"
    assert services.prefect_url == "http://127.0.0.1:5902"
    assert [service.command[-1] for service in services.servers] == ["5901", "5902"]


@pytest.mark.parametrize("text", ["http", "0", "65536", "-1", "5000.0"])
def test_wrong_port_names_its_variable(text):
    with pytest.raises(SettingsError, match=f"FULLSCALE_MLFLOW_PORT is '{text}', not a port"):
        plan_services(ROOT, {"FULLSCALE_MLFLOW_PORT": text})


def test_empty_variable_counts_as_not_set():
    assert plan_services(ROOT, {"FULLSCALE_MLFLOW_PORT": ""}).mlflow_url.endswith(":5000")
    assert set(servers({"MLFLOW_TRACKING_URI": "", "PREFECT_API_URL": ""})) == {"mlflow", "prefect"}


def test_servers_elsewhere_are_used_and_not_started():
    services = plan_services(
        ROOT,
        {
            "MLFLOW_TRACKING_URI": "https://mlflow.example",
            "PREFECT_API_URL": "https://p.example/api",
        },
    )
    assert services.servers == ()
    assert [service.name for service in services.workers] == ["worker", "watcher"]
    for service in services.workers:
        assert service.environment["MLFLOW_TRACKING_URI"] == "https://mlflow.example"
        assert service.environment["PREFECT_API_URL"] == "https://p.example/api"
    assert services.prefect_url == "https://p.example"


@pytest.mark.parametrize("tail", ["", "/"])
def test_own_address_in_the_environment_starts_the_servers(tail):
    environment = {
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:5000{tail}",
        "PREFECT_API_URL": f"http://127.0.0.1:4200/api{tail}",
    }
    found = servers(environment)
    assert set(found) == {"mlflow", "prefect"}
    database = found["mlflow"].environment["MLFLOW_BACKEND_STORE_URI"]
    assert database == "sqlite:////project/mlruns/mlflow.db"


def test_database_that_stages_use_directly_is_what_the_server_serves():
    mlflow = servers({"MLFLOW_TRACKING_URI": "sqlite:////elsewhere/runs.db"})["mlflow"]
    assert mlflow.environment["MLFLOW_BACKEND_STORE_URI"] == "sqlite:////elsewhere/runs.db"
    assert mlflow.environment["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"


def test_artifact_store_of_a_team_is_reached_through_the_server():
    mlflow = servers({"MLFLOW_ARTIFACTS_DESTINATION": "s3://bucket/mlflow"})["mlflow"]
    assert mlflow.environment["MLFLOW_ARTIFACTS_DESTINATION"] == "s3://bucket/mlflow"
    assert "MLFLOW_DEFAULT_ARTIFACT_ROOT" not in mlflow.environment


def test_worker_gets_credentials_but_no_database():
    environment = CREDENTIALS | {
        "MLFLOW_BACKEND_STORE_URI": "postgresql://u:secret@db/mlflow",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": "postgresql+asyncpg://u:secret@db/prefect",
    }
    services = plan_services(ROOT, environment)
    for service in services.workers:
        assert CREDENTIALS.items() <= service.environment.items()
        assert not any("postgresql" in value for value in service.environment.values())
    by_name = {service.name: service.environment for service in services.servers}
    assert by_name["mlflow"]["MLFLOW_BACKEND_STORE_URI"].startswith("postgresql")
    assert by_name["prefect"]["PREFECT_SERVER_DATABASE_CONNECTION_URL"].startswith("postgresql")


def test_credentials_protect_both_servers():
    found = servers(CREDENTIALS)
    assert "basic-auth" in found["mlflow"].command
    mlflow = found["mlflow"].environment
    assert mlflow["MLFLOW_AUTH_ADMIN_USERNAME"] == "radiology"
    assert mlflow["MLFLOW_AUTH_ADMIN_PASSWORD"] == CREDENTIALS["MLFLOW_TRACKING_PASSWORD"]
    assert len(mlflow["MLFLOW_FLASK_SERVER_SECRET_KEY"]) >= 64
    prefect = found["prefect"].environment
    assert prefect["PREFECT_SERVER_API_AUTH_STRING"] == CREDENTIALS["PREFECT_API_AUTH_STRING"]


def test_no_command_line_holds_a_secret():
    services = plan_services(
        ROOT, CREDENTIALS | {"MLFLOW_BACKEND_STORE_URI": "postgresql://u:databasesecret@db/mlflow"}
    )
    words = " ".join(
        word for service in (*services.servers, *services.workers) for word in service.command
    )
    assert "secret" not in words
    assert "mlflow server" in words


@pytest.mark.parametrize("name", sorted(CREDENTIALS))
def test_half_a_protection_is_refused(name):
    rest = {key: value for key, value in CREDENTIALS.items() if key != name}
    with pytest.raises(SettingsError, match=f"^{name} not set, though others are set; set all of"):
        check_credentials(rest, is_reachable=False)


def test_servers_for_others_need_credentials():
    with pytest.raises(SettingsError, match="though FULLSCALE_HOST opens the servers to others"):
        plan_services(ROOT, {"FULLSCALE_HOST": "ct.example.org"})


def test_servers_for_others_listen_everywhere_and_know_their_name():
    services = plan_services(ROOT, CREDENTIALS | {"FULLSCALE_HOST": "ct.example.org"})
    assert services.mlflow_url == "http://ct.example.org:5000"
    assert services.environment["PREFECT_API_URL"] == "http://ct.example.org:4200/api"
    mlflow, prefect = services.servers
    assert "0.0.0.0" in mlflow.command  # noqa: S104
    assert "0.0.0.0" in prefect.command  # noqa: S104
    allowed = mlflow.environment["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert allowed == ["ct.example.org:5000", "127.0.0.1:5000", "localhost:5000"]


@pytest.mark.parametrize("text", ["radiology", ":a long secret word", "radiology:"])
def test_authentication_string_needs_name_and_password(text):
    with pytest.raises(SettingsError, match="PREFECT_API_AUTH_STRING is not of the form"):
        check_credentials(CREDENTIALS | {"PREFECT_API_AUTH_STRING": text}, is_reachable=False)


@pytest.mark.parametrize(
    "short", [{"MLFLOW_TRACKING_PASSWORD": "password"}, {"PREFECT_API_AUTH_STRING": "a:password"}]
)
def test_short_password_is_refused_without_being_shown(short):
    with pytest.raises(SettingsError, match="need at least 12 characters each") as caught:
        check_credentials(CREDENTIALS | short, is_reachable=False)
    assert "'password'" not in str(caught.value)


def test_users_of_mlflow_stand_in_a_file_only_its_owner_reads(tmp_path):
    environment = CREDENTIALS | {"MLFLOW_BACKEND_STORE_URI": "postgresql://u:pass%2Fword@db/mlflow"}
    services = plan_services(tmp_path, environment)
    write_server_files(services)
    path = Path(services.servers[0].environment["MLFLOW_AUTH_CONFIG_PATH"])
    lines = path.read_text().splitlines()
    assert "database_uri = postgresql://u:pass%%2Fword@db/mlflow" in lines
    assert not any("long secret" in line for line in lines)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_nothing_is_written_without_credentials(tmp_path):
    write_server_files(plan_services(tmp_path, {}))
    assert list(tmp_path.iterdir()) == []


def test_schedules_have_defaults_and_can_be_changed():
    assert plan_services(ROOT, {}).environment["FULLSCALE_PROMOTE_CRON"] == "*/5 * * * *"
    changed = plan_services(ROOT, {"FULLSCALE_PROMOTE_CRON": "*/7 * * * *"})
    assert changed.environment["FULLSCALE_PROMOTE_CRON"] == "*/7 * * * *"


@pytest.mark.parametrize("text", ["0", "-1", "often", "nan", "inf"])
def test_wrong_interval_is_refused_before_anything_starts(text):
    assert plan_services(ROOT, {}).environment["FULLSCALE_WATCH_INTERVAL_S"] == "60"
    with pytest.raises(SettingsError, match=f"FULLSCALE_WATCH_INTERVAL_S is '{text}', not a num"):
        plan_services(ROOT, {"FULLSCALE_WATCH_INTERVAL_S": text})


def test_prefects_database_forgets_runs_after_a_month_and_events_after_a_week(monkeypatch):
    for name, value in servers({})["prefect"].environment.items():
        if name.startswith("PREFECT_SERVER"):
            monkeypatch.setenv(name, value)
    settings = ServerSettings()
    assert settings.events.retention_period == timedelta(days=7)
    assert settings.services.db_vacuum.retention_period == timedelta(days=30)
    assert settings.services.db_vacuum.enabled_vacuum_types == {"events", "flow_runs", "orphans"}


@pytest.mark.parametrize("name", ["FULLSCALE_PROMOTE_CRON", "FULLSCALE_RETRAIN_CRON"])
def test_wrong_cron_line_is_refused_before_anything_starts(name):
    with pytest.raises(
        SettingsError, match=f"{name} is '0 25 \\* \\*', not a cron line: minute, hour"
    ):
        plan_services(ROOT, {name: "0 25 * *"})


def test_prefects_profile_local_is_the_server_that_is_started():
    """The documented commands name this profile, so that no variable must be set for them."""
    settings = load_profiles()["local"].to_environment_variables()
    assert settings["PREFECT_API_URL"] == plan_services(ROOT, {}).environment["PREFECT_API_URL"]
