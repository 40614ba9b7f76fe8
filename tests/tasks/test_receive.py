"""The inbox of a real repository of git and DVC, from arrival to the final place."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import fsspec
import nibabel as nib
import numpy as np
import pytest
from cohorts import write_dataset_json, write_nnunet

from fullscale.inbox.arrivals import list_arrivals
from fullscale.inbox.inbox import Inbox
from fullscale.runtime.errors import StageError
from fullscale.runtime.files import file_sha256
from fullscale.scans.cohort import IGNORED_ID, read_cohort
from fullscale.versioning.data_version import find_unannounced, open_newest, restore_data
from fullscale.versioning.git import SCANS_BRANCH, commit_paths, find_commit, git
from tasks.receive import receive

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
NUM_KILLS = 8
LONGEST_RUN_S = 8
TABLES = ("dataset.json", "cases.csv")


def fill(inbox: Path, num_cases: int, prefix: str, seed: int) -> Path:
    """Write pairs without tables, as people drop them."""
    write_nnunet(inbox, num_cases, prefix=prefix, seed=seed)
    (inbox / "dataset.json").unlink()
    return inbox


def leave_unjudged(path: Path) -> None:
    """Mark a corner of a label map as voxels that nobody judged."""
    label = nib.load(path)
    ids = np.asarray(label.dataobj).copy()
    ids[:3, :3, :3] = IGNORED_ID
    nib.save(nib.Nifti1Image(ids, label.affine), path)


def spoil(inbox: Path, case: str) -> None:
    """Write a truncated scan and its label."""
    write_nnunet(inbox / "made", 1, seed=77)
    for folder, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        source = next((inbox / "made" / folder).iterdir())
        content = source.read_bytes()
        short = content[: len(content) // 2] if folder == "imagesTr" else content
        (inbox / folder).mkdir(exist_ok=True)
        (inbox / folder / f"{case}{ending}").write_bytes(short)
    shutil.rmtree(inbox / "made")


def scans_in(inbox: Path) -> Counter[str]:
    """Count the files below the inbox by content, without reasons and tables."""
    files = [path for path in inbox.rglob("*") if path.is_file() and path.name != "reason.txt"]
    return Counter(file_sha256(path) for path in files if path.name not in TABLES)


def places(inbox: Path) -> dict[str, set[str]]:
    """Return the names of the files in each place of the inbox."""
    found: dict[str, set[str]] = {"accepted": set(), "quarantine": set(), "inbox": set()}
    for path in inbox.rglob("*"):
        if path.is_file() and path.name not in TABLES:
            top = path.relative_to(inbox).parts[0]
            found[top if top in found else "inbox"].add(path.name)
    return found


def names_of(*cases: str) -> set[str]:
    return {f"{case}{ending}" for case in cases for ending in ("_0000.nii.gz", ".nii.gz")}


def newest(root: Path):
    """Return the cases of the newest data version by name."""
    with open_newest(root, "check") as folder:
        restore_data(folder)
        return {case.name: case for case in read_cohort(folder / "data").cases}


def visible_state(root: Path) -> tuple[object, ...]:
    return (
        git(root, "status", "--porcelain"),
        git(root, "symbolic-ref", "HEAD"),
        git(root, "rev-parse", "HEAD"),
        {path: file_sha256(path) for path in (root / "data").rglob("*") if path.is_file()},
    )


def test_every_file_ends_in_its_place(scans_repo):
    before = visible_state(scans_repo)
    inbox = fill(scans_repo / "inbox", 2, "new", 50)
    leave_unjudged(inbox / "labelsTr/new_01.nii.gz")
    spoil(inbox, "bad")
    (inbox / "labelsTr/lonely.nii.gz").write_bytes(b"label")
    (inbox / "labelsTr/..name.nii.gz").write_bytes(b"hidden")
    (inbox / "labelsTr/a b\n.nii.gz").write_bytes(b"unsafe")
    shutil.copy(
        scans_repo / "data/imagesTr/case_00_0000.nii.gz", inbox / "imagesTr/twin_0000.nii.gz"
    )
    shutil.copy(scans_repo / "data/labelsTr/case_00.nii.gz", inbox / "labelsTr/twin.nii.gz")
    contents = scans_in(inbox)

    outcome = receive(scans_repo, str(inbox), 0)

    assert outcome.names("accepted") == ["new_00", "new_01"]
    assert sorted(outcome.names("quarantined")) == ["a b\n", "bad", "twin"]
    assert sorted(outcome.names("waiting")) == ["labelsTr/..name.nii.gz", "lonely"]
    assert outcome.new_patients == ("new_00", "new_01")
    assert places(inbox) == {
        "accepted": names_of("new_00", "new_01"),
        "quarantine": names_of("bad", "twin") | {"a_b.nii.gz", "reason.txt"},
        "inbox": {"lonely.nii.gz", "..name.nii.gz"},
    }
    assert scans_in(inbox) == contents
    reason = (inbox / "quarantine/bad/reason.txt").read_text()
    assert reason.startswith("unreadable: found imagesTr/bad_0000.nii.gz")
    assert "content_twice" in (inbox / "quarantine/twin/reason.txt").read_text()
    version = outcome.data_version
    assert {path.name for path in (inbox / "accepted").iterdir()} == {version[:8]}
    assert version in git(scans_repo, "show", f"{SCANS_BRANCH}:data.dvc")
    flags = {name: case.training_only for name, case in newest(scans_repo).items()}
    assert flags == dict.fromkeys(["case_00", "case_01", "case_02"], False) | dict.fromkeys(
        ["new_00", "new_01"], True
    )
    assert visible_state(scans_repo) == before
    found = find_unannounced(scans_repo)
    assert (found.data_version, found.cases) == (version, ("new_00", "new_01"))
    assert found.num_quarantined == 3

    again = receive(scans_repo, str(inbox), 0)
    assert sorted(again.names("waiting")) == ["labelsTr/..name.nii.gz", "lonely"]
    assert len(again.cases) == 2


def test_same_pair_again_is_accepted_and_another_of_its_name_is_not(scans_repo):
    inbox = scans_repo / "inbox"
    receive(scans_repo, str(fill(inbox, 1, "new", 50)), 0)
    tip = find_commit(scans_repo, SCANS_BRANCH)
    outcome = receive(scans_repo, str(fill(inbox, 1, "new", 50)), 0)
    assert outcome.names("already in") == ["new_00"]
    assert outcome.data_version is None
    for number in (1, 2):
        outcome = receive(scans_repo, str(fill(inbox, 1, "new", 60 + number)), 0)
        assert outcome.names("quarantined") == ["new_00"]
        assert "case_exists" in outcome.cases[0].reason
    assert find_commit(scans_repo, SCANS_BRANCH) == tip
    assert {path.name for path in (inbox / "quarantine").iterdir()} == {"new_00", "new_00-2"}
    assert places(inbox)["inbox"] == set()


def test_tables_of_the_inbox_give_patient_annotation_and_labels(scans_repo):
    inbox = fill(scans_repo / "inbox", 3, "new", 50)
    write_dataset_json(inbox, labels={"background": 0, "spleen": 2, "liver": 1}, file_ending=".x")
    (inbox / "cases.csv").write_text(
        "case,patient,annotated,note\nnew_00,case_01,liver,x\nnew_01,new|patient,liver;spleen,\n"
    )
    outcome = receive(scans_repo, str(inbox), 0)
    assert outcome.patients == {"new_00": "case_01", "new_01": "new|patient"}
    assert outcome.new_patients == ("new|patient",)
    assert [(f.case, f.reason) for f in outcome.cases if f.status == "waiting"] == [
        ("new_02", "cases.csv has no row for it, so its patient is not known")
    ]
    cases = newest(scans_repo)
    assert cases["new_00"].annotated == ("liver",)
    assert places(inbox)["inbox"] == names_of("new_02")
    assert all((inbox / table).is_file() for table in TABLES)


@pytest.mark.parametrize(
    ("table", "content", "words"),
    [
        ("cases.csv", "case,who\n", r"cases\.csv in .*inbox cannot be used.*without columns"),
        ("dataset.json", "{", r"tables in .*inbox cannot be used: dataset_json"),
        ("dataset.json", '{"labels": {"liver": "x"}}', r"cannot be used: dataset_json"),
    ],
)
def test_bad_table_fails_the_run_and_moves_nothing(scans_repo, table, content, words):
    inbox = fill(scans_repo / "inbox", 1, "new", 50)
    (inbox / table).write_text(content)
    with pytest.raises(StageError, match=words):
        receive(scans_repo, str(inbox), 0)
    assert places(inbox)["inbox"] == names_of("new_00")
    (inbox / table).unlink()
    assert receive(scans_repo, str(inbox), 0).names("accepted") == ["new_00"]


def test_bucket_is_an_inbox_too(scans_repo):
    made = fill(scans_repo.parent / "made", 2, "new", 50)
    spoil(made, "bad")
    url = f"memory://{scans_repo.parent.name}/inbox"
    fs, root = fsspec.core.url_to_fs(url)
    for folder in ("imagesTr", "labelsTr"):
        fs.put(f"{made}/{folder}/", f"{root}/{folder}/", recursive=True)
    outcome = receive(scans_repo, url, 0)
    assert outcome.names("accepted") == ["new_00", "new_01"]
    fs.get(f"{root}/", f"{made}/after/", recursive=True)
    assert places(made / "after") == {
        "accepted": names_of("new_00", "new_01"),
        "quarantine": names_of("bad") | {"reason.txt"},
        "inbox": set(),
    }


def test_file_that_is_still_being_copied_waits(tmp_path):
    inbox = fill(tmp_path / "inbox", 2, "new", 50)
    target = inbox / "imagesTr/new_00_0000.nii.gz"
    content = target.read_bytes()
    done = threading.Event()

    def copy_slowly():
        with target.open("wb", buffering=0) as stream:
            for start in range(0, len(content), max(1, len(content) // 30)):
                stream.write(content[start : start + max(1, len(content) // 30)])
                time.sleep(0.1)
        done.set()

    time.sleep(0.6)
    thread = threading.Thread(target=copy_slowly)
    thread.start()
    seen = Counter[str]()
    while not done.is_set():
        arrivals = list_arrivals(Inbox(str(inbox)), 0.5, tmp_path / "landing")
        if done.is_set():
            break
        seen.update(pair.name for pair in arrivals.ready)
        assert [pair.name for pair in arrivals.waiting] == ["new_00"]
    thread.join()
    assert set(seen) == {"new_01"}
    time.sleep(0.6)
    arrivals = list_arrivals(Inbox(str(inbox)), 0.5, tmp_path / "landing")
    assert [pair.name for pair in arrivals.ready] == ["new_00", "new_01"]


def test_file_that_changes_while_it_is_read_waits(scans_repo, monkeypatch):
    inbox = fill(scans_repo / "inbox", 2, "new", 50)
    read = Inbox.read

    def read_slowly(self, path, target):
        read(self, path, target)
        if path == "labelsTr/new_00.nii.gz":
            with (inbox / path).open("ab") as stream:
                stream.write(b"more")

    monkeypatch.setattr(Inbox, "read", read_slowly)
    outcome = receive(scans_repo, str(inbox), 0)
    assert outcome.names("accepted") == ["new_01"]
    assert outcome.names("waiting") == ["new_00"]
    assert places(inbox)["inbox"] == names_of("new_00")


class KilledError(BaseException):
    """Simulates a kill at a known moment; no code may handle it."""


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at", ["list inbox", "ingest", "commit data version", "move files"])
def test_run_that_stops_at_any_step_is_finished_by_the_next(scans_repo, at, after):
    inbox = fill(scans_repo / "inbox", 1, "new", 50)
    spoil(inbox, "bad")
    contents = scans_in(inbox)

    def stop(name, step):
        if name == at and not after:
            raise KilledError
        result = step()
        if name == at:
            raise KilledError
        return result

    with pytest.raises(KilledError):
        receive(scans_repo, str(inbox), 0, run_step=stop)
    assert scans_in(inbox) == contents
    receive(scans_repo, str(inbox), 0)
    assert places(inbox) == {
        "accepted": names_of("new_00"),
        "quarantine": names_of("bad") | {"reason.txt"},
        "inbox": set(),
    }
    assert scans_in(inbox) == contents
    assert git(scans_repo, "rev-list", "--count", f"HEAD..{SCANS_BRANCH}") == "1"
    assert find_unannounced(scans_repo).cases == ("new_00",)


def test_pair_that_is_sent_anew_while_it_is_moved_is_the_next(scans_repo):
    inbox = fill(scans_repo / "inbox", 1, "new", 50)

    def send_again(name, step):
        if name == "move files":
            fill(inbox, 1, "new", 51)
        return step()

    outcome = receive(scans_repo, str(inbox), 0, run_step=send_again)
    assert outcome.names("accepted") == ["new_00"]
    assert places(inbox)["inbox"] == names_of("new_00")
    assert receive(scans_repo, str(inbox), 0).names("quarantined") == ["new_00"]


RUN = """
import sys
from pathlib import Path
from tasks.receive import receive
receive(Path(sys.argv[1]), sys.argv[2], 0)
"""


def test_run_killed_at_random_moments_loses_nothing(scans_repo):
    inbox = fill(scans_repo / "inbox", 3, "new", 50)
    spoil(inbox, "bad")
    (inbox / "labelsTr/a b.nii.gz").write_bytes(b"unsafe")
    contents = scans_in(inbox)
    before = visible_state(scans_repo)
    chance = random.Random(os.environ.get("SURVIVAL_SEED", "7"))
    command = [sys.executable, "-c", RUN, str(scans_repo), str(inbox)]
    for _ in range(NUM_KILLS):
        with subprocess.Popen(command, cwd=ROOT) as process:
            try:
                code = process.wait(chance.uniform(0.5, LONGEST_RUN_S))
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
        assert code in (0, -signal.SIGKILL)
        assert scans_in(inbox) == contents
        if find_commit(scans_repo, SCANS_BRANCH) is not None:
            assert len(newest(scans_repo)) == 6
        if code == 0:
            break
    receive(scans_repo, str(inbox), 0)
    assert places(inbox) == {
        "accepted": names_of("new_00", "new_01", "new_02"),
        "quarantine": names_of("bad") | {"a_b.nii.gz", "reason.txt"},
        "inbox": set(),
    }
    assert scans_in(inbox) == contents
    assert git(scans_repo, "rev-list", "--count", f"HEAD..{SCANS_BRANCH}") == "1"
    assert visible_state(scans_repo) == before
    assert len(newest(scans_repo)) == 6


@pytest.mark.parametrize("limit_kb", [4, 40])
def test_full_disk_is_a_clear_failure_and_the_next_run_completes(scans_repo, limit_kb):
    """Limit the size of files, as on a full disk; the files of git are smaller."""
    inbox = fill(scans_repo / "inbox", 1, "new", 50)
    contents = scans_in(inbox)
    before = visible_state(scans_repo)
    limit = limit_kb * 1024
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(scans_repo), str(inbox)],
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "StageError" in done.stderr.splitlines()[-1]
    assert find_commit(scans_repo, SCANS_BRANCH) is None
    assert places(inbox)["inbox"] == names_of("new_00")
    assert scans_in(inbox) == contents
    receive(scans_repo, str(inbox), 0)
    assert places(inbox)["accepted"] == names_of("new_00")
    assert len(newest(scans_repo)) == 4
    assert visible_state(scans_repo) == before


def test_remote_that_is_away_is_a_clear_failure_and_the_next_run_completes(scans_repo):
    inbox = fill(scans_repo / "inbox", 1, "new", 50)
    cache = scans_repo / ".dvc/cache"
    cache.rename(scans_repo.parent / "kept")
    with pytest.raises(StageError, match=r"dvc .*pull.* ended with code"):
        receive(scans_repo, str(inbox), 0)
    assert places(inbox)["inbox"] == names_of("new_00")
    shutil.rmtree(cache, ignore_errors=True)
    (scans_repo.parent / "kept").rename(cache)
    assert receive(scans_repo, str(inbox), 0).names("accepted") == ["new_00"]


def test_first_cohort_needs_labels(scans_repo):
    git(scans_repo, "rm", "--quiet", "data.dvc")
    commit_paths(scans_repo, ["."], "Begin without scans")
    inbox = fill(scans_repo / "inbox", 1, "new", 50)
    with pytest.raises(StageError, match=r"neither a cohort .* nor a dataset\.json"):
        receive(scans_repo, str(inbox), 0)
    write_dataset_json(inbox)
    assert receive(scans_repo, str(inbox), 0).names("accepted") == ["new_00"]
    assert list(newest(scans_repo)) == ["new_00"]


def test_empty_inbox_costs_no_checkout(scans_repo):
    (scans_repo / "inbox").mkdir()
    started = time.monotonic()
    assert receive(scans_repo, str(scans_repo / "inbox"), 60).cases == []
    assert time.monotonic() - started < 1
    assert not (scans_repo / ".cache/checkouts").exists()
