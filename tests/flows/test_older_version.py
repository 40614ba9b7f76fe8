"""A retraining that an older version of the project left unfinished is published by this one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prefect.artifacts import Artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.sorting import FlowRunSort

from flows.retrain import LAYOUT_FILE, NOTHING, retrain
from fullscale.runtime.files import write_json
from fullscale.versioning.git import SCANS_BRANCH, commit_paths, git, move_branch, run_program
from fullscale.versioning.retraining import PENDING_FILE, list_pending, newest_branch
from fullscale.versioning.worktree import open_checkout

pytestmark = pytest.mark.slow

# Its packages have names of this version's, and are found first in a checkout.
OLDER_FILES = {
    "fullscale/__init__.py": "",
    "scans/__init__.py": "ANSWER = 42\n",
    "tasks/__init__.py": "",
    "tasks/register.py": """
import json, os
from pathlib import Path
from scans import ANSWER
Path("reports").mkdir(exist_ok=True)
verdict = {"old name of a key": ANSWER, "store": os.environ["MLFLOW_TRACKING_URI"]}
Path("reports/gate.json").write_text(json.dumps(verdict))
""",
    "dvc.yaml": """
stages:
  register:
    cmd: python -m tasks.register
    deps: [data, scans, tasks]
    outs: [reports/gate.json: {cache: false}]
""",
    ".dvcignore": "__pycache__\n",
    ".gitignore": "/data\n/.cache/\n/mlruns\n__pycache__/\n",
}
NEWER_FILES = {
    "fullscale/__init__.py": "",
    LAYOUT_FILE: "",
    "dvc.yaml": "stages: {}\n",
    ".gitignore": OLDER_FILES[".gitignore"],
}


def commit_files(root: Path, files: dict[str, str], message: str) -> str:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return commit_paths(root, ["."], message)


@pytest.fixture
def project(scans_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose scans and checkout are of an older version, and its HEAD of this one."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("FULLSCALE_CODE_BRANCH", "main")
    run_program(["dvc", "remote", "add", "-d", "team", str(tmp_path / "remote")], scans_repo)
    older = commit_files(scans_repo, OLDER_FILES, "Older version")
    move_branch(scans_repo, SCANS_BRANCH, older)
    git(scans_repo, "rm", "-r", "--quiet", "scans", "tasks")
    commit_files(scans_repo, NEWER_FILES, "This version")
    with open_checkout(scans_repo, "retrain", older) as folder:
        (folder / ".cache").mkdir()
        (folder / ".cache/kept").write_text("a checkpoint")
    return scans_repo


def test_unfinished_retraining_is_published_with_its_own_code(prefect: None, project: Path) -> None:
    older = git(project, "rev-parse", SCANS_BRANCH)
    write_json(project / PENDING_FILE, {older: 0})
    assert retrain(project) == NOTHING
    branch = newest_branch(project)
    assert branch is not None
    assert git(project, "rev-parse", f"{branch}^") == older
    assert git(project, "log", "-1", "--format=%s", branch).endswith(": by an older version")
    assert '"old name of a key": 42' in git(project, "show", f"{branch}:reports/gate.json")
    assert f"{project}/mlruns" in git(project, "show", f"{branch}:reports/gate.json")
    assert list_pending(project) == []
    with get_client(sync_client=True) as client:
        (run,) = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)
    assert re.fullmatch(r"retrain \d{4}-\d\d-\d\d by hand, code of main: nothing to do", run.name)
    shown = Artifact.get("retraining")
    assert shown is not None
    assert "Nothing to do" in shown.data  # of the newest scans, which this version looked at
    assert (project / ".cache/checkouts/retrain/.cache/kept").read_text() == "a checkpoint"


def test_older_version_that_fails_is_tried_again_and_then_given_up(
    prefect: None, project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    git(project, "checkout", "--quiet", SCANS_BRANCH)
    broken = commit_files(project, {"tasks/register.py": "raise KeyError('gone')\n"}, "Break it")
    git(project, "checkout", "--quiet", "-")
    git(project, "merge", "--quiet", "--strategy", "ours", broken)
    write_json(project / PENDING_FILE, {broken: 0})
    for _ in range(3):
        assert list_pending(project) == [broken]
        assert retrain(project) == NOTHING
    assert f"the results of {broken[:8]} are not published: dvc" in caplog.text
    assert list_pending(project) == []
    assert newest_branch(project) is None
