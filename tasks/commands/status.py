"""Show the state of a project on one screen: models, scans, inbox, runs, disk."""

from __future__ import annotations

import json
import os
import shutil
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fullscale.runtime.console import report_errors
from fullscale.runtime.errors import StageError, shorten
from fullscale.runtime.files import folder_bytes
from fullscale.runtime.processes import PREFECT_PORT

Facts = dict[str, Any]
GIB = 2**30
TIMEOUT_S = 2.0
WIDTH = 79
KEPT_FOLDERS = ("data", ".dvc/cache", "artifacts", "mlruns", ".cache", ".prefect")
NUM_RUNS = 3


@report_errors
def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show models in use, data version, inbox, runs, next schedule and disk. Changes nothing."""
    facts = read_status(Path().resolve())
    typer.echo(json.dumps(facts, indent=2) if as_json else "\n".join(describe(facts)))


def read_status(root: Path) -> Facts:
    """Return the state of a project as plain values; what cannot be read is a text under `error`.

    Args:
        root: the project.
    """
    parts = {
        "models": _read_models,
        "verdict": _read_verdict,
        "scans": _read_scans,
        "inbox": _read_inbox,
        "runs": _read_runs,
        "disk": _read_disk,
    }
    facts = {}
    for name, read in parts.items():
        try:
            facts[name] = read(root)
        except StageError as error:
            facts[name] = {"error": str(error)}
    return facts


def _read_models(root: Path) -> Facts:
    from fullscale.params import load_params
    from fullscale.tracking.registry import (
        CHALLENGER,
        CHAMPION,
        VERDICT_TAG,
        find_alias,
    )
    from fullscale.tracking.store import COMMIT_TAG, DATA_VERSION_TAG, default_store, has_store

    name = load_params(root / "params.yaml").register_.model_name
    if not has_store(root):
        return {"name": name, CHAMPION: None, CHALLENGER: None}
    store = default_store(root)
    found: Facts = {"name": name}
    for alias in (CHAMPION, CHALLENGER):
        version = find_alias(store, name, alias)
        found[alias] = version and {
            "version": version.version,
            "verdict": version.tags.get(VERDICT_TAG, ""),
            "data_version": version.tags.get(DATA_VERSION_TAG, ""),
            "git_commit": version.tags.get(COMMIT_TAG, ""),
        }
    return found


def _read_verdict(root: Path) -> Facts:
    from fullscale.evaluation.score_files import read_verdict
    from fullscale.workspace import open_workspace

    verdict = read_verdict(open_workspace(root))
    keys = ("status", "candidate", "baseline", "test_set", "data_version")
    return {key: verdict[key] for key in keys}


def _read_scans(root: Path) -> Facts:
    from fullscale.runtime.errors import ScanError
    from fullscale.scans.cohort import read_cohort
    from fullscale.versioning.data_version import committed_data_version
    from fullscale.versioning.git import SCANS_BRANCH, find_commit
    from fullscale.versioning.provenance import read_data_version
    from fullscale.versioning.retraining import newest_branch

    found: Facts = {"data_version": read_data_version(root)}
    try:
        cases = read_cohort(root / "data").cases
        found |= {"cases": len(cases), "patients": len({case.patient for case in cases})}
    except ScanError as error:
        found["error"] = f"{error.found}; {error.cure}"
    tip = find_commit(root, f"refs/heads/{SCANS_BRANCH}")
    if tip is not None:
        found["landed"] = committed_data_version(root, tip)
    found["retrained"] = newest_branch(root)
    return found


def _read_inbox(root: Path) -> Facts:
    from fullscale.inbox.arrivals import classify_files
    from fullscale.inbox.inbox import SETTLE_S, Inbox, inbox_url

    url = inbox_url(root, os.environ)
    if url == str(root / "inbox") and not (root / "inbox").is_dir():
        return {"url": url, "ready": [], "waiting": {}}  # `make services` makes it
    files = Inbox(url).list_files()
    arrivals = classify_files(files, files, time.time(), SETTLE_S)
    held = (*arrivals.waiting, *arrivals.unsafe)
    return {
        "url": url,
        "ready": [pair.name for pair in arrivals.ready],
        "waiting": {pair.name: pair.reason for pair in held},
    }


def _read_runs(_root: Path) -> Facts:
    """Ask Prefect's server; without one there are no runs to show."""
    import httpx

    port = os.environ.get("FULLSCALE_PREFECT_PORT") or PREFECT_PORT
    api = os.environ.get("PREFECT_API_URL", f"http://127.0.0.1:{port}/api").rstrip("/")
    user, _, password = os.environ.get("PREFECT_API_AUTH_STRING", "").partition(":")
    wanted = {
        "now": (["RUNNING", "PENDING", "CANCELLING"], "START_TIME_DESC"),
        "next": (["SCHEDULED"], "NEXT_SCHEDULED_START_TIME_ASC"),
        "last": (["COMPLETED", "FAILED", "CRASHED", "CANCELLED"], "END_TIME_DESC"),
    }
    found: Facts = {"api": api}
    try:
        # A proxy that the environment names is for other machines.
        own = api.startswith(("http://127.0.0.1", "http://localhost"))
        with httpx.Client(
            timeout=TIMEOUT_S, auth=(user, password) if user else None, trust_env=not own
        ) as client:
            for key, (states, order) in wanted.items():
                asked = {
                    "flow_runs": {"state": {"type": {"any_": states}}},
                    "sort": order,
                    "limit": NUM_RUNS,
                }
                answer = client.post(f"{api}/flow_runs/filter", json=asked).raise_for_status()
                found[key] = [
                    {
                        "name": run["name"],
                        "state": run["state_name"],
                        "time": run["end_time"] or run["start_time"] or run["expected_start_time"],
                    }
                    for run in answer.json()
                ]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        return {"api": api, "error": f"Prefect does not answer at {api} ({shorten(error)})"}
    return found


def _read_disk(root: Path) -> Facts:
    sizes = {name: folder_bytes(root / name) for name in KEPT_FOLDERS}
    return {"free_bytes": shutil.disk_usage(root).free, "folder_bytes": sizes}


def describe(facts: Facts) -> list[str]:
    """Return the state as lines for a terminal of 80 columns.

    Args:
        facts: as `read_status` returns them.
    """
    describers: dict[str, Callable[[Facts], list[str]]] = {
        "models": _describe_models,
        "verdict": lambda verdict: [
            f"{verdict['status'].upper()}: {verdict['candidate']} against {verdict['baseline']} on "
            f"test set {verdict['test_set']}"
        ],
        "scans": _describe_scans,
        "inbox": _describe_inbox,
        "runs": _describe_runs,
        "disk": _describe_disk,
    }
    lines = []
    for name, part in facts.items():
        texts = [part["error"]] if set(part) <= {"error", "api"} else describers[name](part)
        for place, text in enumerate(texts):
            title = name if not place else ""
            lines += textwrap.wrap(
                text, WIDTH, initial_indent=f"{title:9}", subsequent_indent=" " * 11
            )
    return lines


def _describe_models(models: Facts) -> list[str]:
    texts = []
    for alias in ("champion", "challenger"):
        version = models[alias]
        found = "none" if version is None else f"version {version['version']}"
        if version is not None:
            found += f", {version['verdict'] or 'no verdict'}, scans {version['data_version'][:8]}"
            found += f", commit {version['git_commit'][:8] or 'unknown'}"
        texts.append(f"{alias} of {models['name']}: {found}")
    return texts


def _describe_scans(scans: Facts) -> list[str]:
    texts = [f"data version {scans['data_version'][:8]}"]
    if "cases" in scans:
        texts[0] += f": {scans['cases']} cases of {scans['patients']} patients"
    if "error" in scans:
        texts.append(scans["error"])
    if scans.get("landed") not in (None, scans["data_version"]):
        texts.append(f"newer scans have landed: data version {scans['landed'][:8]}")
    if scans["retrained"]:
        texts.append(f"newest retraining: {scans['retrained']} (`fullscale adopt` takes it over)")
    return texts


def _describe_inbox(inbox: Facts) -> list[str]:
    texts = [
        f"{len(inbox['ready'])} pairs ready, {len(inbox['waiting'])} waiting in {inbox['url']}"
    ]
    return texts + [f"{name}: {reason}" for name, reason in inbox["waiting"].items()]


def _describe_runs(runs: Facts) -> list[str]:
    return [
        f"{key}: {run['name']}, {run['state']}, {run['time'][:16].replace('T', ' ')} UTC"
        for key in ("now", "next", "last")
        for run in runs[key]
    ] or [f"none at {runs['api']}"]


def _describe_disk(disk: Facts) -> list[str]:
    sizes = ", ".join(
        f"{name} {size / GIB:.2f}" for name, size in disk["folder_bytes"].items() if size
    )
    return [f"{disk['free_bytes'] / GIB:.0f} GiB free; GiB in {sizes or 'no folder yet'}"]
