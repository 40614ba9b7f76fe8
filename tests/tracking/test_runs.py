import contextlib
import math
import os
import time
from dataclasses import replace

import mlflow
import pytest
from matplotlib.figure import Figure

from fullscale.runtime.errors import StageError
from fullscale.tracking import runs
from fullscale.tracking import store as tracking_store
from fullscale.tracking.journal import Journal, RunDescription, list_journals
from fullscale.tracking.run_folder import hold
from fullscale.tracking.runs import send_leftovers, training_run
from fullscale.tracking.store import Store, spoken_to
from fullscale.tracking.system_metrics import PREFIX, SystemMetrics

DEAD = Store("http://127.0.0.1:9")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "tracking"


@pytest.fixture
def client(mlflow_store):
    return mlflow.MlflowClient(mlflow_store.uri)


def start(store, folder, *, resume=False, parameters=None, tags=None):
    parameters, tags = parameters or {}, tags or {}
    return training_run(store, "unet", parameters, tags, "d" * 32, folder, resume=resume)


def points(client, run_id, key):
    """Step and value of every point the store has, in the order of steps."""
    history = client.get_metric_history(run_id, key)
    return sorted((point.step, point.value) for point in history)


def kill_after(store, folder, num_epochs):
    """Leave what a training leaves that was killed outright, nothing of it sent."""
    run = RunDescription(
        key=f"{time.time_ns() // 1_000_000}-00000000",
        store_uri=store.uri,
        artifact_location=store.artifact_location,
        name="unet",
        parameters={},
        tags={},
        data_version="d" * 32,
        started_ms=time.time_ns() // 1_000_000,
    )
    journal = Journal.create(folder, run)
    for epoch in range(1, num_epochs + 1):
        journal.add_metrics({"val/dice": epoch / 10}, epoch, run.started_ms + epoch)
    return journal


def test_run_has_what_it_was_told(mlflow_store, client, folder, tmp_path):
    (tmp_path / "trained/inner").mkdir(parents=True)
    (tmp_path / "trained/weights.txt").write_text("w")
    (tmp_path / "trained/inner/notes.txt").write_text("n")
    parameters = {f"train.parameter{number}": number for number in range(150)}
    with start(mlflow_store, folder, parameters=parameters, tags={"git": "c"}) as run:
        run.log_metrics({"val/dice": 0.5, "val/slice_fpr/liver": math.nan}, step=1)
        run.log_metrics({"val/dice": 0.75}, step=2)
        run.log_picture(Figure(), "validation/epoch-0001.png")
        run.log_files(tmp_path / "trained", "trained")
        run.set_tag("note", "two\nlines")
    found = client.get_run(run.run_id)
    assert points(client, run.run_id, "val/dice") == [(1, 0.5), (2, 0.75)]
    assert "val/slice_fpr/liver" not in found.data.metrics
    assert len(found.data.params) == 150
    assert found.data.tags["git"] == "c"
    assert found.data.tags["note"] == "two\nlines"
    assert found.info.run_name == "unet"
    assert found.inputs.dataset_inputs[0].dataset.digest == "d" * 32
    listed = {
        item.path
        for path in ("validation", "trained", "trained/inner")
        for item in client.list_artifacts(run.run_id, path)
    }
    assert listed == {
        "validation/epoch-0001.png",
        "trained/weights.txt",
        "trained/inner",
        "trained/inner/notes.txt",
    }
    (journal,) = list_journals(folder)
    assert journal.is_sent()


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


def test_load_of_the_machine_is_logged_at_each_epoch(mlflow_store, client, folder):
    with start(mlflow_store, folder) as run:
        for epoch in (1, 2):
            run.log_metrics({"val/dice": 0.5}, step=epoch)
    for name in ("cpu_utilization_percentage", "system_memory_usage_megabytes"):
        steps = [step for step, _ in points(client, run.run_id, PREFIX + name)]
        assert steps == [1, 2]


def test_processor_load_is_measured_between_two_calls():
    with SystemMetrics() as system:
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass
        found = system.averages()
    assert 0 < found["system/cpu_utilization_percentage"] <= 100
    assert 0 < found["system/system_memory_usage_percentage"] < 100


def test_interrupted_run_goes_on_as_the_same_one(mlflow_store, client, folder):
    with (
        contextlib.suppress(KeyboardInterrupt),
        start(mlflow_store, folder, tags={"git": "a"}) as first,
    ):
        for epoch in (1, 2, 3):
            first.log_metrics({"val/dice": epoch / 10}, step=epoch)
        raise KeyboardInterrupt
    assert client.get_run(first.run_id).info.status == "KILLED"
    with start(mlflow_store, folder, tags={"git": "b"}, resume=True) as second:
        for epoch in (3, 4):
            second.log_metrics({"val/dice": epoch / 5}, step=epoch)
        second._sender.close(30)
        assert client.get_run(first.run_id).info.status == "RUNNING"
    assert second.run_id == first.run_id
    assert points(client, first.run_id, "val/dice") == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.8)]
    assert client.get_run(first.run_id).data.tags["git"] == "b"
    assert len(list_journals(folder)) == 1


def test_nothing_to_go_on_with_begins_a_run(mlflow_store, client, folder):
    with start(mlflow_store, folder, resume=True) as run:
        run.log_metrics({"val/dice": 0.5}, step=1)
    assert points(client, run.run_id, "val/dice") == [(1, 0.5)]


def test_fresh_start_is_another_run_and_clears_the_folder(mlflow_store, client, folder):
    ids = []
    for value in (0.25, 0.5):
        with start(mlflow_store, folder) as run:
            run.log_metrics({"val/dice": value}, step=1)
        ids.append(run.run_id)
    assert ids[0] != ids[1]
    assert [points(client, run_id, "val/dice") for run_id in ids] == [[(1, 0.25)], [(1, 0.5)]]
    assert [journal.run.run_id for journal in list_journals(folder)] == ids[1:]


def test_run_that_was_deleted_is_written_anew_with_all_values(mlflow_store, client, folder, capsys):
    with start(mlflow_store, folder) as first:
        first.log_metrics({"val/dice": 0.5}, step=1)
    client.delete_run(first.run_id)
    with start(mlflow_store, folder, resume=True) as second:
        second.log_metrics({"val/dice": 0.75}, step=2)
    assert second.run_id != first.run_id
    assert points(client, second.run_id, "val/dice") == [(1, 0.5), (2, 0.75)]
    assert f"no longer has run {first.run_id}; all its values are sent" in capsys.readouterr().err


def test_run_deleted_during_the_training_is_written_anew(mlflow_store, client, folder):
    with start(mlflow_store, folder) as run:
        run.log_metrics({"val/dice": 0.5}, step=1)
        first_id = run.run_id
        client.delete_run(first_id)
        run.log_metrics({"val/dice": 0.75}, step=2)
    assert run.run_id != first_id
    assert points(client, run.run_id, "val/dice") == [(1, 0.5), (2, 0.75)]


def test_training_that_goes_on_in_another_store_has_all_values_there(
    mlflow_store, empty_store, folder
):
    with start(mlflow_store, folder) as first:
        first.log_metrics({"val/dice": 0.5}, step=1)
    with start(empty_store, folder, resume=True) as second:
        second.log_metrics({"val/dice": 0.75}, step=2)
    other = mlflow.MlflowClient(empty_store.uri)
    assert points(other, second.run_id, "val/dice") == [(1, 0.5), (2, 0.75)]
    assert other.get_run(second.run_id).info.status == "FINISHED"


def test_sending_twice_stores_once(mlflow_store, client, folder):
    with start(mlflow_store, folder) as run:
        for epoch in (1, 2):
            run.log_metrics({"val/dice": 0.1 + epoch / 3, "train/total": -0.0}, step=epoch)
    (journal,) = list_journals(folder)
    journal.mark_sent(0)
    send_leftovers(mlflow_store, folder)
    for key in ("val/dice", "train/total", "system/cpu_utilization_percentage"):
        assert [step for step, _ in points(client, run.run_id, key)] == [1, 2]
    assert client.get_run(run.run_id).info.status == "FINISHED"


def test_leftovers_of_a_killed_training_are_sent_and_its_run_ends(
    mlflow_store, client, folder, capsys
):
    killed = kill_after(mlflow_store, folder, 3)
    send_leftovers(mlflow_store, folder)
    (journal,) = list_journals(folder)
    run_id = journal.run.run_id
    assert points(client, run_id, "val/dice") == [(1, 0.1), (2, 0.2), (3, 0.3)]
    info = client.get_run(run_id).info
    assert (info.status, info.end_time) == ("KILLED", killed.rows[-1].timestamp_ms)
    assert f"now has the 3 values of run {run_id}" in capsys.readouterr().err
    send_leftovers(mlflow_store, folder)
    assert capsys.readouterr().err == ""
    with start(mlflow_store, folder, resume=True) as run:
        pass
    assert run.run_id == run_id


def test_run_started_but_not_written_down_is_found_again(mlflow_store, client, folder):
    """A kill between the start of the run in the store and the note of its id on disk."""
    kill_after(mlflow_store, folder, 1)
    send_leftovers(mlflow_store, folder)
    (journal,) = list_journals(folder)
    run_id = journal.run.run_id
    journal.describe(replace(journal.run, run_id=None))
    send_leftovers(mlflow_store, folder)
    assert list_journals(folder)[0].run.run_id == run_id
    assert points(client, run_id, "val/dice") == [(1, 0.1)]


def test_fresh_start_sends_what_an_earlier_training_left(mlflow_store, client, folder, capsys):
    key = kill_after(mlflow_store, folder, 2).run.key
    with start(mlflow_store, folder):
        pass
    experiment = client.get_experiment_by_name(tracking_store.EXPERIMENT).experiment_id
    (earlier,) = client.search_runs([experiment], f"tags.`fullscale.journal` = '{key}'")
    assert points(client, earlier.info.run_id, "val/dice") == [(1, 0.1), (2, 0.2)]
    assert "now has the 2 values" in capsys.readouterr().err
    assert len(list_journals(folder)) == 1


def test_leftovers_for_a_dead_server_stay_beside_a_new_run(mlflow_store, client, folder, capsys):
    key = kill_after(DEAD, folder, 2).run.key
    with start(mlflow_store, folder) as run:
        run.log_metrics({"val/dice": 0.5}, step=1)
    assert points(client, run.run_id, "val/dice") == [(1, 0.5)]
    kept, _ = list_journals(folder)
    assert kept.run.key == key
    assert len(kept.unsent_rows()) == 3
    assert f"2 values and 0 files for MLflow at {DEAD.uri} are kept in" in capsys.readouterr().err
    send_leftovers(mlflow_store, folder)
    told = capsys.readouterr().err
    assert f"was tracked at {DEAD.uri}, not at {mlflow_store.uri}" in told


def test_leftovers_of_a_folder_that_is_not_there_are_none(mlflow_store, folder):
    send_leftovers(mlflow_store, folder)
    assert not folder.exists()


def test_files_that_changed_or_went_are_left_out_and_named(
    mlflow_store, client, folder, tmp_path, capsys
):
    journal = kill_after(mlflow_store, folder, 1)
    trained = tmp_path / "trained"
    trained.mkdir()
    for name in ("kept", "changed", "gone"):
        (trained / name).write_text("before")
    journal.outbox.add_files(trained, "trained")
    (trained / "changed").write_text("after")
    (trained / "gone").unlink()
    send_leftovers(mlflow_store, folder)
    (journal,) = list_journals(folder)
    listed = [item.path for item in client.list_artifacts(journal.run.run_id, "trained")]
    assert listed == ["trained/kept"]
    told = capsys.readouterr().err
    for name in ("changed", "gone"):
        assert f"{trained / name} changed or went before MLflow could have it" in told
    assert journal.is_sent()


def test_value_that_mlflow_refuses_is_left_out_and_named(mlflow_store, client, folder, capsys):
    with start(mlflow_store, folder) as run:
        run.log_metrics({"val/dice/liver?": 0.5, "val/dice": 0.25}, step=1)
        run.log_metrics({"val/dice": 0.75}, step=2)
    assert points(client, run.run_id, "val/dice") == [(1, 0.25), (2, 0.75)]
    told = capsys.readouterr().err
    assert told.count("MLflow refuses metric val/dice/liver?") == 1
    assert client.get_run(run.run_id).info.status == "FINISHED"


def test_more_values_than_one_request_takes_arrive(mlflow_store, client, folder):
    with start(mlflow_store, folder) as run:
        run.log_metrics({f"value{number}": number for number in range(2500)}, step=1)
    found = client.get_run(run.run_id).data.metrics
    assert {key: found[key] for key in ("value0", "value1000", "value2499")} == {
        "value0": 0,
        "value1000": 1000,
        "value2499": 2499,
    }


def test_folder_in_use_is_named(mlflow_store, folder, capsys):
    with hold(folder):
        with pytest.raises(StageError, match=r"another process tracks a training in .*wait"):
            start(mlflow_store, folder).__enter__()
        send_leftovers(mlflow_store, folder)
    assert f"a training is using {folder}" in capsys.readouterr().err


def test_new_run_on_a_dead_server_fails_and_leaves_nothing(folder):
    with pytest.raises(StageError, match=r"9 does not answer .*start the server, or unset"):
        start(DEAD, folder).__enter__()
    assert list_journals(folder) == []
    with hold(folder):
        pass


def test_known_run_goes_on_without_its_server(folder, capsys, monkeypatch):
    monkeypatch.setattr(runs, "DRAIN_TIMEOUT_S", 0.5)
    killed = kill_after(DEAD, folder, 2)
    killed.describe(replace(killed.run, run_id="known"))
    begin_s = time.monotonic()
    with start(DEAD, folder, resume=True) as run:
        assert run.run_id == "known"
        for epoch in (2, 3):
            run.log_metrics({"val/dice": 0.5}, step=epoch)
        run.log_picture(Figure(), "curves.png")
        assert time.monotonic() - begin_s < 5
    (journal,) = list_journals(folder)
    kept = [(row.step, row.value) for row in journal.rows if row.key == "val/dice"]
    assert kept == [(1, "0.1"), (2, "0.2"), (3, "0.5")]
    assert journal.status == "FINISHED"
    told = capsys.readouterr().err
    assert told.count("does not answer") == 1
    assert "Connection refused" in told
    assert f"training goes on, metrics are kept in {journal.path} and sent when" in told
    assert "values and 1 files for MLflow" in told
    assert f"kept in {journal.folder}; the next training or registration sends them" in told


def test_requests_end_soon_unless_the_user_says_otherwise(mlflow_store, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    tracking_store.connect(mlflow_store)
    from mlflow.environment_variables import (
        MLFLOW_HTTP_REQUEST_MAX_RETRIES,
        MLFLOW_HTTP_REQUEST_TIMEOUT,
    )

    assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() == 77
    assert MLFLOW_HTTP_REQUEST_MAX_RETRIES.get() == 1


def test_other_programs_are_told_of_a_store_only_while_it_is_spoken_to(mlflow_store, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracking_store.connect(mlflow_store)
    assert "MLFLOW_TRACKING_URI" not in os.environ
    with spoken_to(mlflow_store):
        assert os.environ["MLFLOW_TRACKING_URI"] == mlflow.get_tracking_uri() == mlflow_store.uri
        with spoken_to(DEAD):
            assert mlflow.get_tracking_uri() == DEAD.uri
        assert mlflow.get_tracking_uri() == mlflow_store.uri
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_deleted_experiment_is_named_with_the_cure(tmp_path):
    store = Store(f"sqlite:///{tmp_path / 'mlflow.db'}", (tmp_path / "artifacts").as_uri())
    client, experiment_id = tracking_store.connect(store)
    client.delete_experiment(experiment_id)
    with pytest.raises(StageError, match=r"experiment fullscale is deleted: restore it"):
        tracking_store.connect(store)
    client.restore_experiment(experiment_id)
    assert tracking_store.connect(store)[1] == experiment_id
