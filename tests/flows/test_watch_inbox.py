"""The flow that watches the inbox, on a real Prefect server and a real repository."""

from __future__ import annotations

import json
import logging
import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cohorts import write_nnunet
from prefect.artifacts import Artifact
from prefect.client.orchestration import get_client
from prefect.events import Event
from prefect.events.filters import EventFilter, EventNameFilter
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Scheduled
from watching import wait_until

from flows.events import emit
from flows.watch_inbox import (
    announce,
    as_cell,
    may_succeed_later,
    printable,
    version_lines,
    watch_inbox,
)
from fullscale.runtime.errors import ScanError, StageError
from fullscale.versioning.data_version import Announcement, find_unannounced
from fullscale.versioning.git import git
from tasks.receive import CaseOutcome, InboxResult, receive

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(scans_repo):
    return scans_repo


def fill(inbox: Path, num_cases: int, prefix: str = "new", seed: int = 50) -> Path:
    write_nnunet(inbox, num_cases, prefix=prefix, seed=seed)
    (inbox / "dataset.json").unlink()
    return inbox


def events(data_version: str) -> list[Event]:
    """Every event that scans landed, as the server keeps them."""
    wanted = EventFilter(event=EventNameFilter(name=["scans.landed"]))
    with get_client(sync_client=True) as client:
        found = client.read_events(wanted, limit=50).events
    return [each for each in found if each.payload["data_version"] == data_version]


def artifact(key: str) -> str:
    found = Artifact.get(key)
    assert found is not None, key
    return str(found.data)


@pytest.mark.slow
def test_flow_takes_scans_in_shows_them_and_tells(prefect, project, monkeypatch):
    inbox = fill(project / "drop", 2)
    (inbox / "imagesTr/bad_0000.nii.gz").write_bytes(b"no scan")
    (inbox / "labelsTr/bad.nii.gz").write_bytes(b"no label")
    (inbox / "labelsTr/lonely.nii.gz").write_bytes(b"label")
    monkeypatch.setenv("FULLSCALE_INBOX", str(inbox))
    outcome = watch_inbox(project, settle_s=0)
    version = outcome.data_version
    assert version in git(project, "show", "scans:data.dvc")

    assert wait_until(lambda: events(version), 30)
    (event,) = events(version)
    resource = {"prefect.resource.id": "fullscale.inbox", "fullscale.retraining": "wanted"}
    assert event.resource.root == resource
    assert event.payload == {
        "data_version": version,
        "num_accepted": 2,
        "num_quarantined": 1,
        "cases": ["new_00", "new_01"],
    }
    table = json.loads(artifact("inbox"))
    assert {row["case"]: row["status"] for row in table} == {
        "new_00": "accepted",
        "new_01": "accepted",
        "bad": "quarantined",
        "lonely": "waiting",
    }
    assert "unreadable" in next(row["reason"] for row in table if row["case"] == "bad")
    markdown = artifact("data-version")
    assert version in markdown
    assert r"| new_01 | new\_01 | new patient |" in markdown
    with get_client(sync_client=True) as client:
        names = {run.name.rpartition("-")[0] for run in client.read_task_runs()}
    assert {"list inbox", "ingest", "commit data version", "move files"} <= names

    watch_inbox(project, settle_s=0)
    time.sleep(6)  # the server writes events down within 5 s
    assert len(events(version)) == 1


@pytest.mark.slow
def test_version_that_a_killed_run_left_is_announced_by_the_next(prefect, project):
    inbox = fill(project / "drop", 1)
    version = receive(project, str(inbox), 0).data_version
    assert find_unannounced(project).data_version == version
    watch_inbox(project, inbox=str(inbox), settle_s=0)
    assert find_unannounced(project) is None
    assert wait_until(lambda: events(version), 30)


@pytest.mark.slow
def test_default_inbox_is_made_and_a_failure_names_its_cause(prefect, project, monkeypatch):
    monkeypatch.delenv("FULLSCALE_INBOX", raising=False)
    assert watch_inbox(project, settle_s=0).cases == []
    assert (project / "inbox/imagesTr").is_dir()
    assert git(project, "status", "--porcelain") == ""
    fill(project / "inbox", 1)
    shutil.move(project / ".dvc/cache", project / "kept")
    started = time.monotonic()
    with pytest.raises(StageError, match=r"dvc .*pull.* ended with code"):
        watch_inbox(project, settle_s=0)
    assert time.monotonic() - started < 60  # it was not tried again


@pytest.fixture
def plan_retraining(prefect):
    """Plans a run of a deployment `retrain`, some time from now, that no worker takes."""
    runs = []
    with get_client(sync_client=True) as client:
        flow_id = client.create_flow_from_name("retrain")
        deployment_id = client.create_deployment(flow_id, "retrain")

        def plan(delay: timedelta) -> None:
            state = Scheduled(scheduled_time=datetime.now(UTC) + delay)
            run = client.create_flow_run_from_deployment(deployment_id, state=state)
            runs.append(run.id)

        yield plan
        for run_id in runs:
            client.delete_flow_run(run_id)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("delay", "expected"),
    [
        (timedelta(seconds=-100), "waiting"),
        (timedelta(seconds=5), "waiting"),
        (timedelta(hours=1), "wanted"),
    ],
)
def test_retraining_that_waits_is_enough(plan_retraining, delay, expected):
    plan_retraining(delay)
    emit(Announcement(f"{delay}", "", ("case",), 0))
    assert wait_until(lambda: labels(f"{delay}"), 30)
    assert labels(f"{delay}") == [expected]


def labels(data_version: str) -> list[str]:
    """Return what the events of a data version say of the retraining."""
    return [event.resource["fullscale.retraining"] for event in events(data_version)]


@pytest.mark.slow
def test_without_a_server_the_log_says_that_nobody_hears(project, caplog, monkeypatch):
    receive(project, str(fill(project / "drop", 1)), 0)
    # A run's logger needs a run, which would start a server of its own.
    monkeypatch.setattr("flows.watch_inbox.get_run_logger", logging.getLogger)
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        announce(project)
    assert "is not announced: PREFECT_API_URL names no server" in caplog.text
    assert find_unannounced(project).cases == ("new_00",)


def test_markdown_shows_names_as_they_are():
    outcome = InboxResult(
        [CaseOutcome("a", "accepted"), CaseOutcome("b", "waiting", "why")],
        "0123.dir",
        {"a": "x|<b>\n"},
        (),
    )
    lines = version_lines(outcome)
    assert lines[0] == "## Data version 0123.dir"
    assert "1 accepted for training, 0 quarantined, 1 waiting." in lines
    assert lines[-1] == r"| a | 'x\|\<b\>\\n' | known patient |"
    assert as_cell("Ä_1") == r"Ä\_1"
    assert printable("a\x1b[31m") == r"'a\x1b[31m'"


class Failed:
    """A state as Prefect hands it to a retry condition."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def result(self, raise_on_failure: bool) -> Exception:
        assert not raise_on_failure
        return self.error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (StageError("disk full"), False),
        (ScanError("modality", "MR", "CT", "no cure"), False),
        (ConnectionError("away"), True),
    ],
)
def test_only_what_may_pass_is_tried_again(error, expected):
    assert may_succeed_later(None, None, Failed(error)) is expected
