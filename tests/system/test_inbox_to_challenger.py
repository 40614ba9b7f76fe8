"""Scans are put into the inbox, nothing else is touched, and a model stands in the registry."""

from __future__ import annotations

import os
import time
from pathlib import Path

import mlflow
import pytest
from cohorts import write_nnunet
from project import Project
from quick_project import REMOTE
from running_services import RunningServices, free_port
from watching import wait_until

from fullscale.tracking.registry import CHALLENGER
from fullscale.versioning.git import SCANS_BRANCH, find_commit, git
from fullscale.versioning.provenance import parse_data_version
from fullscale.versioning.retraining import newest_branch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
MODEL = "fullscale-organs"


@pytest.fixture
def project(quick_project):
    """Nothing was run in it; the inbox is looked at every few seconds."""
    (quick_project.root / "inbox").mkdir()
    quick_project.environment |= {
        "FULLSCALE_MLFLOW_PORT": str(free_port()),
        "FULLSCALE_PREFECT_PORT": str(free_port()),
        "FULLSCALE_WATCH_CRON": "* * * * * */30",
        "PYTHONPATH": str(quick_project.root),
    }
    return quick_project


def put(source: Path, inbox: Path) -> None:
    """Copy pairs in, as a person would have done two minutes ago."""
    for path in sorted(source.glob("*/*.nii.gz")):
        target = inbox / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
        os.utime(target, (time.time() - 120, time.time() - 120))


def test_landed_scans_become_a_challenger(project, tmp_path):
    root, inbox = project.root, project.root / "inbox"
    head, status = git(root, "rev-parse", "HEAD"), git(root, "status", "--porcelain")
    services = RunningServices(project)
    services.log_path = tmp_path / "services.log"
    services.start()
    try:
        good, bad = (write_nnunet(tmp_path / name, n, prefix=name, seed=50 * n)
                     for name, n in (("good", 3), ("bad", 2)))  # fmt: skip
        image = bad / "imagesTr/bad_00_0000.nii.gz"
        image.write_bytes(image.read_bytes()[:2000])
        (bad / "labelsTr/bad_01.nii.gz").write_bytes(b"no scan at all")
        put(bad, inbox)
        put(good, inbox)

        client = mlflow.MlflowClient(services.mlflow_url)

        def challenger():
            try:
                return client.get_model_version_by_alias(MODEL, CHALLENGER)
            except mlflow.exceptions.MlflowException:
                return None

        assert wait_until(lambda: challenger() is not None, 900), services.log()[-6000:]
        assert wait_until(lambda: newest_branch(root) is not None, 120), services.log()[-6000:]
        branch = newest_branch(root)
        assert branch is not None
        version = challenger()
        data_version = parse_data_version(git(root, "show", f"{branch}:data.dvc"), branch)
        assert version.tags["fullscale.data_version"] == data_version
        assert find_commit(root, SCANS_BRANCH) == find_commit(root, f"{branch}^")
        assert branch.endswith(data_version[:8])
    finally:
        left = services.stop()
    assert left == []

    assert sorted(path.name for path in (inbox / "quarantine").iterdir()) == ["bad_00", "bad_01"]
    for case in ("bad_00", "bad_01"):
        assert (inbox / "quarantine" / case / "reason.txt").read_text().strip()
    accepted = sorted(path.name for path in (inbox / "accepted").rglob("*.nii.gz"))
    assert len(accepted) == 6
    assert list(inbox.glob("*/*.nii.gz")) == []
    assert (git(root, "rev-parse", "HEAD"), git(root, "status", "--porcelain")) == (head, status)

    elsewhere = Project(tmp_path / "elsewhere")
    git(root, "clone", "--quiet", "--branch", branch, str(root), str(elsewhere.root))
    remote = str(root.parent / REMOTE)
    elsewhere.run("dvc", "remote", "add", "--local", "--default", "team", remote)
    elsewhere.run("dvc", "pull", "--quiet", "data.dvc", "dvc.yaml")
    assert "Running stage" not in elsewhere.run("dvc", "repro")
    assert git(elsewhere.root, "status", "--porcelain") == ""
