import math
import os

import pytest
from matplotlib.figure import Figure

from fullscale.runtime.errors import StageError
from fullscale.runtime.files import file_sha256
from fullscale.tracking.artifact_queue import Outbox
from fullscale.tracking.journal import Journal, Row, RunDescription, list_journals

RUN = RunDescription(
    key="1700000000000-00000000",
    store_uri="http://127.0.0.1:9",
    artifact_location=None,
    name="unet",
    parameters={"train.width": "4"},
    tags={"fullscale.network": "unet"},
    data_version="d" * 32,
    started_ms=1_700_000_000_000,
    run_id="abc",
)


@pytest.fixture
def journal(tmp_path):
    return Journal.create(tmp_path, RUN)


def reopened(journal):
    return Journal(journal.folder)


def picture(width_in=1.0):
    return Figure(figsize=(width_in, 1.0))


def test_rows_come_back_as_written(journal):
    journal.add_metrics({"val/dice": 0.1 + 0.2, "train/total": -1e-30}, 3, 5)
    journal.add_tag("note", 'two\nlines, "quoted"', 6)
    journal.add_status("FINISHED", 7)
    assert reopened(journal).rows == [
        Row("metric", 3, "val/dice", "0.30000000000000004", 5),
        Row("metric", 3, "train/total", "-1e-30", 5),
        Row("tag", 0, "note", 'two\nlines, "quoted"', 6),
        Row("status", 0, "", "FINISHED", 7),
    ]
    assert reopened(journal).run == RUN


def test_each_call_is_on_disk_when_it_returns(journal):
    for step in range(1, 4):
        journal.add_metrics({"a": 1.0, "b": 2.0}, step, 0)
        assert len(journal.path.read_text().splitlines()) == 1 + 2 * step


def test_values_that_are_not_numbers_are_left_out(journal):
    journal.add_metrics({"a": math.nan, "b": 1.0}, 1, 0)
    assert [row.key for row in journal.rows] == ["b"]
    journal.add_metrics({"a": 2.0}, 1, 0)
    assert [row.key for row in reopened(journal).rows] == ["b", "a"]


def test_repeated_epoch_is_kept_once(journal):
    journal.add_metrics({"a": 1.0}, 1, 10)
    again = reopened(journal)
    again.add_metrics({"a": 5.0, "b": 2.0}, 1, 20)
    again.add_metrics({"a": 6.0}, 2, 30)
    assert [(row.step, row.key, row.value) for row in reopened(journal).rows] == [
        (1, "a", "1.0"),
        (1, "b", "2.0"),
        (2, "a", "6.0"),
    ]


@pytest.mark.parametrize("num_lost", [1, 2, 7, 15])
def test_line_cut_short_by_a_kill_is_dropped_and_the_rest_kept(journal, num_lost):
    journal.add_metrics({"a": 1.0}, 1, 10)
    journal.add_metrics({"a": 2.0}, 2, 20)
    os.truncate(journal.path, journal.path.stat().st_size - num_lost)
    again = reopened(journal)
    assert [row.value for row in again.rows] == ["1.0"]
    again.add_metrics({"a": 3.0}, 2, 30)
    assert [row.value for row in reopened(journal).rows] == ["1.0", "3.0"]


@pytest.mark.parametrize(
    "line", ["metric,1,a,0.5", "metric,one,a,0.5,7", "matrix,1,a,0.5,7", "tag,0,a,unquoted,7"]
)
def test_line_that_cannot_be_read_is_named(journal, line):
    journal.add_metrics({"a": 1.0}, 1, 10)
    journal.path.write_text(journal.path.read_text() + line + "\n")
    with pytest.raises(StageError, match=rf"journal\.csv, line 3: found '{line}', expected kind,"):
        reopened(journal)


@pytest.mark.parametrize(
    ("name", "content"), [("run.json", "{"), ("run.json", "{}"), ("sent", "many")]
)
def test_folder_that_describes_no_run_is_named(journal, name, content):
    (journal.folder / name).write_text(content)
    with pytest.raises(StageError, match=f"{RUN.key} does not describe a tracked run .*move"):
        reopened(journal)


def test_what_is_sent_is_remembered(journal):
    journal.add_metrics({"a": 1.0, "b": 2.0, "c": 3.0}, 1, 10)
    journal.mark_sent(2)
    assert [row.key for row in reopened(journal).unsent_rows()] == ["c"]
    assert not journal.is_sent()
    journal.mark_sent(3)
    assert reopened(journal).is_sent()


def test_run_under_another_id_counts_as_unsent(journal):
    journal.add_metrics({"a": 1.0}, 1, 10)
    journal.mark_sent(1)
    journal.describe(RUN)
    assert journal.is_sent()
    journal.describe(RunDescription(**{**vars(RUN), "run_id": "def"}))
    assert reopened(journal).run.run_id == "def"
    assert len(reopened(journal).unsent_rows()) == 1


def test_status_is_the_last_one(journal):
    assert journal.status == "RUNNING"
    journal.add_status("KILLED", 1)
    assert reopened(journal).status == "KILLED"
    journal.add_status("RUNNING", 2)
    assert reopened(journal).status == "RUNNING"


def test_journals_are_listed_oldest_first(tmp_path):
    for started in ("1700000000002-bb", "1700000000001-aa", "1700000000003-00"):
        Journal.create(tmp_path, RunDescription(**{**vars(RUN), "key": started}))
    (tmp_path / "1700000000000-cc").mkdir()  # a kill came before the run was described
    assert [journal.run.key[-2:] for journal in list_journals(tmp_path)] == ["aa", "bb", "00"]
    assert list_journals(tmp_path / "nowhere") == []


def test_picture_waits_until_it_is_dropped(tmp_path):
    outbox = Outbox(tmp_path)
    outbox.add_picture(picture(), "validation/epoch-0001.png")
    ((path, file),) = Outbox(tmp_path).pictures().items()
    assert path == "validation/epoch-0001.png"
    assert file.read_bytes().startswith(b"\x89PNG")
    outbox.drop_picture(file, file.stat())
    assert outbox.is_empty()


def test_picture_replaced_while_it_was_sent_still_waits(tmp_path):
    outbox = Outbox(tmp_path)
    outbox.add_picture(picture(), "curves.png")
    file = outbox.pictures()["curves.png"]
    sent = file.stat()
    outbox.add_picture(picture(width_in=2.0), "curves.png")
    newer = file.read_bytes()
    outbox.drop_picture(file, sent)
    assert outbox.pictures() == {"curves.png": file}
    assert file.read_bytes() == newer


def test_picture_that_is_no_png_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.png, found curves\.svg"):
        Outbox(tmp_path).add_picture(picture(), "curves.svg")


def test_files_are_referred_to_with_their_checksums(tmp_path):
    trained = tmp_path / "trained"
    (trained / "inner").mkdir(parents=True)
    (trained / "weights").write_bytes(b"w")
    (trained / "inner/notes").write_bytes(b"n")
    Outbox(tmp_path / "run").add_files(trained, "trained")
    (reference,) = Outbox(tmp_path / "run").files()
    assert (reference.folder, reference.path) == (trained, "trained")
    assert reference.sha256 == {
        "weights": file_sha256(trained / "weights"),
        "inner/notes": file_sha256(trained / "inner/notes"),
    }
    assert reference.is_unchanged("weights")
    (trained / "weights").write_bytes(b"v")
    assert not reference.is_unchanged("weights")
    (trained / "inner/notes").unlink()
    assert not reference.is_unchanged("inner/notes")
