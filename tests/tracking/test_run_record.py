import json
import math
import os

import pytest
from matplotlib.figure import Figure

from fullscale.runtime.errors import StageError
from fullscale.runtime.files import write_atomically
from fullscale.tracking.run_record import RunDescription, RunRecord, list_records

RUN = RunDescription(
    store_uri="http://127.0.0.1:9",
    artifact_location=None,
    name="unet",
    parameters={"train.width": 4},
    tags={"fullscale.network": "unet"},
    data_version="d" * 32,
    key="1700000000000-00000000",
    started_ms=1_700_000_000_000,
    run_id="abc",
)


@pytest.fixture
def record(tmp_path):
    return RunRecord.create(tmp_path, RUN)


def values(record):
    return [(row.step, row.key, row.value) for row in record.rows]


def test_record_comes_back_as_written(record):
    record.log_metrics({"val/dice": 0.1 + 0.2, "train/total": -1e-30}, 3)
    record.set_tag("note", 'two\nlines, "quoted"')
    record.update(status="FINISHED", ended_ms=7)
    again = RunRecord(record.folder)
    assert values(again) == [(3, "val/dice", 0.1 + 0.2), (3, "train/total", -1e-30)]
    assert again.rows == record.rows
    assert again.run == record.run
    assert (again.run.parameters, again.run.status) == ({"train.width": "4"}, "FINISHED")
    assert again.run.tags["note"] == 'two\nlines, "quoted"'


def test_repeated_epoch_and_nan_are_left_out(record):
    record.log_metrics({"a": 1.0, "b": math.nan}, 1)
    again = RunRecord(record.folder)
    again.log_metrics({"a": 5.0, "b": 2.0}, 1)
    again.log_metrics({"a": 6.0}, 2)
    assert values(RunRecord(record.folder)) == [(1, "a", 1.0), (1, "b", 2.0), (2, "a", 6.0)]


def test_every_metric_has_a_group_that_pages_fold(record):
    metrics = {"learning_rate": 0.1, "slices/organ": 5.0, "time/training_s": 3.0, "val/dice": 0.5}
    record.log_metrics(metrics, 1)
    names = [key for _, key, _ in values(record)]
    in_train = ["train/learning_rate", "train/slices/organ", "train/time/training_s"]
    assert names == [*in_train, "val/dice"]
    record.log_metrics({"learning_rate": 0.2}, 1)
    assert len(record.rows) == 4


@pytest.mark.parametrize("num_lost", [1, 2, 7, 15])
def test_line_cut_short_by_a_kill_is_dropped_and_the_rest_kept(record, num_lost):
    record.log_metrics({"a": 1.0}, 1)
    record.log_metrics({"a": 2.0}, 2)
    os.truncate(record.path, record.path.stat().st_size - num_lost)
    again = RunRecord(record.folder)
    assert values(again) == [(1, "a", 1.0)]
    again.log_metrics({"a": 3.0}, 2)
    assert values(RunRecord(record.folder)) == [(1, "a", 1.0), (2, "a", 3.0)]


@pytest.mark.parametrize(
    "line", ["metric,1,a,0.5", "metric,one,a,0.5,7", "matrix,1,a,0.5,7", "tag,0,a,unquoted,7"]
)
def test_line_that_cannot_be_read_is_named(record, line):
    record.log_metrics({"a": 1.0}, 1)
    record.path.write_text(record.path.read_text() + line + "\n")
    with pytest.raises(StageError, match=rf"journal\.csv, line 3: found '{line}', expected kind,"):
        RunRecord(record.folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [("run.json", "{"), ("run.json", "{}"), ("sent.json", "many"), ("sent.json", "[]")],
)
def test_folder_that_describes_no_run_is_named(record, name, content):
    (record.folder / name).write_text(content)
    with pytest.raises(StageError, match=f"{RUN.key} does not describe a tracked run .*move"):
        RunRecord(record.folder)


def test_confirmation_is_remembered_for_one_run_only(record):
    record.log_metrics({"a": 1.0, "b": 2.0, "c": 3.0}, 1)
    record.mark_sent(num_rows=2)
    assert [row.key for row in RunRecord(record.folder).unsent_rows()] == ["c"]
    record.mark_sent(num_rows=1, state=record.state())
    again = RunRecord(record.folder)
    assert again.is_sent()
    again.set_tag("note", "new")
    assert not again.is_sent()
    again.update(run_id="def")
    assert len(RunRecord(record.folder).unsent_rows()) == 3


def test_pictures_and_files_wait_until_their_content_is_confirmed(record, tmp_path):
    weights = tmp_path / "trained/inner/weights"
    write_atomically(weights, "before")
    record.log_files(tmp_path / "trained", "trained")
    record.log_picture(Figure(), "validation/epoch-0001.png")
    write_atomically(weights, "after")
    (first, kept, _), (second, picture, _) = record.unsent_files()
    assert (first, kept.read_text()) == ("trained/inner/weights", "before")
    assert second == "validation/epoch-0001.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    record.mark_sent(files={path: time_ns for path, _, time_ns in record.unsent_files()})
    assert not list(RunRecord(record.folder).unsent_files())
    record.log_files(tmp_path / "trained", "trained")
    record.log_picture(Figure(figsize=(2, 1)), "validation/epoch-0001.png")
    assert [path for path, _, _ in record.unsent_files()] == [first, second]
    assert kept.read_text() == "after"
    with pytest.raises(ValueError, match=r"must end in \.png, found curves\.svg"):
        record.log_picture(Figure(), "curves.svg")


def test_records_are_listed_oldest_first(tmp_path):
    for key in ("1700000000002-bb", "1700000000001-aa", "1700000000003-00"):
        RunRecord.create(tmp_path, RunDescription(**{**vars(RUN), "key": key}))
    (tmp_path / "1700000000000-cc").mkdir()  # a kill came before the run was described
    assert [record.run.key[-2:] for record in list_records(tmp_path)] == ["aa", "bb", "00"]


def test_record_that_was_released_writes_nothing(record):
    """A request to a hanging server may end when another process writes there."""
    before = {path: path.read_bytes() for path in record.folder.iterdir()}
    record.release()
    for change in (lambda: record.mark_sent(num_rows=1), lambda: record.update(status="KILLED")):
        with pytest.raises(RuntimeError, match="is left to whoever opens it next"):
            change()
    assert {path: path.read_bytes() for path in record.folder.iterdir()} == before


def test_record_of_an_earlier_version_is_read(record):
    """It kept tags and status in journal.csv, pictures apart, and references to other files."""
    former = {key: value for key, value in vars(RUN).items() if key not in ("status", "ended_ms")}
    (record.folder / "run.json").write_text(json.dumps(former))
    (record.folder / "sent").write_text("1")
    for name in ("pictures/validation/epoch-0001.png", "files/trained.json"):
        write_atomically(record.folder / name, "{}")
    lines = ["metric,1,a,0.5,7", 'tag,0,note,"""x""",8', "status,0,,KILLED,9"]
    record.path.write_text(record.path.read_text() + "\n".join(lines) + "\n")
    for _ in range(2):
        again = RunRecord(record.folder)
        assert values(again) == [(1, "a", 0.5)]
        assert again.run.tags == {**RUN.tags, "note": "x"}
        assert (again.run.status, again.run.ended_ms) == ("KILLED", 9)
        assert [path for path, _, _ in again.unsent_files()] == ["validation/epoch-0001.png"]
