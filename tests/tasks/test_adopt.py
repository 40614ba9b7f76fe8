import re
from datetime import date

import pytest
from cohorts import write_nnunet

from fullscale.ingestion.ingest import ingest
from fullscale.runtime.errors import StageError
from fullscale.versioning.data_version import commit_data, open_newest, restore_data
from fullscale.versioning.git import commit_paths, find_commit, git, run_program
from fullscale.versioning.provenance import read_data_version, warn_of_uncommitted_data
from fullscale.versioning.retraining import publish
from tasks.commands.adopt import adopt

pytestmark = pytest.mark.slow


@pytest.fixture
def retrained(scans_repo, tmp_path):
    """A repository with a retraining of two more scans on a branch; returns both."""
    (scans_repo / "dvc.yaml").write_text("stages: {}\n")
    (scans_repo / "verdict.txt").write_text("old\n")
    commit_paths(scans_repo, ["dvc.yaml", "verdict.txt"], "Begin the pipeline")
    with open_newest(scans_repo, "inbox") as folder:
        restore_data(folder)
        ingest(write_nnunet(tmp_path / "more", 5), folder / "data")
        commit_data(folder, ["case_03", "case_04"], 0)
        (folder / "verdict.txt").write_text("new\n")
        branch = publish(folder, date(2026, 11, 29), read_data_version(folder), "Retrain: pass")
    return scans_repo, branch


def test_adopted_branch_brings_its_scans(retrained):
    project, branch = retrained
    before = read_data_version(project)
    lines = adopt(project, branch)
    assert lines[0] == f"merged {branch}: Retrain: pass"
    assert any(re.match(r" *verdict\.txt +\| 2", line) for line in lines)
    after = read_data_version(project)
    assert lines[-1] == f"data version {after}, was {before}: 2 scans added"
    assert len(list((project / "data/imagesTr").iterdir())) == 5
    assert (project / "verdict.txt").read_text() == "new\n"
    assert git(project, "status", "--porcelain") == ""
    assert adopt(project, branch) == [
        f"{branch} is merged already",
        f"data version {after}, as before",
    ]


def test_repro_after_a_bare_merge_is_warned_of(retrained):
    project, branch = retrained
    assert warn_of_uncommitted_data(project) is None
    old = read_data_version(project)
    git(project, "merge", "--quiet", branch)
    assert warn_of_uncommitted_data(project) is None
    run_program(["dvc", "repro", "data.dvc"], project)  # records the old scans again
    assert read_data_version(project) == old
    assert f"data/ holds data version {old}, and " in warn_of_uncommitted_data(project)


def test_nothing_of_ones_own_is_lost(retrained):
    project, branch = retrained
    head = find_commit(project, "HEAD")
    with pytest.raises(StageError, match=f"no branch 'retrain/none'; retrainings are on: {branch}"):
        adopt(project, "retrain/none")
    (project / "verdict.txt").write_text("mine\n")
    with pytest.raises(StageError, match=r"commit or stash them first:\n.*verdict\.txt"):
        adopt(project, branch)
    git(project, "checkout", "verdict.txt")
    extra = project / "data/note.txt"
    extra.write_text("mine")
    with pytest.raises(StageError, match=r"data/ differs from data\.dvc"):
        adopt(project, branch)
    extra.unlink()
    assert find_commit(project, "HEAD") == head
    (project / "verdict.txt").write_text("mine\n")
    mine = commit_paths(project, ["verdict.txt"], "Judge otherwise")
    with pytest.raises(StageError, match=r"nothing was changed: .*CONFLICT.*verdict\.txt"):
        adopt(project, branch)
    assert find_commit(project, "HEAD") == mine
    assert git(project, "status", "--porcelain") == ""
