"""Retraining in a small real repository of git and DVC: one folder of data, two stages."""

from __future__ import annotations

import shutil
from datetime import date
from pathlib import Path

import pytest

from fullscale.runtime.errors import StageError
from fullscale.versioning.data_version import commit_data, open_newest
from fullscale.versioning.git import SCANS_BRANCH, commit_paths, git, run_program
from fullscale.versioning.retraining import (
    MAX_FAILURES,
    clear_pending,
    count_failure,
    find_data_since,
    list_changes,
    list_pending,
    list_untrained_changes,
    mark_pending,
    newest_branch,
    publish,
    push_branches,
    read_commit_message,
)

pytestmark = pytest.mark.slow
DAY = date(2026, 3, 1)
PIPELINE = """\
stages:
  slice:
    cmd: mkdir -p artifacts && cat data/scan > artifacts/slices
    deps: [data, code.py]
    params: [slice]
    outs: [artifacts/slices]
  evaluate:
    cmd: mkdir -p reports && cat artifacts/slices > reports/summary.json
    deps: [artifacts/slices]
    metrics:
      - reports/summary.json: {cache: false}
"""


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose results are up to date and committed."""
    root = tmp_path_factory.mktemp("publish") / "project"
    (root / "data").mkdir(parents=True)
    (root / "data/scan").write_text("1")
    (root / "code.py").write_text("one\n")
    (root / "params.yaml").write_text("slice:\n  size_px: 32\n")
    (root / "dvc.yaml").write_text(PIPELINE)
    git(root, "init", "--quiet", "--initial-branch", "main")
    run_program(["dvc", "init", "--quiet"], root)
    run_program(["dvc", "add", "--quiet", "data"], root)
    (root / ".gitignore").write_text("/data\n/artifacts/\n/.cache/\n")
    run_program(["dvc", "repro", "--quiet"], root)
    commit_paths(root, ["."], "Begin")
    return root


@pytest.fixture
def project(origin: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(origin, tmp_path / "project"))


def land(root: Path, scan: str) -> str:
    """Commit a new data version on the branch `scans`; return its MD5."""
    with open_newest(root, "inbox") as folder:
        run_program(["dvc", "checkout", "--quiet", "data.dvc"], folder)
        (folder / "data/scan").unlink()
        (folder / "data/scan").write_text(scan)
        run_program(["dvc", "add", "--quiet", "data"], folder)
        return commit_data(folder, [f"case_{scan}"], 0)


def test_nothing_changed_where_results_are_up_to_date(project: Path) -> None:
    assert list_changes(project) == []
    shutil.rmtree(project / "artifacts")
    (project / "reports/summary.json").unlink()
    assert list_changes(project) == []


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("params.yaml", "slice:\n  size_px: 64\n", "slice: parameters slice modified"),
        ("code.py", "two\n", "slice: code.py modified"),
        ("data/scan", "2", "slice: data modified"),
        ("dvc.yaml", PIPELINE.replace("cat artifacts", "cat  artifacts"), "evaluate: changed comm"),
    ],
)
def test_change_is_named_with_its_stage(project: Path, file: str, text: str, words: str) -> None:
    (project / file).unlink()
    (project / file).write_text(text)
    (line,) = list_changes(project)
    assert line.startswith(words)


def test_results_are_on_a_separate_branch(project: Path) -> None:
    before = [git(project, "rev-parse", "HEAD"), git(project, "status", "--porcelain")]
    version = land(project, "2")
    with open_newest(project, "retrain") as folder:
        run_program(["dvc", "checkout", "--quiet", "data.dvc"], folder)
        assert list_untrained_changes(folder) == ["slice: data modified"]
        run_program(["dvc", "repro", "--quiet"], folder)
        branch = publish(folder, DAY, version, "Retrain: fail\n\nReason: by hand")
    assert branch == f"retrain/2026-03-01-{version[:8]}" == newest_branch(project)
    changed = git(project, "diff", "--name-only", f"{branch}^", branch).splitlines()
    assert changed == ["dvc.lock", "reports/summary.json"]
    assert git(project, "rev-parse", f"{branch}~2") == before[0]  # code, scans, results
    assert git(project, "show", f"{branch}:reports/summary.json") == "2"
    assert git(project, "log", "-1", "--format=%s|%b", branch) == "Retrain: fail|Reason: by hand"
    assert before == [git(project, "rev-parse", "HEAD"), git(project, "status", "--porcelain")]
    assert git(project, "symbolic-ref", "HEAD") == "refs/heads/main"
    assert (project / "data/scan").read_text() == "1"

    with open_newest(project, "retrain") as folder:  # the results are known, though not merged
        lock = (folder / "dvc.lock").read_bytes()
        run_program(["dvc", "checkout", "--quiet", "data.dvc"], folder)
        assert list_untrained_changes(folder) == []
        assert (folder / "dvc.lock").read_bytes() == lock
        (folder / "code.py").write_text("two\n")
        assert list_untrained_changes(folder) == ["slice: code.py modified"]

    git(project, "merge", "--quiet", branch)
    run_program(["dvc", "checkout", "--quiet"], project)
    assert list_untrained_changes(project) == []


def test_results_of_a_branch_are_known_where_no_lock_was_committed(project: Path) -> None:
    version = land(project, "2")
    with open_newest(project, "retrain") as folder:
        run_program(["dvc", "checkout", "--quiet", "data.dvc"], folder)
        run_program(["dvc", "repro", "--quiet"], folder)
        publish(folder, DAY, version, "Retrain")
    git(project, "rm", "--quiet", "--cached", "dvc.lock")
    (project / "dvc.lock").unlink()
    commit_paths(project, ["."], "Forget the results")
    assert list_untrained_changes(project) == ["slice: data modified"]
    assert not (project / "dvc.lock").exists()


def test_taken_branch_gets_a_number(project: Path) -> None:
    names = []
    for size_px in (64, 128, 256):
        with open_newest(project, "retrain") as folder:
            (folder / "params.yaml").write_text(f"slice:\n  size_px: {size_px}\n")
            names.append(publish(folder, DAY, "0123456789", "Retrain"))
    wanted = "retrain/2026-03-01-01234567"
    assert names == [wanted, f"{wanted}-2", f"{wanted}-3"]
    assert git(project, "show", f"{wanted}-2:params.yaml").endswith("128")


def test_newest_branch_is_that_of_the_last_retraining_by_date(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert newest_branch(project) is None
    for hour, version in enumerate(("66666666", "ffffffff", "00000000")):
        monkeypatch.setenv("GIT_COMMITTER_DATE", f"2026-03-01T0{hour}:00:00Z")
        with open_newest(project, "retrain") as folder:
            (folder / "params.yaml").write_text(f"slice:\n  size_px: {hour}\n")
            assert publish(folder, DAY, version, "Retrain") == newest_branch(project)


def test_code_that_people_changed_meanwhile_is_trained_on_too(project: Path) -> None:
    version = land(project, "2")
    (project / "code.py").write_text("two\n")
    head = commit_paths(project, ["code.py"], "Change the code")
    with open_newest(project, "retrain") as folder:
        run_program(["dvc", "checkout", "--quiet", "data.dvc"], folder)
        assert list_untrained_changes(folder) == ["slice: data modified, code.py modified"]
        run_program(["dvc", "repro", "--quiet"], folder)
        branch = publish(folder, DAY, version, "Retrain")
    assert git(project, "rev-parse", f"{branch}~2") == head
    assert git(project, "show", f"{branch}:data.dvc") == git(project, "show", "scans:data.dvc")


def test_scans_added_during_a_retraining_are_reported_once(project: Path) -> None:
    assert find_data_since(project, None, "any") is None
    first = land(project, "2")
    found = find_data_since(project, None, "older")
    assert found is not None
    assert (found.data_version, found.cases) == (first, ("case_2",))
    assert find_data_since(project, None, first) is None
    tip = git(project, "rev-parse", SCANS_BRANCH)
    assert find_data_since(project, tip, "older") is None
    second = land(project, "3")
    found = find_data_since(project, tip, first)
    assert found is not None
    assert (found.data_version, found.cases) == (second, ("case_3",))


def test_branches_are_pushed_once_and_again_where_they_were_refused(
    project: Path, tmp_path: Path
) -> None:
    with pytest.raises(StageError, match="no git remote team; `git remote` lists"):
        push_branches(project, "team")
    team = tmp_path / "team.git"
    git(tmp_path, "init", "--quiet", "--bare", str(team))
    git(project, "remote", "add", "team", str(team))
    assert push_branches(project, "team") == []

    def retrain(size_px: int) -> str:
        with open_newest(project, "retrain") as folder:
            (folder / "params.yaml").write_text(f"slice:\n  size_px: {size_px}\n")
            return publish(folder, DAY, "0123456789", "Retrain")

    first = retrain(64)
    hook = team / "hooks/pre-receive"
    hook.write_text("#!/bin/sh\necho the team sleeps\nexit 1\n")
    hook.chmod(0o755)
    with pytest.raises(StageError, match=r"pre-receive hook declined"):
        push_branches(project, "team")
    hook.unlink()
    second = retrain(128)
    assert push_branches(project, "team") == [first, second]
    assert git(team, "rev-parse", first) == git(project, "rev-parse", first)
    assert push_branches(project, "team") == []
    git(project, "merge", "--quiet", first)
    git(team, "branch", "--quiet", "-D", first, second)
    git(project, "fetch", "--quiet", "--prune", "team")
    assert push_branches(project, "team") == [second]  # the other one was merged


def test_pending_registrations_are_kept_until_they_end_or_are_dropped(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list_pending(project) == []
    older = git(project, "rev-parse", "HEAD")
    (project / "code.py").write_text("two\n")
    newer = commit_paths(project, ["code.py"], "Change the code")
    for commit in (older, newer):
        mark_pending(project, commit)
    assert list_pending(project) == [older, newer]
    for _ in range(MAX_FAILURES - 1):
        count_failure(project, older)
    mark_pending(project, older)  # to begin once more is no success
    assert list_pending(project) == [older, newer]
    count_failure(project, older)
    assert list_pending(project) == [newer]
    assert f"the results of {older[:8]} are dropped after 3 failures" in capsys.readouterr().err
    mark_pending(project, "f" * 40)
    assert list_pending(project) == [newer]
    clear_pending(project, newer)
    clear_pending(project, older)
    assert list_pending(project) == []


def test_message_of_a_branch_is_what_was_published(project: Path) -> None:
    version = land(project, "2")
    with open_newest(project, "retrain") as folder:
        run_program(["dvc", "checkout", "--quiet", "data.dvc"], folder)
        run_program(["dvc", "repro", "--quiet"], folder)
        branch = publish(folder, DAY, version, "Retrain: fail\n\nReason: by hand\nTwo: lines")
    assert read_commit_message(project, branch) == ("Retrain: fail", "Reason: by hand\nTwo: lines")
