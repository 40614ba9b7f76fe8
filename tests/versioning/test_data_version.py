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
    SCANS_BRANCH,
    commit_paths,
    contains,
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


def make_version(root, patient, cases=("a",), num_quarantined=0):
    with open_newest(root, "inbox") as folder:
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


def test_newer_code_is_merged_before_the_next_version(scans_repo):
    make_version(scans_repo, "p1")
    (scans_repo / "code.py").write_text("new = True\n")
    head = commit_paths(scans_repo, ["code.py"], "Change the code")
    with open_newest(scans_repo, "inbox") as folder:
        assert (folder / "code.py").read_text() == "new = True\n"
        assert contains(folder, "HEAD", "scans")
    assert not contains(scans_repo, "scans", head)
    make_version(scans_repo, "p2")
    assert contains(scans_repo, "scans", head)


PERSONAL = """
[commit]
	gpgSign = true
	template = /nowhere
[core]
	hooksPath = HOOKS
[log]
	showSignature = true
[merge]
	ff = only
	verifySignatures = true
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
    (scans_repo / "code.py").write_text("newer\n")
    head = commit_paths(scans_repo, ["code.py"], "Change the code")
    second = make_version(scans_repo, "two")  # merges the code
    assert first != second
    assert contains(scans_repo, SCANS_BRANCH, head)
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


def test_versions_that_people_merged_are_where_the_next_begins(scans_repo):
    make_version(scans_repo, "p1")
    git(scans_repo, "merge", "--quiet", "scans")
    (scans_repo / "code.py").write_text("new = True\n")
    head = commit_paths(scans_repo, ["code.py"], "Change the code")
    make_version(scans_repo, "p2")
    assert git(scans_repo, "rev-parse", "scans^") == head


def test_merge_conflict_in_the_data_is_an_error_with_a_remedy(scans_repo):
    make_version(scans_repo, "p1")
    tip = find_commit(scans_repo, "scans")
    change_data(scans_repo, "p9")
    run_program(["dvc", "add", "data"], scans_repo)
    commit_paths(scans_repo, ["data.dvc"], "Add other data by hand")
    with (
        pytest.raises(StageError, match=r"scans and HEAD have a merge conflict.*`git merge scans`"),
        open_newest(scans_repo, "inbox"),
    ):
        pass
    assert find_commit(scans_repo, "scans") == tip


def test_person_on_the_branch_is_not_disturbed(scans_repo):
    make_version(scans_repo, "p1")
    git(scans_repo, "checkout", "--quiet", "scans")
    before = find_commit(scans_repo, "scans")
    with pytest.raises(StageError, match=r"branch scans is checked out in .*switch to another"):
        make_version(scans_repo, "p2")
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
