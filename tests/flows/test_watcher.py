"""The watcher starts runs only where there is work, on a real Prefect server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from cohorts import write_nnunet
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import State
from prefect.events import Event, Resource
from prefect.states import Completed, Crashed, Pending, Running
from watching import wait_until
from webhook import open_receiver, save_webhook

from flows.notify import ENVIRONMENT
from flows.servers.watcher import (
    LOST_AFTER_S,
    STALLED_AFTER_S,
    TAKEN_UP,
    LostRuns,
    look_into_inbox,
    take_up_crashed,
)
from fullscale.ingestion.ingest import ingest
from fullscale.versioning.data_version import (
    commit_data,
    find_unannounced,
    mark_announced,
    open_newest,
    restore_data,
)
from fullscale.versioning.worktree import INBOX
from tasks.receive import InboxWatch, receive

pytestmark = pytest.mark.slow


@pytest.fixture
def client(prefect: None) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


def has_event(client: SyncPrefectClient, run_id: UUID, name: str) -> bool:
    wanted = {
        "resource": {"id": [f"prefect.flow-run.{run_id}"]},
        "event": {"name": [f"prefect.flow-run.{name}"]},
    }
    found = client.request("POST", "/events/filter", json={"filter": wanted}).json()
    return bool(found["events"])


def deploy(client: SyncPrefectClient, name: str, **options: object) -> UUID:
    return client.create_deployment(client.create_flow_from_name(name), name, **options)


def test_run_starts_where_the_inbox_has_something_new(
    client: SyncPrefectClient, scans_repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FULLSCALE_INBOX", raising=False)
    deployment = deploy(client, "watch-inbox", parameters={"settle_s": 0})
    watch = InboxWatch(scans_repo)
    inbox = scans_repo / "inbox"

    def look() -> bool:
        run_id = look_into_inbox(client, watch)
        if run_id is not None:
            assert look_into_inbox(client, watch) is None  # one is under way
            client.set_flow_run_state(run_id, Completed(), force=True)
        return run_id is not None

    assert not look()
    assert (inbox / "imagesTr").is_dir()
    write_nnunet(scans_repo / "made", 1, prefix="new", seed=50)
    for name in ("imagesTr/new_00_0000.nii.gz", "labelsTr/new_00.nii.gz"):
        shutil.copy(scans_repo / "made" / name, inbox / name)
        assert look()  # people see the half that waits; then both are there
    assert look()  # as long as it is there
    client.pause_deployment(deployment)
    assert not look()
    client.resume_deployment(deployment)
    receive(scans_repo, str(inbox), 0)
    assert look()  # its data version is not announced yet
    mark_announced(scans_repo, find_unannounced(scans_repo))
    assert not look()
    (inbox / "labelsTr/lonely.nii.gz").write_bytes(b"label")
    assert look()
    assert not look()  # it waits, and people know
    monkeypatch.setenv("FULLSCALE_INBOX", str(scans_repo / "gone"))
    assert look()  # the run fails and says why


def test_run_of_which_nothing_is_heard_is_marked_as_crashed(client: SyncPrefectClient) -> None:
    deployment = deploy(client, "promote-check")
    strange = deploy(client, "of-a-person")

    def start(state: State, deployment: UUID = deployment) -> UUID:
        run_id = client.create_flow_run_from_deployment(deployment).id
        client.set_flow_run_state(run_id, state, force=True)
        return run_id

    running, alive, taken = start(Running()), start(Running()), start(Pending())
    scheduled = client.create_flow_run_from_deployment(deployment).id
    others = [start(Running(), strange), start(Completed()), scheduled]
    by_hand = client.create_flow_run(Flow(fn=lambda: None, name="promote-check")).id
    client.set_flow_run_state(by_hand, Running(), force=True)
    for run_id, name in ((running, "Running"), (alive, "Running"), (taken, "Pending")):
        assert wait_until(lambda run_id=run_id, name=name: has_event(client, run_id, name), 30)
    lost_runs = LostRuns()

    def mark(now_s: float) -> list[str]:
        lost_runs.mark(client, now_s)
        return [
            str(client.read_flow_run(each).state.type.value) for each in (running, alive, taken)
        ]

    assert mark(0) == ["RUNNING", "RUNNING", "PENDING"]
    assert mark(LOST_AFTER_S - 1) == ["RUNNING", "RUNNING", "PENDING"]
    heartbeat = Event(
        event="prefect.flow-run.heartbeat",
        resource=Resource({"prefect.resource.id": f"prefect.flow-run.{alive}"}),
    )
    client.request("POST", "/events", json=[heartbeat.model_dump(mode="json")]).raise_for_status()
    assert wait_until(lambda: has_event(client, alive, "heartbeat"), 30)
    assert mark(LOST_AFTER_S) == ["CRASHED", "RUNNING", "PENDING"]
    assert "No sign of life for 90 s" in client.read_flow_run(running).state.message
    assert mark(2 * LOST_AFTER_S - 1) == ["CRASHED", "RUNNING", "PENDING"]
    client.set_flow_run_state(alive, Completed(), force=True)
    assert mark(STALLED_AFTER_S) == ["CRASHED", "COMPLETED", "CRASHED"]
    states = [client.read_flow_run(each).state for each in (*others, by_hand)]
    assert not any(state.is_crashed() for state in states)


def test_retraining_that_crashed_is_taken_up_once_for_its_scans(
    client: SyncPrefectClient, scans_repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deploy(client, "retrain", parameters={"reason": "by hand"})

    def take_up() -> UUID | None:
        return take_up_crashed(client, scans_repo)

    def crash(run_id: UUID) -> None:
        for state in (Pending(), Running(), Crashed(message="killed")):
            client.set_flow_run_state(run_id, state, force=True)

    assert take_up() is None
    run_id = client.create_flow_run_from_deployment(deployment).id
    assert take_up() is None  # it waits
    crash(run_id)
    waiting = client.create_flow_run_from_deployment(deployment).id
    assert take_up() is None  # the one that waits does its work
    client.delete_flow_run(waiting)
    client.pause_deployment(deployment)
    assert take_up() is None
    client.resume_deployment(deployment)
    again = take_up()
    assert again not in (None, run_id)
    run = client.read_flow_run(again)
    assert run.state.is_scheduled()
    assert run.tags == [TAKEN_UP]
    assert run.parameters["reason"].startswith("taken up after a crash of ")
    assert take_up() is None
    crash(again)
    with open_receiver() as receiver:
        monkeypatch.setenv(ENVIRONMENT, save_webhook(receiver.url))
        for _ in range(2):
            assert take_up() is None
        (told,) = receiver.received
    assert told["text"].startswith("Retraining crashed again\n")
    assert f"{run.name} crashed: killed" in told["text"]
    write_nnunet(scans_repo / "made", 1, prefix="more", seed=51)
    with open_newest(scans_repo, INBOX) as folder:
        restore_data(folder)
        ingest(scans_repo / "made", folder / "data")
        commit_data(folder, ["more_00"], 0)
    newest = take_up()  # on other scans
    assert newest is not None
    client.set_flow_run_state(newest, Completed(), force=True)
    assert take_up() is None
