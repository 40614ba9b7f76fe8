"""Faults between landing and message: each is a clear failure, and the next run completes."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from cohorts import write_nnunet
from mlflow_server import Server
from prefect.settings import get_current_settings
from prefect.testing.utilities import prefect_test_harness
from project import Project
from quick_project import make_quick_project
from watching import wait_until
from webhook import Receiver, open_receiver, save_webhook

from flows import retrain as retraining
from flows import stages
from flows.notify import ENVIRONMENT
from flows.retrain import NOTHING, retrain
from flows.stages import TransientError
from flows.watch_inbox import watch_inbox
from fullscale.tracking.registry import CHALLENGER
from fullscale.versioning.data_version import open_newest
from fullscale.versioning.git import SCANS_BRANCH, find_commit, git
from fullscale.versioning.provenance import parse_data_version
from fullscale.versioning.retraining import (
    BEGUN,
    MAX_FAILURES,
    list_begun,
    newest_branch,
    note_begun,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
MODEL = "fullscale-organs"
CHECKOUT = Path(".cache/checkouts/retrain")


class KilledError(BaseException):
    """Stands for a kill at a known moment; nothing may handle it."""


@pytest.fixture(scope="module", autouse=True)
def prefect() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=180):
        yield


@pytest.fixture(scope="module")
def quick_project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Nothing was run in it yet."""
    return make_quick_project(tmp_path_factory.mktemp("quick"))


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with open_receiver() as receiver:
        yield receiver


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def root(
    quick_project: Project,
    server: Server,
    receiver: Receiver,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A copy of the project for one test, with an MLflow server, a webhook and a DVC remote."""
    root = Path(shutil.copytree(quick_project.root, tmp_path / "project"))
    for key, value in quick_project.environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv(ENVIRONMENT, save_webhook(receiver.url))
    monkeypatch.setattr(stages, "RETRY_DELAYS_S", [0.1])
    return root


def drop(root: Path, name: str) -> Path:
    """Put a pair into a project's inbox, as a person did two minutes ago; returns the inbox."""
    write_nnunet(root / "inbox", 1, prefix=name, seed=100 * len(name))
    (root / "inbox/dataset.json").unlink()
    for path in (root / "inbox").glob(f"*/{name}_*"):
        os.utime(path, (time.time() - 120, time.time() - 120))
    return root / "inbox"


def land(root: Path, name: str) -> str:
    """Let the flow take in a pair; returns the data version."""
    version = watch_inbox(root, str(drop(root, name)), 0).data_version
    assert version is not None
    return version


def branch_versions(root: Path) -> list[str]:
    names = git(root, "for-each-ref", "--format=%(refname)", "refs/heads/retrain").split()
    return [parse_data_version(git(root, "show", f"{name}:data.dvc"), name) for name in names]


def own_checkout(root: Path) -> list[str]:
    head = git(root, "rev-parse", "HEAD")
    return [head, git(root, "symbolic-ref", "HEAD"), git(root, "status", "--porcelain")]


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Retrains a project until a step begins, of whose turns the first few may pass."""

    def retrain_until(root: Path, step: str, num_passing: int = 0) -> None:
        work, turns = getattr(retraining, step), []

        def stop(*arguments: object) -> object:
            turns.append(step)
            if len(turns) > num_passing:
                raise KilledError
            return work(*arguments)

        with monkeypatch.context() as context:
            context.setattr(retraining, step, stop)
            with pytest.raises(KilledError):
                retrain(root)

    return retrain_until


def test_what_is_registered_gets_its_branch_and_message_whenever_the_run_is_killed(
    root: Path, server: Server, receiver: Receiver, kill_at: Callable[..., None]
) -> None:
    before = own_checkout(root)
    first = land(root, "first")
    landed: list[str] = []

    def land_meanwhile() -> None:
        assert wait_until((root / CHECKOUT / "artifacts/split.csv").exists, 300)
        landed.append(land(root, "second"))

    landing = threading.Thread(target=land_meanwhile)
    landing.start()
    kill_at(root, "push")
    landing.join()
    (second,) = landed
    assert newest_branch(root) is None
    client = mlflow.MlflowClient(server.uri)
    version = client.get_model_version_by_alias(MODEL, CHALLENGER)
    assert version.tags["fullscale.data_version"] == first
    assert list_begun(root) == [version.tags["fullscale.git_commit"]]
    assert find_commit(root, SCANS_BRANCH) != version.tags["fullscale.git_commit"]

    # The first is published without being trained again; then the second is trained on.
    kill_at(root, "notify")
    assert branch_versions(root) == [first]
    assert receiver.received == []
    kill_at(root, "tell", num_passing=1)
    (message,) = receiver.received
    assert f"Scans: data version {first}" in message["text"]
    assert sorted(branch_versions(root)) == sorted([first, second])

    assert retrain(root) == NOTHING
    assert len(receiver.received) == 2
    told = receiver.received[-1]["text"]
    assert told.startswith("Retraining: ")
    assert f"Scans: data version {second}" in told
    assert f"Branch: {newest_branch(root)}\n" in told
    assert retrain(root) == NOTHING
    assert len(receiver.received) == 2
    assert list_begun(root) == []
    runs = client.search_runs([client.get_experiment_by_name("fullscale").experiment_id])
    assert sorted(run.info.run_name for run in runs) == sorted(["unet", "unet3plus"] * 2)
    assert own_checkout(root) == before


def test_results_that_cannot_be_made_again_do_not_hold_up_newer_scans(
    root: Path, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("size_px: 48", "size_px: 48\n  colour: grey"))
    git(root, "commit", "--all", "--quiet", "--message", "Break it")
    broken = git(root, "rev-parse", "HEAD")
    note_begun(root, broken)
    (root / "params.yaml").write_text(text)
    git(root, "commit", "--all", "--quiet", "--message", "Mend it")
    assert retrain(root) in ("pass", "fail")
    assert f"the results of {broken[:8]} are not published" in caplog.text
    assert "slice.colour: unknown key" in caplog.text
    assert len(branch_versions(root)) == 1
    for _ in range(MAX_FAILURES - 1):
        assert list_begun(root) == [broken]
        assert retrain(root) == NOTHING
    assert list_begun(root) == []
    assert len(receiver.received) == 1


def test_mlflow_that_is_away_at_the_registration_fails_the_run_and_the_next_completes(
    root: Path, server: Server, receiver: Receiver
) -> None:
    version = land(root, "first")

    def go_away() -> None:
        assert wait_until((root / BEGUN).exists, 600)
        server.kill()

    going = threading.Thread(target=go_away)
    going.start()
    with pytest.raises(TransientError, match=f"the MLflow store {server.uri} does not answer"):
        retrain(root)
    going.join()
    assert newest_branch(root) is None
    assert receiver.received[-1]["text"].startswith("Retraining failed")

    server.start()
    client = mlflow.MlflowClient(server.uri)
    assert client.search_model_versions(f"name = '{MODEL}'") == []
    retrain(root)
    assert branch_versions(root) == [version]
    assert len(client.search_model_versions(f"name = '{MODEL}'")) == 1
    runs = client.search_runs([client.get_experiment_by_name("fullscale").experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["unet", "unet3plus"]


FULL = re.compile("File too large|disk I/O error")
RUN = """
import sys
from importlib import import_module
from flows import stages
stages.RETRY_DELAYS_S = [0.1]
import_module(f"flows.{sys.argv[1]}").main()
"""


def run_on_full_disk(root: Path, name: str) -> str:
    """What a flow prints that must not let a file grow beyond a limit, and therefore fails.

    The limit is 100 KB. The checkout that it works in is there already: git's files are larger.
    """
    with open_newest(root, "inbox" if name == "watch_inbox" else name):
        pass
    server = get_current_settings().to_environment_variables(exclude_unset=True)
    limit = 100 * 1024
    done = subprocess.run(
        ["python", "-c", RUN, name],
        cwd=root,
        env={**os.environ, **server},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode != 0, done.stdout
    return done.stdout


def test_disk_that_is_full_fails_the_retraining_and_the_next_completes(
    root: Path, receiver: Receiver
) -> None:
    before = own_checkout(root)
    version = land(root, "first")
    assert FULL.search(run_on_full_disk(root, "retrain"))
    assert newest_branch(root) is None
    (message,) = receiver.received
    assert message["text"].startswith("Retraining failed")
    assert FULL.search(message["text"])
    retrain(root)
    assert branch_versions(root) == [version]
    assert own_checkout(root) == before


def test_disk_that_is_full_fails_the_landing_and_the_next_run_completes(root: Path) -> None:
    inbox = drop(root, "first")
    files = sorted(inbox.glob("*/*.nii.gz"))
    assert FULL.search(run_on_full_disk(root, "watch_inbox"))
    assert find_commit(root, SCANS_BRANCH) is None
    assert sorted(inbox.glob("*/*.nii.gz")) == files
    assert watch_inbox(root, str(inbox), 0).names("accepted") == ["first_00"]
