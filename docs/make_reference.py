"""Write docs/reference.md: parameters from their pydantic models, variables and exit codes.

python -m docs.make_reference
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from flows.servers.service_settings import DEFAULTS
from fullscale.params import Params
from fullscale.runtime.errors import EX_TEMPFAIL
from fullscale.runtime.markdown import format_table
from fullscale.runtime.processes import CANNOT_RUN, NOT_FOUND, SPIN_COUNT
from fullscale.serving.upload import MAX_VOXELS
from fullscale.tracking.store import REQUEST_SETTINGS

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs/reference.md"
HEADER = """\
# Reference

Written by `python -m docs.make_reference`; do not edit. A test compares this page with the code.

- [Parameters](#parameters): params.yaml, key by key
- [Environment variables](#environment-variables)
- [Exit codes](#exit-codes)
- Commands: `fullscale --help`, `fullscale COMMAND --help`, `make help`
"""
PARAMETERS = """\
## Parameters

"Value" is what params.yaml has. A key with a default may be left out. An unknown key or a value
outside its range is an error that names the key.
"""
VARIABLES = """\
## Environment variables

MLflow, Prefect, boto3, torch and DVC read many more; these are
the ones that this project reads or sets. A variable that you set is not replaced, except where the
table says "always set".
"""
EXIT_CODES = """\
## Exit codes

Of `fullscale` and of every stage (`python -m tasks.STAGE`):
"""
AFTER_EXIT_CODES = """
`dvc repro` ends with another code when a stage fails. A flow reads the stage's code from its
event `failed`, and retries the stage if it is 75.
"""

# Groups of variables: name -> (default, meaning). None as default: the value is in the code.
Group = Mapping[str, tuple[str | None, str]]
OWN: Group = {
    "FULLSCALE_MLFLOW_PORT": ("5000", "port of MLflow under `make services`"),
    "FULLSCALE_PREFECT_PORT": ("4200", "port of Prefect under `make services`"),
    "FULLSCALE_HOST": (
        "127.0.0.1",
        "name by which other machines reach both servers; needs the three credentials below",
    ),
    "FULLSCALE_NUM_DEVICES": ("one for each GPU, or one", "trainings that run at the same time"),
    "FULLSCALE_WATCH_INTERVAL_S": (None, "seconds between two looks into the inbox"),
    "FULLSCALE_RETRAIN_CRON": (None, "schedule of `retrain`: a cron line in UTC"),
    "FULLSCALE_PROMOTE_CRON": (None, "schedule of `promote-check`"),
    "FULLSCALE_CODE_BRANCH": (
        "the branch that is checked out when `make services` starts",
        "branch of git whose code and parameters `retrain` trains",
    ),
    "FULLSCALE_GIT_REMOTE": ("none", "git remote to which `retrain` pushes its branches"),
    "FULLSCALE_INBOX": (
        "inbox",
        "folder or fsspec URL where scans arrive, such as s3://bucket/inbox",
    ),
    "FULLSCALE_NOTIFY": (
        "the Prefect variable `fullscale_notify`",
        "notification block for messages, as TYPE/NAME; empty: no messages",
    ),
    "FULLSCALE_SCAN_ROOT": (
        "none",
        "folder below which requests to a server may name scans by path",
    ),
    "FULLSCALE_MAX_VOXELS": (f"{MAX_VOXELS}", "voxels of the largest scan that a server accepts"),
    "FULLSCALE_EVENTS": (
        "none",
        "file to which a stage appends its events, one JSON object a line; flows set it",
    ),
    "FULLSCALE_ROOT": (
        "none",
        "project folder in which a Prefect worker runs; `make services` sets it",
    ),
}
MLFLOW: Group = {
    "MLFLOW_TRACKING_URI": (
        "sqlite:///mlruns/mlflow.db",
        "store of runs and models; if it names another server, `make services` starts none",
    ),
    "MLFLOW_TRACKING_USERNAME": ("none", "name for MLflow's server; the first one is its admin"),
    "MLFLOW_TRACKING_PASSWORD": ("none", "its password, at least 12 characters"),
    "MLFLOW_BACKEND_STORE_URI": ("sqlite:///mlruns/mlflow.db", "database of MLflow's server"),
    "MLFLOW_ARTIFACTS_DESTINATION": (
        "mlruns/artifacts",
        "bucket or folder in which its server keeps the files of runs and models",
    ),
    "MLFLOW_SERVER_ALLOWED_HOSTS": (
        "FULLSCALE_HOST, 127.0.0.1 and localhost",
        "host names that its server answers to",
    ),
    "MLFLOW_FLASK_SERVER_SECRET_KEY": ("random at each start", "protects its sign-up form"),
    "MLFLOW_AUTH_CONFIG_PATH": (
        ".cache/services/mlflow_auth.ini",
        "its users' database; always set by `make services` if there is a password",
    ),
    "MLFLOW_AUTH_ADMIN_USERNAME": ("MLFLOW_TRACKING_USERNAME", "always set, as above"),
    "MLFLOW_AUTH_ADMIN_PASSWORD": ("MLFLOW_TRACKING_PASSWORD", "always set, as above"),
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": ("false", "its job runner takes gigabytes"),
    "MLFLOW_UVICORN_OPTS": ("--no-access-log", "options of its web server"),
    "MLFLOW_DISABLE_TELEMETRY": (None, "nothing is reported to MLflow's makers"),
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": (None, "progress bars of its client"),
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": (None, "a server that is away is noticed in seconds"),
    "MLFLOW_HTTP_REQUEST_TIMEOUT": (None, "seconds; the same"),
}
PREFECT: Group = {
    "PREFECT_API_URL": (
        "none",
        "Prefect's server; if it names another one, `make services` starts none. Without it a flow "
        "starts a server for the time of its run",
    ),
    "PREFECT_API_AUTH_STRING": ("none", "NAME:PASSWORD for Prefect's server"),
    "PREFECT_HOME": (".prefect", "folder of Prefect's state"),
    "PREFECT_SERVER_API_AUTH_STRING": ("PREFECT_API_AUTH_STRING", "always set, for its server"),
    "PREFECT_SERVER_DATABASE_CONNECTION_URL": ("SQLite in .prefect", "database of its server"),
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": (None, "seconds between two signs of life of a run"),
    "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": (
        "http:// with the port, for FULLSCALE_HOST, 127.0.0.1 and localhost",
        "addresses under which its server answers, and whose pages may use it; yours are added, "
        "such as https://prefect.example.org of a proxy, separated by commas",
    ),
    "PREFECT_SERVER_ANALYTICS_ENABLED": (None, "nothing is reported to Prefect's makers"),
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
        None,
        "keeps slots of `fullscale-device` over a restart of the server",
    ),
    "PREFECT_SERVER_EVENTS_RETENTION_PERIOD": (None, "time after which its server forgets events"),
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": (None, "what its server forgets"),
    "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": (
        None,
        "time after which its server forgets runs that ended, their logs and artifacts",
    ),
    "PREFECT_WORKER_QUERY_SECONDS": (None, "seconds between two polls of the worker for runs"),
}
OTHER: Group = {
    "DO_NOT_TRACK": (None, "libraries that honour it report nothing"),
    "CUDA_VISIBLE_DEVICES": ("all GPUs", "GPUs that may be used; flows set it for each training"),
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8 if `train.deterministic`", "makes cuBLAS deterministic"),
    "GOMP_SPINCOUNT": (
        f"{SPIN_COUNT}, unless OMP_WAIT_POLICY is set",
        "how long waiting threads spin before they sleep",
    ),
    "PYTHONUNBUFFERED": ("1", "always set for stages, so that their lines appear at once"),
}
GROUPS: Mapping[str, Group] = {
    "This project": OWN,
    "MLflow": MLFLOW,
    "Prefect": PREFECT,
    "Others": OTHER,
}
CODES = {
    "0": "success",
    "1": "an error that you can fix, in one line that says how; with a traceback, a defect of this "
    "project. `fullscale validate`: a case would be refused. `fullscale ingest`: no case can be "
    "used, or with `--strict` one was refused. `fullscale doctor`: a line is not ok",
    "2": "wrong usage: an unknown option or a missing argument",
    "3": "`fullscale predict`: some of several scans failed, the others are written",
    str(EX_TEMPFAIL): "something it needs is away, such as MLflow's server: the same command may "
    "succeed later",
    str(CANNOT_RUN): "`python -m fullscale.runtime.processes`: the program cannot be executed",
    str(NOT_FOUND): "the same: there is no such program",
    "128 + N": "ended by signal N: 129 (a closed terminal), 130 (Ctrl-C), 143 (SIGTERM). A "
    "training finishes its step and saves its state first",
}


def render() -> str:
    """Return the page."""
    parts = [HEADER, PARAMETERS, *_render_parameters(), VARIABLES]
    for title, group in GROUPS.items():
        rows = [
            (f"`{name}`", f"{_code_default(name) if default is None else default}", meaning)
            for name, (default, meaning) in group.items()
        ]
        parts.append(f"### {title}\n\n" + _table(("variable", "default", "meaning"), rows))
    codes = _table(("code", "meaning"), list(CODES.items()))
    return "\n".join([*parts, EXIT_CODES, codes]) + AFTER_EXIT_CODES


def list_variables() -> set[str]:
    """Return the names of all variables on the page."""
    return {name for group in GROUPS.values() for name in group}


def _code_default(name: str) -> str:
    return f"`{(DEFAULTS | REQUEST_SETTINGS)[name]}`"


def _render_parameters() -> Iterator[str]:
    schema = Params.model_json_schema()
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    models = schema["$defs"]
    top = {key: field for key, field in schema["properties"].items() if not _model_of(field)}
    yield _section("Top level", "", top, values)
    for key, field in schema["properties"].items():
        if (name := _model_of(field)) is not None:
            yield from _render_model(f"{key}.", models[name], models, values.get(key, {}))
    yield _section("recipes.NAME.", models["Recipe"]["description"], models["Recipe"]["properties"])


def _render_model(
    prefix: str, model: Mapping[str, Any], models: Mapping[str, Any], values: Mapping[str, Any]
) -> Iterator[str]:
    own = {key: field for key, field in model["properties"].items() if not _model_of(field)}
    yield _section(prefix, model["description"], own, values)
    for key, field in model["properties"].items():
        if (name := _model_of(field)) is not None:
            yield from _render_model(f"{prefix}{key}.", models[name], models, values[key])


def _section(
    title: str,
    description: str,
    fields: Mapping[str, Any],
    values: Mapping[str, Any] | None = None,
) -> str:
    rows = []
    for key, field in fields.items():
        row = [f"`{key}`", _type_of(field), *([] if values is None else [_value(key, values)])]
        rows.append((*row, _default_of(field), field.get("description", "")))
    headings = ["key", "type and range", *([] if values is None else ["value"])]
    heading = f"`{title.rstrip('.')}`" if title.endswith(".") else title
    text = f"{' '.join(description.split())}\n\n" if description else ""
    return f"### {heading}\n\n{text}" + _table((*headings, "default", "meaning"), rows)


def _model_of(field: Mapping[str, Any]) -> str | None:
    """Return the name of the model that a field holds, or None for a plain value."""
    return field["$ref"].rpartition("/")[2] if "$ref" in field else None


def _type_of(field: Mapping[str, Any]) -> str:
    """Return type and range of a field of a JSON schema in words."""
    if "anyOf" in field:
        return " or ".join(_type_of(option) for option in field["anyOf"])
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if "prefixItems" in field:
        return f"{len(field['prefixItems'])} {_type_of(field['prefixItems'][0])}s"
    kind = field["type"]
    if kind == "array":
        head, comma, rest = _type_of(field["items"]).partition(", ")
        plural = "" if head.startswith("`") else "s"
        return f"list of {head}{plural}{comma}{rest}"
    if kind == "object":
        inner = field["additionalProperties"]
        return f"NAME: {'a recipe' if '$ref' in inner else _type_of(inner)}"
    names = {"integer": "whole number", "boolean": "true or false"}
    limits = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
        "pattern": "matches",
    }
    found = [f"{word} {_limit(field[key])}" for key, word in limits.items() if key in field]
    return ", ".join([names.get(kind, kind), *found])


def _limit(value: object) -> str:
    return f"`{value}`" if isinstance(value, str) else f"{value:g}"


def _value(key: str, values: Mapping[str, Any]) -> str:
    if key not in values:
        return "default"
    value = values[key]
    if isinstance(value, dict):
        if all(isinstance(each, dict) for each in value.values()):
            return ", ".join(f"`{name}`" for name in value)
        return f"`{yaml.safe_dump(value, default_flow_style=True, sort_keys=False).strip()}`"
    return f"`{_plain(value)}`"


def _default_of(field: Mapping[str, Any]) -> str:
    return f"`{_plain(field['default'])}`" if "default" in field else ""


def _plain(value: object) -> str:
    """Return a value as params.yaml has it."""
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(format_table(headings, rows)) + "\n"


def main() -> None:
    """Write the page."""
    TARGET.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
