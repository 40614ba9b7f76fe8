from __future__ import annotations

import configparser
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from watching import is_alive, wait_until

from fullscale.runtime.errors import StageError
from fullscale.runtime.locks import acquire_lock
from fullscale.versioning import worktree
from fullscale.versioning.git import (
    commit_paths,
    contains,
    find_commit,
    git,
    move_branch,
    run_program,
)
from fullscale.versioning.worktree import open_checkout

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def commit_file(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return commit_paths(folder, [name], f"Write {name}")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    (root / ".dvc").mkdir(parents=True)
    git(root, "init", "--quiet", "--initial-branch", "main")
    (root / ".gitignore").write_text("/data\n/.cache/\n")
    (root / ".dvc/.gitignore").write_text("/config.local\n/tmp\n/cache\n")
    (root / ".dvc/config").write_text("[core]\n    autostage = false\n")
    commit_paths(root, [".gitignore", ".dvc"], "Begin")
    commit_file(root, "code.py", "one\n")
    return root


def state(root: Path) -> tuple[str, str, str]:
    """Return the state of a checkout that a person sees."""
    return (
        git(root, "status", "--porcelain"),
        git(root, "symbolic-ref", "HEAD"),
        (root / "code.py").read_text(),
    )


def test_checkout_begins_at_its_start_and_leaves_the_project_alone(project):
    first = git(project, "rev-parse", "HEAD")
    commit_file(project, "code.py", "two\n")
    before = state(project)
    with open_checkout(project, "inbox", first) as folder:
        assert folder == project / ".cache/checkouts/inbox"
        assert (folder / "code.py").read_text() == "one\n"
        commit_file(folder, "code.py", "three\n")
    assert state(project) == before


@pytest.mark.parametrize("is_moved", [True, False])
def test_moved_or_copied_project_keeps_its_checkout_and_leaves_the_original_alone(
    project, tmp_path, is_moved
):
    first = git(project, "rev-parse", "HEAD")
    with open_checkout(project, "retrain", "HEAD") as folder:
        (folder / "data").mkdir()
        (folder / "data/checkpoint").write_text("of many hours")
    other = tmp_path / "other"
    project.rename(other) if is_moved else shutil.copytree(project, other)
    commit_file(other, "code.py", "two\n")
    with open_checkout(other, "retrain", "HEAD") as folder:
        assert (folder / "data/checkpoint").read_text() == "of many hours"
        commit = commit_file(folder, "code.py", "three\n")
    assert contains(other, commit, first)
    assert project.exists() is not is_moved
    if not is_moved:
        assert find_commit(project, commit) is None
        assert git(project / ".cache/checkouts/retrain", "rev-parse", "HEAD") == first


def test_checkout_again_is_made_equal_and_keeps_what_git_ignores(project):
    with open_checkout(project, "inbox", "main") as folder:
        (folder / "data").mkdir()
        (folder / "data/scan").write_text("kept")
        (folder / "stray").write_text("goes")
        (folder / "code.py").unlink()
        git(folder, "rm", "--quiet", "--cached", "code.py")
    newest = commit_file(project, "code.py", "two\n")
    with open_checkout(project, "inbox", "main") as folder:
        assert git(folder, "rev-parse", "HEAD") == newest
        assert (folder / "code.py").read_text() == "two\n"
        assert (folder / "data/scan").read_text() == "kept"
        assert not (folder / "stray").exists()
        assert git(folder, "status", "--porcelain") == ""


def test_checkout_with_an_unfinished_merge_or_a_stale_lock_is_made_equal(project):
    git(project, "branch", "other")
    commit_file(project, "code.py", "two\n")
    with open_checkout(project, "inbox", "other") as folder:
        commit_file(folder, "code.py", "three\n")
        with pytest.raises(StageError, match="CONFLICT"):
            run_program(["git", "merge", "main"], folder)
        own = Path(git(folder, "rev-parse", "--absolute-git-dir"))
        (own / "index.lock").touch()
    with open_checkout(project, "inbox", "main") as folder:
        assert (folder / "code.py").read_text() == "two\n"
        assert not (own / "MERGE_HEAD").exists()


def half_without_link(folder, own):
    (folder / ".git").unlink()


def half_without_files(folder, own):
    for path in folder.iterdir():
        if path.name == "code.py":
            path.unlink()
    (own / "index").unlink()


def half_without_head(folder, own):
    (own / "HEAD").write_text("0" * 40 + "\n")


def half_forgotten(folder, own):
    (own / "locked").write_text("initializing")
    (folder / ".git").write_text(f"gitdir: {own}-gone\n")


def half_folder_gone(folder, own):
    (own / "locked").write_text("initializing")
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


@pytest.mark.parametrize(
    "damage",
    [
        half_without_link,
        half_without_files,
        half_without_head,
        half_forgotten,
        half_folder_gone,
    ],
)
def test_half_made_checkout_is_repaired(project, damage):
    with open_checkout(project, "inbox", "main") as folder:
        own = Path(git(folder, "rev-parse", "--absolute-git-dir"))
    damage(folder, own)
    before = state(project)
    with open_checkout(project, "inbox", "main") as folder:
        assert (folder / "code.py").read_text() == "one\n"
        assert git(folder, "rev-parse", "--show-toplevel") == str(folder)
        assert git(folder, "status", "--porcelain") == ""
    assert state(project) == before


def test_checkout_at_an_unknown_start_is_refused(project):
    with (
        pytest.raises(StageError, match=r"has no commit 'nowhere'; name one"),
        open_checkout(project, "inbox", "nowhere"),
    ):
        pass


def leave_paths_in_use(folder: Path, pid: int) -> Path:
    """Write what a DVC leaves that was killed while it trained; returns the file."""
    path = folder / ".dvc/tmp/rwlock"
    path.parent.mkdir(exist_ok=True)
    holder = {"pid": pid, "cmd": "dvc repro"}
    path.write_text(json.dumps({"write": {str(folder / "model"): holder}, "read": {}}))
    return path


@pytest.fixture
def used(project: Path) -> Path:
    """A project whose worktree has a stage, and was in use before."""
    stage = "stages:\n  train:\n    cmd: python train.py\n    outs: [model]\n"
    commit_file(project, "dvc.yaml", stage)
    with open_checkout(project, "retrain", "main"):
        pass
    return project


def test_killed_dvc_that_nobody_waits_for_blocks_no_path(used):
    with subprocess.Popen(["sleep", "60"]) as dvc:
        leave_paths_in_use(used / ".cache/checkouts/retrain", dvc.pid)
        dvc.kill()
        assert wait_until(lambda: psutil.Process(dvc.pid).status() == psutil.STATUS_ZOMBIE, 20)
        with open_checkout(used, "retrain", "main") as folder:
            assert "train" in run_program(["dvc", "status"], folder)


def test_number_of_a_killed_dvc_that_another_process_has_now_blocks_no_path(used):
    path = leave_paths_in_use(used / ".cache/checkouts/retrain", os.getpid())
    os.utime(path, (0, psutil.Process().create_time() - 60))
    with open_checkout(used, "retrain", "main") as folder:
        assert "train" in run_program(["dvc", "status"], folder)


def test_half_written_paths_in_use_are_forgotten(used):
    path = leave_paths_in_use(used / ".cache/checkouts/retrain", os.getpid())
    text = path.read_text()
    path.write_text(text[: text.index(str(os.getpid())) + 1])
    with open_checkout(used, "retrain", "main") as folder:
        assert "train" in run_program(["dvc", "status"], folder)


def test_dvc_that_ends_soon_is_waited_for(used):
    with subprocess.Popen(["sleep", "1"]) as dvc:
        leave_paths_in_use(used / ".cache/checkouts/retrain", dvc.pid)
        with open_checkout(used, "retrain", "main") as folder:
            assert not is_alive(dvc.pid)
            assert not (folder / ".dvc/tmp/rwlock").exists()


def test_dvc_that_does_not_end_keeps_its_paths(used, monkeypatch):
    monkeypatch.setattr(worktree, "END_OF_DVC_S", 0.2)
    with subprocess.Popen(["sleep", "60"]) as dvc:
        leave_paths_in_use(used / ".cache/checkouts/retrain", dvc.pid)
        with (
            pytest.raises(StageError, match=rf"busy, it is being blocked .*PID {dvc.pid}\): dvc"),
            open_checkout(used, "retrain", "main") as folder,
        ):
            run_program(["dvc", "status"], folder)
        dvc.kill()


def read_local(folder: Path) -> configparser.RawConfigParser:
    config = configparser.RawConfigParser()
    config.read(folder / ".dvc/config.local")
    return config


def test_checkout_uses_the_cache_of_the_project(project):
    with open_checkout(project, "inbox", "main") as folder:
        assert read_local(folder).get("cache", "dir") == str(project / ".dvc/cache")
        assert read_local(folder).get("cache", "type") == "hardlink,copy"
        assert git(folder, "status", "--porcelain") == ""


def test_checkout_takes_over_local_remotes_with_paths_that_still_lead_there(project):
    (project / ".dvc/config.local").write_text(
        "[core]\n    remote = team\n[cache]\n    dir = ../shared-cache\n    type = hardlink,copy\n"
        "['remote \"team\"']\n    url = ../store\n"
        "['remote \"far\"']\n    url = s3://bucket/100%\n    endpointurl = http://127.0.0.1:9000\n"
    )
    with open_checkout(project, "inbox", "main") as folder:
        config = read_local(folder)
    assert config.get("core", "remote") == "team"
    assert config.get("cache", "dir") == str(project / "shared-cache")
    assert config.get("cache", "type") == "hardlink,copy"
    assert config.get("'remote \"team\"'", "url") == str(project / "store")
    assert config.get("'remote \"far\"'", "url") == "s3://bucket/100%"
    assert config.get("'remote \"far\"'", "endpointurl") == "http://127.0.0.1:9000"


def test_dvc_reads_what_a_checkout_is_given(project):
    (project / ".dvc/config.local").write_text("['remote \"team\"']\n    url = ../store\n")
    with open_checkout(project, "inbox", "main") as folder:
        assert run_program(["dvc", "cache", "dir"], folder).strip() == str(project / ".dvc/cache")
        listed = "".join(run_program(["dvc", "remote", "list"], folder).split())  # it wraps lines
        assert str(project / "store") in listed


def test_second_user_of_a_checkout_waits(project, capfd):
    order = []

    def second():
        with open_checkout(project, "inbox", "main"):
            order.append("second")

    with open_checkout(project, "inbox", "main"):
        thread = threading.Thread(target=second)
        thread.start()
        assert wait_until(lambda: "waiting until it ends" in capfd.readouterr().err, 20)
        order.append("first")
    thread.join(20)
    assert order == ["first", "second"]


def test_killed_user_lets_go_of_a_checkout(tmp_path):
    code = "import sys, time; from pathlib import Path\n"
    code += "from fullscale.runtime.locks import acquire_lock\n"
    code += "with acquire_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    path = tmp_path / "lock"
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        os.kill(process.pid, signal.SIGKILL)
    with acquire_lock(path):
        assert path.exists()


def test_commit_goes_without_hooks_and_without_a_branch(project):
    hook = project / ".git/hooks/pre-commit"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    with open_checkout(project, "inbox", "main") as folder:
        commit = commit_file(folder, "code.py", "two\n")
        assert git(folder, "rev-parse", "HEAD") == commit
        assert git(folder, "show", "--format=", "--name-only", commit) == "code.py"
    assert find_commit(project, "main") == git(project, "rev-parse", f"{commit}^")


def test_commit_by_nobody_has_a_name(project, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.delenv("GIT_CONFIG_COUNT", raising=False)
    commit = commit_file(project, "code.py", "two\n")
    assert git(project, "show", "--no-patch", "--format=%an <%ae>", commit) == (
        "fullscale <fullscale@localhost>"
    )


def test_branch_is_made_and_goes_forward_only(project):
    first = find_commit(project, "main")
    second = commit_file(project, "code.py", "two\n")
    move_branch(project, "scans", second)
    assert find_commit(project, "scans") == second
    with pytest.raises(StageError, match=r"branch scans is at .* does not contain.*run again"):
        move_branch(project, "scans", first)
    assert find_commit(project, "scans") == second


def test_branch_that_someone_has_checked_out_does_not_move(project):
    commit = find_commit(project, "main")
    with pytest.raises(StageError, match=r"main is checked out in .*project.*switch to another"):
        move_branch(project, "main", commit)


def test_program_gives_its_output_and_its_last_words(tmp_path):
    assert run_program(["sh", "-c", "echo hello; echo noise >&2"], tmp_path) == "hello\n"
    with pytest.raises(StageError, match=r"code 3: b \| c \| d \| e \| f$"):
        run_program(["sh", "-c", "printf 'a\\nb\\nc\\nd\\ne\\nf\\n' >&2; exit 3"], tmp_path)
    with pytest.raises(StageError, match=r"code 1: only this$"):
        run_program(["sh", "-c", "echo only this; exit 1"], tmp_path)


def test_program_finds_this_interpreter_first(tmp_path):
    found = run_program(["python", "-c", "import sys; print(sys.executable)"], tmp_path)
    assert Path(found.strip()).parent == Path(sys.executable).parent


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a parent's death")
def test_program_ends_with_the_process_that_runs_it(tmp_path):
    code = (
        "import sys; from pathlib import Path; from fullscale.versioning.git import run_program\n"
    )
    code += "run_program(['sh', '-c', 'echo $$ > pid; exec sleep 60'], Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT) as process:
        written = tmp_path / "pid"
        assert wait_until(lambda: written.exists() and written.read_text(), 20)
        os.kill(process.pid, signal.SIGKILL)
    assert wait_until(lambda: not is_alive(int(written.read_text())), 10)
