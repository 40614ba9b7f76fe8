"""A new data version is retrained on for real: small networks, a real git, DVC, MLflow, Prefect."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import mlflow
import pytest
from cohorts import write_nnunet
from prefect import flow
from prefect.artifacts import Artifact
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, temporary_settings
from project import Project
from watching import wait_until
from webhook import Receiver, open_receiver, save_webhook

from flows import retrain as retraining
from flows import stages
from flows.artifacts import show_status
from flows.devices import LIMIT
from flows.notify import ENVIRONMENT
from flows.retrain import NOTHING, name_run, retrain
from flows.stages import StageFailedError, push
from fullscale.ingestion.cohort_writer import IngestOptions
from fullscale.ingestion.ingest import ingest
from fullscale.tracking.store import default_store
from fullscale.versioning.data_version import commit_data, open_newest
from fullscale.versioning.git import commit_paths, git, run_program
from fullscale.versioning.retraining import newest_branch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # several trainings each


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with open_receiver() as receiver:
        yield receiver


@pytest.fixture
def project(
    reproduced_project: Project, forget_runs: Callable[[Project], None], tmp_path: Path
) -> Project:
    """A project whose results are committed, with a DVC remote outside git and no runs."""
    forget_runs(reproduced_project)
    reproduced_project.run("git", "commit", "--quiet", "--all", "--message", "Results")
    (tmp_path / "mount").mkdir()
    add = ("dvc", "remote", "add", "--local", "--default", "--force", "team")
    reproduced_project.run(*add, remote(tmp_path))
    return reproduced_project


def remote(folder: Path) -> str:
    return str(folder / "mount" / "remote")


def land(root: Path, name: str, source: Path) -> str:
    """Make a data version with two cases more on the branch `scans`; returns its MD5."""
    write_nnunet(source, 2, prefix=name, seed=100 * len(name))
    with open_newest(root, "inbox") as folder:
        run_program(["dvc", "pull", "--quiet", "--force", "data.dvc"], folder)
        report = ingest(source, folder / "data", IngestOptions(training_only=True))
        assert not report.refused, report
        return commit_data(folder, [name], 0)


def state(root: Path) -> list[object]:
    """Return what a person sees of the project's own checkout."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    own = [path for path in files if path.relative_to(root).parts[0] in ("data", "reports")]
    return [
        git(root, "rev-parse", "HEAD"),
        git(root, "symbolic-ref", "HEAD"),
        git(root, "status", "--porcelain"),
        *((path, path.stat().st_mtime_ns, path.stat().st_size) for path in own),
    ]


def artifact(key: str) -> str:
    found = Artifact.get(key)
    assert found is not None, key
    return str(found.data)


def count_events(name: str) -> int:
    with get_client(sync_client=True) as client:
        answer = client._client.post("/events/filter", json={"filter": {"event": {"name": [name]}}})
        return int(answer.json()["total"])


def retrain_until_killed(project: Project, reason: str, log_path: Path) -> None:
    """Retrain as a person does, without a server, until the last training writes checkpoints."""
    checkout = project.root / ".cache/checkouts/retrain"
    kept = checkout / ".cache/train/unet3plus/0/checkpoints"
    with log_path.open("w") as log:
        flow = subprocess.Popen(
            ["python", "-m", "flows.retrain", *reason.split()],
            cwd=project.root,
            env=project.environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        assert wait_until(lambda: list(kept.glob("*.ckpt")), 300), log_path.read_text()
    finally:
        os.killpg(flow.pid, signal.SIGKILL)
        flow.wait()


def test_new_scans_are_trained_on_and_the_result_is_a_branch(
    prefect: None,
    project: Project,
    receiver: Receiver,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    root = project.root
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for key, value in project.environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(stages, "RETRY_DELAYS_S", [0.1])
    monkeypatch.setenv(ENVIRONMENT, save_webhook(receiver.url))
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(LIMIT, 2)
    num_events = count_events("scans.landed")
    assert retrain(root) == NOTHING
    assert newest_branch(root) is None
    assert "Nothing to do" in artifact("retraining")

    project.change_params("train", num_epochs=2)
    project.change_params("compute", checkpoint_interval_s=0)
    project.run("git", "commit", "--quiet", "--all", "--message", "Train longer")
    first = land(root, "first", tmp_path / "first")
    before, changed_before = state(root), project.run("dvc", "status", "data.dvc", "dvc.yaml")
    checkout = root / ".cache/checkouts/retrain"
    retrain_until_killed(project, "2 scans landed", tmp_path / "log")
    assert newest_branch(root) is None
    assert state(root) == before

    # The next run takes it up. Without its remote it fails after the training, and publishes
    # nothing.
    (tmp_path / "mount").rmdir()
    (tmp_path / "mount").write_text("not mounted")
    with pytest.raises(StageFailedError, match=r"dvc push data\.dvc dvc\.yaml ended with code"):
        retrain(root, "2 scans landed")
    assert "unet-0 epoch" not in caplog.text  # it was trained before the kill
    assert caplog.text.count("unet3plus-0 epoch 2/2:") == 1
    assert "is not continued" not in caplog.text
    assert newest_branch(root) is None
    assert receiver.received[-1]["text"].startswith("Retraining failed\nReason to retrain: 2 scan")
    assert state(root) == before
    (tmp_path / "mount").unlink()
    (tmp_path / "mount").mkdir()

    def push_after_landing(folder: Path) -> None:
        land(root, "second", tmp_path / "second")
        push(folder)

    with monkeypatch.context() as context:
        context.setattr(retraining, "push", push_after_landing)
        status = retrain(root, "2 scans landed")

    branch = newest_branch(root)
    assert branch is not None
    assert branch.endswith(first[:8])
    changed = set(git(root, "diff", "--name-only", "HEAD", branch).splitlines())
    assert {"data.dvc", "dvc.lock", "reports/gate.json"} <= changed
    assert all(name in ("data.dvc", "dvc.lock") or name.startswith("reports/") for name in changed)
    verdict = json.loads(git(root, "show", f"{branch}:reports/gate.json"))
    assert verdict["status"] == status
    assert verdict["data_version"] == first
    published = json.loads(git(root, "show", "HEAD:reports/gate.json"))
    assert verdict["test_set"] == published["test_set"]
    message = git(root, "log", "-1", "--format=%B", branch)
    assert message.startswith(f"Retrain on scans {first[:8]}: {status}")
    assert "Reason: 2 scans landed" in message
    assert f"Test set {verdict['test_set']}: unchanged" in message

    assert state(root) == before
    assert project.run("dvc", "status", "data.dvc", "dvc.yaml") == changed_before
    runs = mlflow.MlflowClient(default_store(root).uri).search_runs(["1"])
    assert sorted(run.info.run_name.partition(",")[0] for run in runs) == ["unet-0", "unet3plus-0"]
    assert not (checkout / "mlruns").exists()
    told = receiver.received[-1]["text"]
    assert told.startswith(f"Retraining: {status}\n")
    assert f"Branch: {branch}" in told

    folds = {row["fold"]: row["patients"] for row in json.loads(artifact("folds"))}
    assert "first_00" not in folds["test"]
    assert "first_00" in folds["train"] + folds["val"] + folds.get("unused", "")
    assert f"Branch: {branch}" in artifact("retraining")
    assert float(artifact("training-unet3plus-0")) == 100
    assert artifact("overlay-worst").startswith("data:image/png;base64,iVBOR")

    # A clone elsewhere fetches what was published and has nothing to compute.
    clone = Project(tmp_path / "clone")
    git(root, "clone", "--quiet", "--branch", branch, str(root), str(clone.root))
    clone.run("dvc", "remote", "add", "--local", "--default", "team", remote(tmp_path))
    clone.run("dvc", "pull", "--quiet", "data.dvc", "dvc.yaml")
    told = clone.run("dvc", "repro")
    assert "Running stage" not in told
    assert git(clone.root, "status", "--porcelain") == ""

    # The scans that landed meanwhile are announced, once: the deployment trains on them next.
    assert wait_until(lambda: count_events("scans.landed") == num_events + 1, 20)
    assert state(root) == before


def test_run_is_named_by_date_reason_branch_and_verdict(
    prefect: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert retrain.flow_run_name is name_run

    @flow(flow_run_name=name_run)
    def judge(reason: str) -> str:
        show_status("pass")
        return str(flow_run.id)

    monkeypatch.setenv("FULLSCALE_CODE_BRANCH", "main")
    run_id = judge("+5 scans, data version 0a1b2c3d")
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(UUID(run_id))
    assert re.fullmatch(r"retrain \d{4}-\d\d-\d\d \+5 scans, code of main: PASS", run.name)
    assert run.tags == ["pass"]


# A stage that takes until scans have landed; it is no program of this project.
STAGE = """
from pathlib import Path
from time import sleep
Path("FOLDER/begun").touch()
while not Path("FOLDER/landed").exists():
    sleep(0.05)
Path("reports").mkdir(exist_ok=True)
Path("reports/gate.json").write_text(str(len(list(Path("data").rglob("*.nii.gz")))))
"""
PIPELINE = """
stages:
  register:
    cmd: python stage.py
    deps: [data, stage.py]
    outs: [reports/gate.json: {cache: false}]
"""


def test_scans_that_land_meanwhile_are_trained_on_by_the_same_run_without_a_server(
    prefect: None,
    scans_repo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (scans_repo / "dvc.yaml").write_text(PIPELINE)
    (scans_repo / "dvc.lock").write_text("{schema: '2.0', stages: {}}")
    (scans_repo / "stage.py").write_text(STAGE.replace("FOLDER", str(tmp_path)))
    (scans_repo / ".dvcignore").write_text("__pycache__\n")
    with (scans_repo / ".gitignore").open("a") as ignored:
        ignored.write("/mlruns\n")
    in_git = scans_repo / "remote-in-git"
    run_program(["dvc", "remote", "add", "-d", "sample", str(in_git)], scans_repo)
    commit_paths(scans_repo, ["."], "A pipeline")
    git(tmp_path, "init", "--quiet", "--bare", "team.git")
    git(scans_repo, "remote", "add", "team", str(tmp_path / "team.git"))
    monkeypatch.setenv("FULLSCALE_GIT_REMOTE", "team")
    landed: list[str] = []

    def land_meanwhile() -> None:
        try:
            assert wait_until((tmp_path / "begun").exists, 300)
            landed.append(land(scans_repo, "late", tmp_path / "late"))
        finally:
            (tmp_path / "landed").touch()  # or the stage would wait for ever

    landing = threading.Thread(target=land_meanwhile)
    landing.start()
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        retrain(scans_repo)
    landing.join()
    branches = git(scans_repo, "branch", "--list", "--format=%(refname:short)", "retrain/*")
    files = [git(scans_repo, "show", f"{name}:reports/gate.json") for name in branches.split()]
    assert branches == git(tmp_path / "team.git", "branch", "--format=%(refname:short)")
    assert sorted(files) == ["10", "6"]  # files of three scans, and of two more
    newest = newest_branch(scans_repo)
    assert newest is not None
    assert newest.endswith(landed[0][:8])
    assert f"scans landed meanwhile: data version {landed[0]}" in caplog.text
    message = git(scans_repo, "log", "-1", "--format=%B", newest)
    assert "Reason: scans landed during a retraining" in message
    # Patients' scans are never committed.
    assert "Not pushed: the DVC remote is a folder inside the git repository" in message
    assert "remote-in-git" not in git(scans_repo, "ls-tree", "-r", "--name-only", newest)
