"""Data versions in a real repository of git and DVC."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from fullscale.runtime.errors import StageError
from fullscale.scans.cohort import read_cohort, write_cases
from fullscale.versioning.data_version import (
    commit_data,
    find_unannounced,
    is_remote_in_git,
    mark_announced,
    open_newest,
    restore_data,
)
from fullscale.versioning.git import (
    commit_paths,
    find_commit,
    git,
    run_program,
)
from fullscale.versioning.provenance import read_data_version

pytestmark = pytest.mark.slow


def change_data(folder, patient):
    """Change the cohort in data/ without new scans."""
    first, *rest = read_cohort(folder / "data").cases
    write_cases(folder / "data", [replace(first, patient=patient), *rest])


def make_version(root, patient, cases=("a",), num_quarantined=0, code_branch=None):
    with open_newest(root, "inbox", code_branch) as folder:
        restore_data(folder)
        change_data(folder, patient)
        return commit_data(folder, cases, num_quarantined)


def test_data_version_is_one_commit_of_data_dvc_on_scans(scans_repo):
    head = git(scans_repo, "rev-parse", "HEAD")
    before = (scans_repo / "data.dvc").read_bytes(), (scans_repo / "data/cases.csv").read_bytes()
    version = make_version(scans_repo, "p1", ("b", "a"), 2)
    tip = find_commit(scans_repo, "scans")
    assert git(scans_repo, "show", "--format=", "--name-only", tip) == "data.dvc"
    assert git(scans_repo, "rev-parse", f"{tip}^") == head
    message = git(scans_repo, "show", "--no-patch", "--format=%B", tip)
    assert message == "Add 2 scans\n\nCase: b\nCase: a\nQuarantined: 2"
    assert version in git(scans_repo, "show", "scans:data.dvc")
    assert git(scans_repo, "rev-parse", "HEAD") == head
    assert git(scans_repo, "status", "--porcelain") == ""
    after = (scans_repo / "data.dvc").read_bytes(), (scans_repo / "data/cases.csv").read_bytes()
    assert after == before


def test_data_of_a_version_come_from_the_cache_of_the_project(scans_repo):
    version = make_version(scans_repo, "p1")
    shutil.rmtree(scans_repo / ".cache")
    with open_newest(scans_repo, "retrain") as folder:
        restore_data(folder)
        assert read_data_version(folder) == version
        assert read_cohort(folder / "data").cases[0].patient == "p1"


def test_worktrees_share_the_blocks_of_the_cache_and_leave_the_project_its_copies(scans_repo):
    make_version(scans_repo, "p1")  # its data/ keeps what `dvc add` put into the cache
    with open_newest(scans_repo, "retrain") as folder:
        restore_data(folder)
    cached = {file.stat().st_ino for file in (scans_repo / ".dvc/cache/files").rglob("*")}
    for name in ("inbox", "retrain"):
        files = [file for file in (folder.with_name(name) / "data").rglob("*") if file.is_file()]
        assert len(files) == 8
        assert {file.stat().st_ino for file in files} <= cached, name
    own = {file.stat().st_ino for file in (scans_repo / "data").rglob("*")}
    assert not own & cached


@pytest.mark.parametrize("moment", ["before add", "after add", "after commit"])
def test_version_that_was_killed_half_way_is_undone_and_made_again(scans_repo, moment):
    before = make_version(scans_repo, "p1")
    tip = find_commit(scans_repo, "scans")
    with open_newest(scans_repo, "inbox") as folder:
        change_data(folder, "p2")
        (folder / "data/.incoming").mkdir()
        (folder / "data/.incoming/case-ct.nii.gz").write_text("half")
        if moment != "before add":
            shutil.rmtree(folder / "data/.incoming")
            run_program(["dvc", "add", "data"], folder)
        if moment == "after commit":
            commit_paths(folder, ["data.dvc"], "Killed")
    assert find_commit(scans_repo, "scans") == tip
    with open_newest(scans_repo, "inbox") as folder:
        restore_data(folder)
        assert read_data_version(folder) == before
        assert read_cohort(folder / "data").cases[0].patient == "p1"
        assert not (folder / "data/.incoming").exists()
    after = make_version(scans_repo, "p2")
    assert after != before
    assert git(scans_repo, "rev-parse", "scans^") == tip


def test_data_that_the_cache_lacks_come_from_the_remote(scans_repo, tmp_path):
    run_program(["dvc", "remote", "add", "--local", "--default", "near", "../near"], scans_repo)
    run_program(["dvc", "push"], scans_repo)
    shutil.rmtree(scans_repo / ".dvc/cache")
    with open_newest(scans_repo, "inbox") as folder:
        restore_data(folder)
        assert len(read_cohort(folder / "data").cases) == 3
    shutil.rmtree(scans_repo / ".dvc/cache")
    shutil.rmtree(scans_repo / ".cache/checkouts/inbox/data")
    near = scans_repo.parent / "near"
    near.rename(tmp_path / "away")
    with (
        open_newest(scans_repo, "inbox") as folder,
        pytest.raises(StageError, match=r"dvc .*pull.* ended with code"),
    ):
        restore_data(folder)
    (tmp_path / "away").rename(near)
    with open_newest(scans_repo, "inbox") as folder:
        restore_data(folder)
        assert len(read_cohort(folder / "data").cases) == 3


def test_remote_inside_the_project_is_known(scans_repo, tmp_path):
    assert not is_remote_in_git(scans_repo, scans_repo)
    for name, place, is_inside in (
        ("sample", "sample-remote", True),
        ("team", str(tmp_path / "remote"), False),
        ("cloud", "s3://bucket/scans", False),
    ):
        run_program(["dvc", "remote", "add", "--default", name, place], scans_repo)
        assert is_remote_in_git(scans_repo, scans_repo) == is_inside
    run_program(["dvc", "remote", "default", "sample"], scans_repo)
    commit_paths(scans_repo, [".dvc/config"], "Keep scans in git")
    with open_newest(scans_repo, "retrain") as folder:
        assert is_remote_in_git(folder, scans_repo)


def change_code(root, text):
    (root / "code.py").write_text(text)
    return commit_paths(root, ["code.py"], "Change the code")


def test_newest_code_stands_beside_the_newest_scans_which_stay_free_of_it(scans_repo):
    version = make_version(scans_repo, "p1")
    tip = find_commit(scans_repo, "scans")
    head = change_code(scans_repo, "new = True\n")
    with open_newest(scans_repo, "retrain") as folder:
        assert (folder / "code.py").read_text() == "new = True\n"
        assert read_data_version(folder) == version
        assert git(folder, "rev-parse", "HEAD^") == head
        subject = git(folder, "log", "-1", "--format=%s")
        assert subject == f"Put scans {version[:8]} beside the code of main"
    second = make_version(scans_repo, "p2")
    assert git(scans_repo, "rev-parse", "scans^") == tip
    assert "code.py" not in git(scans_repo, "ls-tree", "--name-only", "scans")
    assert second in git(scans_repo, "show", "scans:data.dvc")


def test_code_is_that_of_the_named_branch_whatever_is_checked_out(scans_repo):
    make_version(scans_repo, "p1")
    git(scans_repo, "checkout", "--quiet", "-b", "feature")
    change_code(scans_repo, "half done\n")
    make_version(scans_repo, "p2")  # lands while the feature is being written
    with open_newest(scans_repo, "retrain", "main") as folder:
        assert not (folder / "code.py").exists()
        assert read_data_version(folder) in git(scans_repo, "show", "scans:data.dvc")
    with open_newest(scans_repo, "retrain", "feature") as folder:
        assert (folder / "code.py").exists()


@pytest.mark.parametrize("made_by", ["amend", "reset"])
def test_commits_that_people_took_back_are_not_trained(scans_repo, made_by):
    change_code(scans_repo, "wrong\n")
    make_version(scans_repo, "p1")
    if made_by == "amend":
        (scans_repo / "code.py").write_text("right\n")
        git(scans_repo, "commit", "--quiet", "--all", "--amend", "--message", "Right")
    else:
        git(scans_repo, "reset", "--quiet", "--hard", "HEAD^")
    version = make_version(scans_repo, "p2")
    with open_newest(scans_repo, "retrain") as folder:
        assert read_data_version(folder) == version
        if made_by == "amend":
            assert (folder / "code.py").read_text() == "right\n"
        else:
            assert not (folder / "code.py").exists()


def test_scans_into_which_code_was_merged_before_go_on(scans_repo):
    """An earlier version of this project merged the code that was checked out into `scans`."""
    make_version(scans_repo, "p1")
    git(scans_repo, "checkout", "--quiet", "-b", "feature")
    change_code(scans_repo, "half done\n")
    git(scans_repo, "checkout", "--quiet", "--detach", "scans")
    git(scans_repo, "merge", "--quiet", "--message", "Merge the code", "feature")
    git(scans_repo, "branch", "--force", "scans", "HEAD")
    git(scans_repo, "checkout", "--quiet", "main")
    version = make_version(scans_repo, "p2")
    with open_newest(scans_repo, "retrain") as folder:
        assert read_data_version(folder) == version
        assert not (folder / "code.py").exists()


def test_unknown_code_is_refused_with_a_remedy(scans_repo):
    remedy = "set FULLSCALE_CODE_BRANCH to one that `git branch` lists"
    git(scans_repo, "branch", "feature")
    with open_newest(scans_repo, "retrain", "feature"):
        pass
    git(scans_repo, "branch", "-D", "feature")
    with (
        pytest.raises(StageError, match=f"has no branch feature, whose code.*{remedy}"),
        open_newest(scans_repo, "retrain", "feature"),
    ):
        pass
    git(scans_repo, "checkout", "--quiet", "--detach")
    with pytest.raises(StageError, match=f"no branch is checked out in .*{remedy}"):
        make_version(scans_repo, "p1")
    git(scans_repo, "checkout", "--quiet", "-b", "scans")
    with pytest.raises(StageError, match=f"scans carries scans, and no code.*{remedy}"):
        make_version(scans_repo, "p1")


PERSONAL = """
[commit]
	gpgSign = true
	template = /nowhere
[core]
	hooksPath = HOOKS
[log]
	showSignature = true
[user]
	useConfigOnly = true
[color]
	ui = always
"""


def test_settings_of_a_person_change_nothing(scans_repo, tmp_path, monkeypatch):
    hook = tmp_path / "hooks/pre-commit"
    hook.parent.mkdir()
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    (tmp_path / "gitconfig").write_text(PERSONAL.replace("HOOKS", str(hook.parent)))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    first = make_version(scans_repo, "one")
    second = make_version(scans_repo, "two")
    assert first != second
    found = find_unannounced(scans_repo)
    assert (found.data_version, found.cases) == (second, ("a",))


@pytest.mark.parametrize("name", ["retrain", "scans/of-a-person"])
def test_branch_in_the_way_is_told_before_the_work(scans_repo, name):
    git(scans_repo, "branch", name)
    with pytest.raises(StageError, match=f"a branch is called {name}.*git branch --move {name}"):
        make_version(scans_repo, "one")
    git(scans_repo, "branch", "--move", name, "other")
    git(scans_repo, "branch", "retrainer")  # these are no obstacle
    git(scans_repo, "branch", "scans-of-a-person")
    make_version(scans_repo, "one")


def add_by_hand(root, patient):
    change_data(root, patient)
    run_program(["dvc", "add", "data"], root)
    commit_paths(root, ["data.dvc"], "Change the data by hand")
    return read_data_version(root)


def test_data_that_people_changed_after_a_version_was_merged_are_newer(scans_repo):
    make_version(scans_repo, "p1")
    tip = find_commit(scans_repo, "scans")
    git(scans_repo, "checkout", "--quiet", "scans", "--", "data.dvc")  # as a merge without ancestry
    run_program(["dvc", "checkout", "data.dvc"], scans_repo)
    commit_paths(scans_repo, ["data.dvc"], "Take the scans over")
    version = add_by_hand(scans_repo, "p9")
    with open_newest(scans_repo, "retrain") as folder:
        assert read_data_version(folder) == version
        assert git(folder, "rev-parse", "HEAD") == find_commit(scans_repo, "HEAD")
    make_version(scans_repo, "p2")
    assert git(scans_repo, "rev-parse", "scans^") == tip


def test_data_that_contradict_each_other_are_an_error_with_a_remedy(scans_repo):
    make_version(scans_repo, "p1")
    tip = find_commit(scans_repo, "scans")
    add_by_hand(scans_repo, "p9")
    with (
        pytest.raises(StageError, match=r"scans and main contradict each other.*git merge scans"),
        open_newest(scans_repo, "inbox"),
    ):
        pass
    assert find_commit(scans_repo, "scans") == tip
    with pytest.raises(StageError, match="CONFLICT"):
        git(scans_repo, "merge", "scans")
    git(scans_repo, "checkout", "--theirs", "--", "data.dvc")
    git(scans_repo, "commit", "--quiet", "--all", "--message", "Keep the data of scans")
    make_version(scans_repo, "p2")
    assert git(scans_repo, "rev-parse", "scans^") == tip


def test_person_on_the_branch_is_not_disturbed(scans_repo):
    make_version(scans_repo, "p1")
    git(scans_repo, "checkout", "--quiet", "scans")
    before = find_commit(scans_repo, "scans")
    with pytest.raises(StageError, match=r"branch scans is checked out in .*switch to another"):
        make_version(scans_repo, "p2", code_branch="main")
    assert find_commit(scans_repo, "scans") == before
    assert git(scans_repo, "status", "--porcelain") == ""


def test_new_version_is_announced_until_it_is_marked(scans_repo):
    assert find_unannounced(scans_repo) is None
    make_version(scans_repo, "p1", ["a", "b"], 1)
    version = make_version(scans_repo, "p2", ["c"], 2)
    found = find_unannounced(scans_repo)
    assert (found.data_version, found.cases, found.num_quarantined) == (version, ("a", "b", "c"), 3)
    assert find_unannounced(scans_repo) == found
    mark_announced(scans_repo, found)
    assert find_unannounced(scans_repo) is None
    version = make_version(scans_repo, "p3", ["d"])
    found = find_unannounced(scans_repo)
    assert (found.data_version, found.cases, found.num_quarantined) == (version, ("d",), 0)


def test_merged_version_is_not_announced_without_a_record(scans_repo):
    make_version(scans_repo, "p1")
    git(scans_repo, "merge", "--quiet", "scans")
    assert find_unannounced(scans_repo) is None


def test_announcement_survives_a_branch_that_was_made_again(scans_repo):
    make_version(scans_repo, "p1", ["a"])
    mark_announced(scans_repo, find_unannounced(scans_repo))
    git(scans_repo, "branch", "--quiet", "-D", "scans")
    shutil.rmtree(scans_repo / ".cache/checkouts")
    git(scans_repo, "worktree", "prune")
    git(scans_repo, "reflog", "expire", "--expire=now", "--all")
    git(scans_repo, "gc", "--quiet", "--prune=now")
    make_version(scans_repo, "p2", ["b"])
    assert find_unannounced(scans_repo).cases == ("b",)
