"""Settings of servers and worker: from environment variables, with defaults.

Databases, artifact store and credentials are set by the variables of MLflow, Prefect and boto3, so
that each means the same to every program. Only variables of this project begin with FULLSCALE.
Secrets are never on a command line, where every user of the machine could read them.
"""

from __future__ import annotations

import math
import secrets
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flows.servers import project_folder
from fullscale.runtime.files import write_atomically
from fullscale.runtime.processes import LOOPBACK, MLFLOW_PORT, PREFECT_PORT, stage_environment
from fullscale.tracking.locations import (
    artifact_folder,
    database_file,
    make_portable,
    own_database,
)
from fullscale.tracking.store import EXPERIMENT

POOL = "local"
DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "FULLSCALE_PROMOTE_CRON": "*/5 * * * *",
    "FULLSCALE_RETRAIN_CRON": "0 2 * * *",
    "FULLSCALE_WATCH_INTERVAL_S": "60",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # the least that Prefect allows
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EVENTS_RETENTION_PERIOD": "7d",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs,orphans",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": "30d",
    # Kept in memory, a lease is lost when the server restarts, and its slot taken for ever.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
        "prefect.server.concurrency.lease_storage.filesystem"
    ),
    "PREFECT_WORKER_QUERY_SECONDS": "5",
}
# Not passed to worker and runs: these open the servers' databases.
SERVER_VARIABLES = (
    "MLFLOW_AUTH_ADMIN_PASSWORD",
    "MLFLOW_AUTH_ADMIN_USERNAME",
    "MLFLOW_BACKEND_STORE_URI",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
    "PREFECT_SERVER_API_AUTH_STRING",
    "PREFECT_SERVER_DATABASE_CONNECTION_URL",
)
MIN_PASSWORD_LENGTH = 12  # MLflow's rule


class SettingsError(Exception):
    """A setting is wrong; the message says what to change."""


@dataclass(frozen=True)
class Service:
    """A program that is kept running.

    Attributes:
        name: prefix of its lines of output.
        command: program and arguments.
        environment: all of its variables.
        port: that it listens on; None if it does not listen.
        port_variable: the variable that moves it to another port.
        health_url: answers 200 once it works.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    port: int | None = None
    port_variable: str = ""
    health_url: str = ""


@dataclass(frozen=True)
class Services:
    """Programs to start.

    Attributes:
        servers: those that do not run elsewhere.
        workers: the one that takes runs from Prefect, and the one that looks into the inbox.
        environment: variables of worker and runs.
    """

    servers: tuple[Service, ...]
    workers: tuple[Service, ...]
    environment: Mapping[str, str]

    @property
    def mlflow_url(self) -> str:
        """Address of MLflow's pages and of its API."""
        return self.environment["MLFLOW_TRACKING_URI"]

    @property
    def prefect_url(self) -> str:
        """Address of Prefect's pages."""
        return self.environment["PREFECT_API_URL"].rstrip("/").removesuffix("/api")


def plan_services(root: Path, environment: Mapping[str, str]) -> Services:
    """Return the programs to start for a project.

    A server that runs elsewhere, by MLFLOW_TRACKING_URI or PREFECT_API_URL, is used, not started.

    Args:
        root: the project, absolute.
        environment: variables as a user sets them; an empty one counts as not set.

    Raises:
        SettingsError: a setting is wrong, missing, or contradicts another one.
    """
    given = {key: value for key, value in environment.items() if value}
    host = given.get("FULLSCALE_HOST", LOOPBACK[0])
    check_credentials(given, is_reachable=host not in LOOPBACK)
    mlflow_port = _read_port(given, "FULLSCALE_MLFLOW_PORT", MLFLOW_PORT)
    prefect_port = _read_port(given, "FULLSCALE_PREFECT_PORT", PREFECT_PORT)
    _check_interval(given)
    _check_crons({**DEFAULTS, **given})
    mlflow_url, api_url = f"http://{host}:{mlflow_port}", f"http://{host}:{prefect_port}/api"
    store = given.get("MLFLOW_TRACKING_URI", "").rstrip("/")
    is_mlflow_elsewhere = store.startswith("http") and store != mlflow_url
    is_prefect_elsewhere = given.get("PREFECT_API_URL", api_url).rstrip("/") != api_url
    everyone = stage_environment(
        {
            **DEFAULTS,
            "PREFECT_HOME": str(root / ".prefect"),
            "PREFECT_API_URL": api_url,
            **given,
            "MLFLOW_TRACKING_URI": store if is_mlflow_elsewhere else mlflow_url,
            project_folder.VARIABLE: str(root),
        }
    )
    servers = []
    if not is_mlflow_elsewhere:
        database = "" if store.startswith("http") else store
        servers.append(_plan_mlflow(root, everyone, host, mlflow_port, database))
    if not is_prefect_elsewhere:
        servers.append(_plan_prefect(everyone, host, prefect_port))
    client = {key: value for key, value in everyone.items() if key not in SERVER_VARIABLES}
    command = [sys.executable, "-m", "prefect", "worker", "start", "--type", "process"]
    command += ["--pool", POOL, "--name", socket.gethostname()]
    return Services(
        servers=tuple(servers),
        workers=(
            Service("worker", tuple(command), client),
            Service("watcher", (sys.executable, "-m", "flows.servers.watcher"), client),
        ),
        environment=client,
    )


def check_credentials(given: Mapping[str, str], *, is_reachable: bool) -> None:
    """Check that all servers have a password, or none has one and no other machine reaches them.

    Args:
        given: the environment.
        is_reachable: other machines can open the servers.

    Raises:
        SettingsError: a password is missing or too short.
    """
    names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "PREFECT_API_AUTH_STRING")
    missing = [name for name in names if name not in given]
    if missing and (is_reachable or len(missing) < len(names)):
        why = "FULLSCALE_HOST opens the servers to others" if is_reachable else "others are set"
        raise SettingsError(
            f"{', '.join(missing)} not set, though {why}; set all of {', '.join(names)}, the last "
            "one as NAME:PASSWORD"
        )
    if missing:
        return
    user, _, password = given["PREFECT_API_AUTH_STRING"].partition(":")
    if not user or not password:
        raise SettingsError("PREFECT_API_AUTH_STRING is not of the form NAME:PASSWORD")
    if min(len(password), len(given["MLFLOW_TRACKING_PASSWORD"])) < MIN_PASSWORD_LENGTH:
        raise SettingsError(
            "the passwords in MLFLOW_TRACKING_PASSWORD and PREFECT_API_AUTH_STRING need at least "
            f"{MIN_PASSWORD_LENGTH} characters each"
        )


def _plan_mlflow(
    root: Path, everyone: Mapping[str, str], host: str, port: int, database: str
) -> Service:
    """Return MLflow's server: one worker process and no job execution, which takes gigabytes."""
    own = own_database(root)
    environment = {
        "MLFLOW_BACKEND_STORE_URI": database or f"sqlite:///{own}",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_UVICORN_OPTS": "--no-access-log",
        **everyone,
    }
    # Where stages without a server look for them, too.
    store = database_file(environment["MLFLOW_BACKEND_STORE_URI"]) or own
    environment.setdefault("MLFLOW_ARTIFACTS_DESTINATION", artifact_folder(store).as_uri())
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
    command += ["--host", _bind_address(host), "--port", str(port)]
    if host not in LOOPBACK:
        names = ",".join(f"{name}:{port}" for name in (host, *LOOPBACK))
        environment.setdefault("MLFLOW_SERVER_ALLOWED_HOSTS", names)
    if "MLFLOW_TRACKING_PASSWORD" in everyone:
        command += ["--app-name", "basic-auth"]
        environment |= {
            "MLFLOW_AUTH_CONFIG_PATH": str(root / ".cache/services/mlflow_auth.ini"),
            "MLFLOW_AUTH_ADMIN_USERNAME": everyone["MLFLOW_TRACKING_USERNAME"],
            "MLFLOW_AUTH_ADMIN_PASSWORD": everyone["MLFLOW_TRACKING_PASSWORD"],
        }
        # It protects one form against cross-site requests, and may change at each start.
        environment.setdefault("MLFLOW_FLASK_SERVER_SECRET_KEY", secrets.token_hex(32))
    health_url = f"http://{LOOPBACK[0]}:{port}/health"
    return Service("mlflow", tuple(command), environment, port, "FULLSCALE_MLFLOW_PORT", health_url)


def _plan_prefect(everyone: Mapping[str, str], host: str, port: int) -> Service:
    """Return Prefect's server; it answers its own addresses, and those that a user adds."""
    own = [f"http://{name}:{port}" for name in dict.fromkeys((host, *LOOPBACK))]
    added = everyone.get("PREFECT_SERVER_CORS_ALLOWED_ORIGINS", "").split(",")
    origins = dict.fromkeys(origin.strip() for origin in (*added, *own) if origin.strip())
    environment = {**everyone, "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(origins)}
    if "PREFECT_API_AUTH_STRING" in everyone:
        environment["PREFECT_SERVER_API_AUTH_STRING"] = everyone["PREFECT_API_AUTH_STRING"]
    options = ("--host", _bind_address(host), "--port", str(port))
    health_url = f"http://{LOOPBACK[0]}:{port}/api/health"
    return Service(
        "prefect",
        (sys.executable, "-m", "flows.servers.prefect_server", *options),
        environment,
        port,
        "FULLSCALE_PREFECT_PORT",
        health_url,
    )


def convert_stores(services: Services) -> None:
    """Bring databases of MLflow's server that an earlier version wrote up to date."""
    for service in services.servers:
        database = database_file(service.environment.get("MLFLOW_BACKEND_STORE_URI", ""))
        if database is not None:
            destination = service.environment["MLFLOW_ARTIFACTS_DESTINATION"]
            make_portable(database, EXPERIMENT, destination)


def write_server_files(services: Services) -> None:
    """Write the configuration file of MLflow's users, which are kept in the database of its runs.

    The file may hold that database's password, so only this user may read it.
    """
    for service in services.servers:
        if "MLFLOW_AUTH_CONFIG_PATH" not in service.environment:
            continue
        path = Path(service.environment["MLFLOW_AUTH_CONFIG_PATH"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.chmod(0o700)
        database = service.environment["MLFLOW_BACKEND_STORE_URI"].replace("%", "%%")
        lines = ["[mlflow]", "default_permission = READ", f"database_uri = {database}"]
        write_atomically(path, "\n".join(lines) + "\n")


def _bind_address(host: str) -> str:
    """Return the loopback address, or all addresses if other machines may connect."""
    return LOOPBACK[0] if host in LOOPBACK else "0.0.0.0"  # noqa: S104 - credentials were checked


def _read_port(given: Mapping[str, str], name: str, default: int) -> int:
    """Return a port from the environment."""
    text = given.get(name, str(default))
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise SettingsError(f"{name} is {text!r}, not a port from 1 to 65535")
    return int(text)


def _check_interval(given: Mapping[str, str]) -> None:
    """Check the time between two looks into the inbox."""
    text = given.get("FULLSCALE_WATCH_INTERVAL_S", "1")
    try:
        is_valid = 1 <= float(text) < math.inf
    except ValueError:
        is_valid = False
    if not is_valid:
        raise SettingsError(f"FULLSCALE_WATCH_INTERVAL_S is {text!r}, not a number of seconds >= 1")


def _check_crons(given: Mapping[str, str]) -> None:
    """Check the lines of the schedules."""
    # Imported here, because it takes a second that no other use of this module needs.
    from prefect.client.schemas.schedules import CronSchedule

    for name in ("FULLSCALE_PROMOTE_CRON", "FULLSCALE_RETRAIN_CRON"):
        try:
            CronSchedule(cron=given[name])
        except ValueError:
            raise SettingsError(
                f"{name} is {given[name]!r}, not a cron line: minute, hour, day, month, weekday, "
                "such as '0 2 * * *'"
            ) from None
