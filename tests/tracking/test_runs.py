import contextlib
import math
import time

import mlflow
import pytest
from matplotlib.figure import Figure
from watching import wait_until

from fullscale.runtime.errors import StageError
from fullscale.runtime.locks import LockedError, acquire_lock
from fullscale.tracking import runs
from fullscale.tracking.run_record import RunDescription, RunRecord, list_records
from fullscale.tracking.runs import LOCK_NAME, send_leftovers, training_run, write_finished_run
from fullscale.tracking.store import EXPERIMENT, Store
from fullscale.tracking.sync import KEY_TAG

DEAD = Store("http://127.0.0.1:9")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "tracking"


@pytest.fixture
def client(mlflow_store):
    return mlflow.MlflowClient(mlflow_store.uri)


def describe_run(store, parameters=None, tags=None):
    uri, location = store.uri, store.artifact_location
    return RunDescription(uri, location, "unet", parameters or {}, tags or {}, "d" * 32)


def start(store, folder, *, resume=False, **kwargs):
    return training_run(describe_run(store, **kwargs), folder, resume=resume)


def points(client, run_id, key="val/dice"):
    """Return step and value of every point the store has, in the order of steps."""
    return sorted((point.step, point.value) for point in client.get_metric_history(run_id, key))


def leave_killed(store, folder, num_epochs):
    """Leave what a training leaves that was killed outright, nothing of it sent."""
    record = RunRecord.create(folder, describe_run(store))
    for epoch in range(1, num_epochs + 1):
        record.log_metrics({"val/dice": epoch / 10}, epoch)
    return record


def test_run_has_what_was_logged(mlflow_store, client, folder, tmp_path):
    (tmp_path / "trained/inner").mkdir(parents=True)
    (tmp_path / "trained/weights.txt").write_text("w")
    (tmp_path / "trained/inner/notes.txt").write_text("n")
    parameters = {f"train.parameter{number}": number for number in range(150)}
    with start(mlflow_store, folder, parameters=parameters, tags={"git": "c"}) as run:
        run.log_metrics({"val/dice": 0.5, "val/slice_fpr/liver": math.nan}, step=1)
        run.log_metrics({f"value{number}": number for number in range(2500)}, step=2)
        run.log_picture(Figure(), "validation/epoch-0001.png")
        run.log_files(tmp_path / "trained", "trained")
        run.set_tag("note", "two\nlines")
    found = client.get_run(run.run_id)
    assert points(client, run.run_id) == [(1, 0.5)]
    assert "val/slice_fpr/liver" not in found.data.metrics
    assert [found.data.metrics[f"value{number}"] for number in (0, 1000, 2499)] == [0, 1000, 2499]
    for name in ("cpu_utilization_percentage", "system_memory_usage_megabytes"):
        assert [step for step, _ in points(client, run.run_id, f"system/{name}")] == [1, 2]
    assert len(found.data.params) == 150
    assert (found.data.tags["git"], found.data.tags["note"]) == ("c", "two\nlines")
    assert found.info.run_name == "unet"
    assert found.inputs.dataset_inputs[0].dataset.digest == "d" * 32
    listed = {
        item.path
        for path in ("validation", "trained", "trained/inner")
        for item in client.list_artifacts(run.run_id, path)
    }
    files = {"trained/weights.txt", "trained/inner", "trained/inner/notes.txt"}
    assert listed == {"validation/epoch-0001.png", *files}
    assert list_records(folder)[0].is_sent()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (ValueError("a defect"), "FAILED"),
        (StageError("the loss is nan"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(143), "KILLED"),
        (SystemExit(130), "KILLED"),
        (SystemExit(129), "KILLED"),
        (SystemExit(1), "FAILED"),
    ],
)
def test_run_ends_as_its_training_did(mlflow_store, client, folder, error, status):
    before_ms = time.time_ns() // 1_000_000
    caught = contextlib.nullcontext() if error is None else pytest.raises(type(error))
    with caught, start(mlflow_store, folder) as run:
        if error is not None:
            raise error
    found = client.get_run(run.run_id).info
    assert found.status == status
    assert found.end_time >= before_ms


def test_interrupted_run_continues_as_the_same_one(mlflow_store, client, folder):
    with (
        contextlib.suppress(KeyboardInterrupt),
        start(mlflow_store, folder, tags={"git": "a"}, resume=True) as first,  # nothing to resume
    ):
        for epoch in (1, 2, 3):
            first.log_metrics({"val/dice": epoch / 10}, step=epoch)
        raise KeyboardInterrupt
    assert client.get_run(first.run_id).info.status == "KILLED"
    with start(mlflow_store, folder, tags={"git": "b"}, resume=True) as second:
        for epoch in (3, 4):
            second.log_metrics({"val/dice": epoch / 5}, step=epoch)
        assert wait_until(lambda: client.get_run(first.run_id).info.status == "RUNNING", 30)
    assert second.run_id == first.run_id
    assert points(client, first.run_id) == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.8)]
    assert client.get_run(first.run_id).data.tags["git"] == "b"
    assert len(list_records(folder)) == 1


def test_fresh_start_is_another_run_and_clears_the_folder(mlflow_store, client, folder, capsys):
    killed = leave_killed(mlflow_store, folder, 2)
    with start(mlflow_store, folder) as run:
        run.log_metrics({"val/dice": 0.5}, step=1)
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    (earlier,) = client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{killed.run.key}'")
    assert points(client, earlier.info.run_id) == [(1, 0.1), (2, 0.2)]
    assert "now has the 2 values" in capsys.readouterr().err
    assert points(client, run.run_id) == [(1, 0.5)]
    assert [record.run_id for record in list_records(folder)] == [run.run_id]


@pytest.mark.parametrize("is_resumed", [True, False])
def test_run_that_was_deleted_is_written_anew(
    mlflow_store, client, folder, tmp_path, capsys, is_resumed
):
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(start(mlflow_store, folder, tags={"git": "a"}))
        run.log_metrics({"val/dice": 0.5}, step=1)
        run.log_picture(Figure(), "curves.png")
        first_id = run.run_id
        if is_resumed:
            stack.close()
        client.delete_run(first_id)
        if is_resumed:
            run = stack.enter_context(start(mlflow_store, folder, resume=True))
        run.log_metrics({"val/dice": 0.75}, step=2)
    assert run.run_id != first_id
    assert points(client, run.run_id) == [(1, 0.5), (2, 0.75)]
    assert [item.path for item in client.list_artifacts(run.run_id)] == ["curves.png"]
    assert client.get_run(run.run_id).data.tags["git"] == "a"
    assert f"no longer has run {first_id}; all its values are sent" in capsys.readouterr().err


def test_run_that_is_resumed_in_another_store_has_all_values_there(
    mlflow_store, empty_store, folder
):
    with start(mlflow_store, folder) as first:
        first.log_metrics({"val/dice": 0.5}, step=1)
    with start(empty_store, folder, resume=True) as second:
        second.log_metrics({"val/dice": 0.75}, step=2)
    other = mlflow.MlflowClient(empty_store.uri)
    assert points(other, second.run_id) == [(1, 0.5), (2, 0.75)]
    assert other.get_run(second.run_id).info.status == "FINISHED"


def test_sending_twice_stores_once(mlflow_store, client, folder):
    with start(mlflow_store, folder) as run:
        for epoch in (1, 2):
            run.log_metrics({"val/dice": 0.1 + epoch / 3, "train/total": -0.0}, step=epoch)
    (run.folder / "sent.json").unlink()
    send_leftovers(folder)
    for key in ("val/dice", "train/total", "system/cpu_utilization_percentage"):
        assert [step for step, _ in points(client, run.run_id, key)] == [1, 2]
    assert client.get_run(run.run_id).info.status == "FINISHED"


def test_leftovers_of_a_killed_training_are_sent_and_its_run_ends(
    mlflow_store, client, folder, capsys
):
    send_leftovers(folder)
    assert not folder.exists()
    killed = leave_killed(mlflow_store, folder, 3)
    send_leftovers(folder)
    (record,) = list_records(folder)
    assert points(client, record.run_id) == [(1, 0.1), (2, 0.2), (3, 0.3)]
    info = client.get_run(record.run_id).info
    assert (info.status, info.end_time) == ("KILLED", killed.rows[-1].timestamp_ms)
    assert f"now has the 3 values of run {record.run_id}" in capsys.readouterr().err
    send_leftovers(folder)
    assert capsys.readouterr().err == ""
    record.update(run_id=None)  # as if a kill came before the id of the started run was noted
    with start(mlflow_store, folder, resume=True) as run:
        pass
    assert run.run_id == info.run_id
    assert points(client, info.run_id) == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_leftovers_for_a_dead_server_stay_next_to_a_new_run(mlflow_store, client, folder, capsys):
    key = leave_killed(DEAD, folder, 2).run.key
    with start(mlflow_store, folder) as run:
        run.log_metrics({"val/dice": 0.5}, step=1)
    assert points(client, run.run_id) == [(1, 0.5)]
    # Both may have begun in one millisecond, and then chance puts them in order.
    kept, _ = sorted(list_records(folder), key=lambda record: record.run.key != key)
    assert (kept.run.key, kept.run.status, len(kept.unsent_rows())) == (key, "KILLED", 2)
    assert f"2 values and 0 files for MLflow at {DEAD.uri} are kept in" in capsys.readouterr().err


def test_value_that_mlflow_refuses_is_left_out_and_named(mlflow_store, client, folder, capsys):
    with start(mlflow_store, folder) as run:
        run.log_metrics({"val/dice/liver?": 0.5, "val/dice": 0.25}, step=1)
        run.log_metrics({"val/dice": 0.75}, step=2)
    assert points(client, run.run_id) == [(1, 0.25), (2, 0.75)]
    assert capsys.readouterr().err.count("MLflow refuses metric val/dice/liver?") == 1
    assert client.get_run(run.run_id).info.status == "FINISHED"


def test_finished_run_is_written_from_its_history(mlflow_store, client, folder, tmp_path):
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained/weights").write_text("w")
    epochs = [{"epoch": 1.0, "val/dice": 0.5}, {"epoch": 2.0, "val/dice": 0.75}]
    run_id = write_finished_run(describe_run(mlflow_store), folder, epochs, tmp_path / "trained")
    assert points(client, run_id) == [(1, 0.5), (2, 0.75)]
    assert set(client.get_run(run_id).data.metrics) == {"val/dice"}
    assert client.get_run(run_id).info.status == "FINISHED"
    assert [item.path for item in client.list_artifacts(run_id, "trained")] == ["trained/weights"]


def test_folder_in_use_is_named(mlflow_store, folder, capsys):
    with acquire_lock(folder / LOCK_NAME):
        with pytest.raises(LockedError, match=rf"another process holds {folder}.*wait until"):
            start(mlflow_store, folder).__enter__()
        send_leftovers(folder)
    assert f"a training is using {folder}" in capsys.readouterr().err


def test_new_run_on_a_dead_server_fails_and_leaves_nothing(folder):
    with pytest.raises(StageError, match=r"9 does not answer .*start the server, or unset"):
        start(DEAD, folder).__enter__()
    assert list_records(folder) == []
    with acquire_lock(folder / LOCK_NAME, wait=False):
        pass


def test_known_run_continues_without_its_server(folder, capsys, monkeypatch):
    monkeypatch.setattr(runs, "CLOSING_TIMEOUT_S", 0.5)
    leave_killed(DEAD, folder, 2).update(run_id="known")
    begin_s = time.monotonic()
    with start(DEAD, folder, resume=True) as run:
        assert run.run_id == "known"
        for epoch in (2, 3):
            run.log_metrics({"val/dice": 0.5}, step=epoch)
        run.log_picture(Figure(), "curves.png")
        assert time.monotonic() - begin_s < 5
    (record,) = list_records(folder)
    kept = [(row.step, row.value) for row in record.rows if row.key == "val/dice"]
    assert kept == [(1, 0.1), (2, 0.2), (3, 0.5)]
    assert record.run.status == "FINISHED"
    log = capsys.readouterr().err
    assert log.count("does not answer") == 1
    assert "Connection refused" in log
    assert f"training continues, metrics are kept in {record.path} and sent when" in log
    assert "values and 1 files for MLflow" in log
    assert f"kept in {record.folder}; the next training or registration sends them" in log
