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
from project import Project
from watching import wait_until
from webhook import Receiver, open_receiver, save_webhook

from flows import retrain as retraining
from flows import stages
from flows.notify import ENVIRONMENT
from flows.retrain import retrain
from flows.stages import TransientError
from flows.watch_inbox import watch_inbox
from fullscale.tracking.registry import CHALLENGER
from fullscale.tracking.store import default_store
from fullscale.versioning.data_version import committed_data_version, open_newest
from fullscale.versioning.git import SCANS_BRANCH, find_commit, git
from fullscale.versioning.provenance import read_data_version
from fullscale.versioning.retraining import list_pending, mark_pending, newest_branch

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect"), pytest.mark.timeout(1500)]
MODEL = "fullscale-organs"
CHECKOUT = Path(".cache/checkouts/retrain")


class KilledError(BaseException):
    """Stands for a kill at a known moment; nothing may handle it."""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with open_receiver() as receiver:
        yield receiver


@pytest.fixture
def server(store_template: Path, tmp_path: Path) -> Iterator[Server]:
    server = Server(shutil.copytree(store_template, tmp_path / "mlflow"))
    server.start()
    yield server
    server.kill()


def use(project: Project, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let this process work in a project, with a webhook; return the project's folder."""
    for key, value in project.environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv(ENVIRONMENT, save_webhook(receiver.url))
    monkeypatch.setattr(stages, "RETRY_DELAYS_S", [0.1])
    return project.root


@pytest.fixture
def root(quick_project: Project, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a DVC remote; nothing was run in it, and its MLflow store is a file."""
    return use(quick_project, receiver, monkeypatch)


@pytest.fixture
def trained_root(
    reproduced_project: Project,
    forget_runs: Callable[[Project], None],
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A project that was run once; then a condition of the promotion gate was changed."""
    project = reproduced_project
    forget_runs(project)
    project.run("git", "commit", "--quiet", "--all", "--message", "Results")
    project.change_params("register", max_organ_dice_loss=0.99)
    project.run("git", "commit", "--quiet", "--all", "--message", "Ask for more")
    return use(project, receiver, monkeypatch)


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
    return [committed_data_version(root, name) for name in names]


def own_checkout(root: Path) -> list[str]:
    head = git(root, "rev-parse", "HEAD")
    return [head, git(root, "symbolic-ref", "HEAD"), git(root, "status", "--porcelain")]


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Retrains a project until a step begins."""

    def retrain_until(root: Path, step: str) -> None:
        def stop(*arguments: object, **more: object) -> None:
            raise KilledError

        with monkeypatch.context() as context:
            context.setattr(retraining, step, stop)
            with pytest.raises(KilledError):
                retrain(root)

    return retrain_until


def test_what_is_registered_gets_its_branch_and_message_whenever_the_run_is_killed(
    trained_root: Path, receiver: Receiver, kill_at: Callable[..., None]
) -> None:
    root, first = trained_root, read_data_version(trained_root)
    before = own_checkout(root)
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
    client = mlflow.MlflowClient(default_store(root).uri)
    version = client.get_model_version_by_alias(MODEL, CHALLENGER)
    assert version.tags["fullscale.data_version"] == first
    assert list_pending(root) == [version.tags["fullscale.git_commit"]]
    assert find_commit(root, SCANS_BRANCH) != version.tags["fullscale.git_commit"]

    # The first is published without being trained again, and told of; then comes the second.
    kill_at(root, "notify")
    assert branch_versions(root) == [first]
    assert receiver.received == []
    kill_at(root, "run_stages")
    (message,) = receiver.received
    assert message["text"].startswith("Retraining: ")
    assert f"Scans: data version {first}" in message["text"]
    assert f"Branch: {newest_branch(root)}\n" in message["text"]
    assert list_pending(root) == []
    assert read_data_version(root / CHECKOUT) == second
    runs = client.search_runs([client.get_experiment_by_name("fullscale").experiment_id])
    names = sorted(run.info.run_name.partition(",")[0] for run in runs)
    assert names == ["unet-0", "unet3plus-0"]
    assert own_checkout(root) == before


def test_results_that_cannot_be_made_again_do_not_hold_up_newer_scans(
    trained_root: Path, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    root = trained_root
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("size_px: 32", "size_px: 32\n  colour: grey"))
    git(root, "commit", "--all", "--quiet", "--message", "Break it")
    broken = git(root, "rev-parse", "HEAD")
    mark_pending(root, broken)
    (root / "params.yaml").write_text(text)
    git(root, "commit", "--all", "--quiet", "--message", "Mend it")
    assert retrain(root) in ("pass", "fail")
    assert f"the results of {broken[:8]} are not published" in caplog.text
    assert "slice.colour: unknown key" in caplog.text
    assert len(branch_versions(root)) == 1
    assert list_pending(root) == [broken]  # until it failed often enough
    assert len(receiver.received) == 1


FULL = re.compile("File too large|disk I/O error")
RUN = """
import sys
from importlib import import_module
from flows import stages
stages.RETRY_DELAYS_S = [0.1]
import_module(f"flows.{sys.argv[1]}").main()
"""


def run_on_full_disk(root: Path, name: str) -> str:
    """Return the output of a flow that fails because no file may grow beyond a limit.

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


def test_retraining_that_fails_for_disk_or_server_is_completed_by_a_later_one(
    trained_root: Path, server: Server, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, version = trained_root, read_data_version(trained_root)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    before = own_checkout(root)
    assert FULL.search(run_on_full_disk(root, "retrain"))
    assert newest_branch(root) is None
    (message,) = receiver.received
    assert message["text"].startswith("Retraining failed")
    assert FULL.search(message["text"])
    assert list_pending(root) == []

    def go_away() -> None:
        """End the server when the registration begins."""
        assert wait_until(lambda: list_pending(root), 600)
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
    assert sorted(run.info.run_name.partition(",")[0] for run in runs) == ["unet-0", "unet3plus-0"]
    assert own_checkout(root) == before


def test_disk_that_is_full_fails_the_landing_and_the_next_run_completes(root: Path) -> None:
    inbox = drop(root, "first")
    files = sorted(inbox.glob("*/*.nii.gz"))
    assert FULL.search(run_on_full_disk(root, "watch_inbox"))
    assert find_commit(root, SCANS_BRANCH) is None
    assert sorted(inbox.glob("*/*.nii.gz")) == files
    assert watch_inbox(root, str(inbox), 0).names("accepted") == ["first_00"]
