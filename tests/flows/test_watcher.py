"""The watcher starts runs only where there is work, on a real Prefect server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from cohorts import write_nnunet
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.states import Completed

from flows.servers.watcher import look_into_inbox
from fullscale.versioning.data_version import find_unannounced, mark_announced
from tasks.receive import InboxWatch, receive

pytestmark = pytest.mark.slow


@pytest.fixture
def client(prefect: None) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


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
