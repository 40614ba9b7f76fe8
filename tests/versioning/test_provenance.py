import re
from pathlib import Path
from typing import NamedTuple

import pytest

from fullscale.runtime.errors import StageError
from fullscale.versioning.git import commit_paths, find_code, git
from fullscale.versioning.provenance import Provenance, digest_test_set, read_provenance


class Annotated(NamedTuple):
    name: str
    patient: str
    label_sha256: str


FIRST, SECOND = Annotated("a", "p", "1" * 64), Annotated("b", "q", "2" * 64)


def test_digest_names_a_set_and_not_an_order():
    digest = digest_test_set([FIRST, SECOND])
    assert len(digest) == 16
    assert digest == digest_test_set([SECOND, FIRST])


@pytest.mark.parametrize(
    "cases",
    [
        [FIRST],
        [FIRST, SECOND, Annotated("c", "q", "3" * 64)],
        [FIRST, SECOND._replace(name="c")],
        [FIRST, SECOND._replace(patient="p")],
        [FIRST, SECOND._replace(label_sha256="3" * 64)],
        [FIRST._replace(name="ap", patient=""), SECOND],
    ],
)
def test_digest_changes_with_cases_patients_and_annotation(cases):
    assert digest_test_set(cases) != digest_test_set([FIRST, SECOND])


def test_provenance_names_the_branch_that_is_checked_out_or_else_the_given_one(
    tmp_path: Path,
) -> None:
    (tmp_path / "data.dvc").write_text("outs:\n- md5: abc.dir\n")
    assert read_provenance(tmp_path, "main") == Provenance("none", "abc.dir", "main")
    git(tmp_path, "init", "--quiet", "--initial-branch", "feature")
    commit = commit_paths(tmp_path, ["data.dvc"], "Begin")
    assert read_provenance(tmp_path, "main") == Provenance(commit, "abc.dir", "feature")
    git(tmp_path, "checkout", "--quiet", "--detach")
    assert read_provenance(tmp_path, "main") == Provenance(commit, "abc.dir", "main")
    assert read_provenance(tmp_path) == Provenance(commit, "abc.dir")


def test_repository_of_another_user_is_told_in_the_words_of_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init", "--quiet", "--initial-branch", "main")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    whole = re.compile("fatal: detected dubious ownership.*safe.directory", re.DOTALL)
    with pytest.raises(StageError, match=whole):
        find_code(tmp_path, None)
    with pytest.raises(StageError, match=whole):
        read_provenance(tmp_path)
