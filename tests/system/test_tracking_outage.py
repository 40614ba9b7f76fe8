"""A real MLflow server that goes away, comes back, hangs or loses its runs during a training."""

import contextlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from matplotlib.figure import Figure
from mlflow_server import Server
from project import ROOT

from fullscale.runtime.errors import StageError
from fullscale.tracking import runs
from fullscale.tracking.run_record import RunDescription, list_records
from fullscale.tracking.runs import send_leftovers, training_run

pytestmark = pytest.mark.slow

# A training that logs an epoch every 50 ms until it is killed.
TRAINING = """
import sys, time
from pathlib import Path
from fullscale.tracking.run_record import RunDescription
from fullscale.tracking.runs import training_run
description = RunDescription(sys.argv[1], None, "unet", {}, {}, "d" * 32)
with training_run(description, Path(sys.argv[2])) as run:
    for epoch in range(1, 10000):
        run.log_metrics({"val/dice": epoch / 7}, step=epoch)
        print(run.run_id, epoch, flush=True)
        time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def running(store_template, tmp_path_factory):
    server = Server(shutil.copytree(store_template, tmp_path_factory.mktemp("server") / "mlflow"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def server(running):
    """The module's server, up."""
    if not running.answers():
        running.start()
    return running


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "tracking"


def start(server, folder, resume=False):
    description = RunDescription(server.uri, None, "unet", {"width": 4}, {}, "d" * 32)
    return training_run(description, folder, resume=resume)


def sync_threads():
    """Threads that send what a training logs."""
    return {each for each in threading.enumerate() if each.name == "mlflow-sync"}


def history(server, run_id, key="val/dice"):
    """Step and value of every point, by the time it was logged at."""
    points = server.client.get_metric_history(run_id, key)
    points.sort(key=lambda point: point.timestamp)
    return [(point.step, point.value) for point in points]


def expected(num_epochs):
    return [(epoch, epoch / 7) for epoch in range(1, num_epochs + 1)]


def log_epochs(run, first, last):
    """Log some epochs; returns the seconds that the slowest call took."""
    slowest_s = 0.0
    for epoch in range(first, last + 1):
        begin_s = time.monotonic()
        run.log_metrics({"val/dice": epoch / 7}, step=epoch)
        slowest_s = max(slowest_s, time.monotonic() - begin_s)
        time.sleep(0.02)
    return slowest_s


def test_server_killed_and_started_again_during_a_training(server, folder, tmp_path, capfd, caplog):
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained/weights").write_bytes(b"w" * 100_000)
    with start(server, folder) as run:
        log_epochs(run, 1, 30)
        server.kill()
        slowest_s = log_epochs(run, 31, 60)
        run.log_picture(Figure(), "validation/epoch-0060.png")
        run.set_tag("said", "during the outage")
        server.start()
        slowest_s = max(slowest_s, log_epochs(run, 61, 90))
        run.log_files(tmp_path / "trained", "trained")
    assert slowest_s < 1
    assert history(server, run.run_id) == expected(90)
    assert len(history(server, run.run_id, "system/cpu_utilization_percentage")) == 90
    found = server.client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.tags["said"] == "during the outage"
    for path in ("validation/epoch-0060.png", "trained/weights"):
        listed = server.client.list_artifacts(run.run_id, path.split("/")[0])
        assert [item.path for item in listed] == [path]
    told = capfd.readouterr().err.splitlines()
    (gone,) = [line for line in told if "does not answer" in line]
    (back,) = [line for line in told if "is back;" in line]
    assert gone.startswith(f"MLflow at {server.uri} does not answer (")
    assert f"metrics are kept in {list_records(folder)[0].path} and sent when" in gone
    assert int(back.split("; ")[1].split()[0]) >= 30
    assert not [record for record in caplog.records if record.name.startswith("urllib3")]


def test_server_that_hangs_to_the_end_gets_the_rest_at_the_next_registration(
    server, folder, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(runs, "CLOSING_TIMEOUT_S", 1.0)
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained/weights").write_bytes(b"w")
    others = set(threading.enumerate())
    with contextlib.ExitStack() as outage:
        with start(server, folder) as run:
            (sender,) = sync_threads() - others
            log_epochs(run, 1, 20)
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
            outage.enter_context(server.hanging())
            slowest_s = log_epochs(run, 21, 40)
            run.log_picture(Figure(), "curves.png")
            run.log_files(tmp_path / "trained", "trained")
            begin_s = time.monotonic()
        assert time.monotonic() - begin_s < 5
        (record,) = list_records(folder)
        told = capfd.readouterr().err
        assert f"kept in {record.folder}; the next training or registration sends" in told
        send_leftovers(folder)
        told = capfd.readouterr().err
        assert "does not answer" in told
        assert "2 files for MLflow" in told
        with pytest.raises(StageError, match="does not answer"):
            start(server, folder.with_name("other")).__enter__()
        written = {path: path.read_bytes() for path in record.folder.glob("*.json")}
    assert slowest_s < 1
    sender.join(60)  # what it asked is answered now
    assert not sender.is_alive()
    assert {path: path.read_bytes() for path in record.folder.glob("*.json")} == written
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT")
    for _ in range(2):
        send_leftovers(folder)
    assert history(server, run.run_id) == expected(40)
    info = server.client.get_run(run.run_id).info
    assert (info.status, info.end_time) == ("FINISHED", record.run.ended_ms)
    listed = [item.path for item in server.client.list_artifacts(run.run_id)]
    assert listed == ["curves.png", "trained"]
    assert capfd.readouterr().err.count("now has the") == 1


def test_training_killed_outright_goes_on_as_the_same_run(server, folder, monkeypatch):
    num_runs = server.num_runs()
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINING, server.uri, str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in trainer.stdout:
        run_id, epoch = line.split()
        if int(epoch) == 40:
            break
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    (record,) = list_records(folder)
    last = record.rows[-1].step
    assert last >= 40
    record.mark_sent(
        num_rows=-min(100, record.sent.num_rows)
    )  # as if the kill came before it was noted
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with contextlib.ExitStack() as outage:
        outage.enter_context(server.hanging())
        with start(server, folder, resume=True) as run:
            log_epochs(run, last - 10, last + 20)
            outage.close()
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT")
    assert run.run_id == run_id
    assert history(server, run_id) == expected(last + 20)
    assert server.client.get_run(run_id).info.status == "FINISHED"
    assert server.num_runs() == num_runs + 1


def test_server_that_comes_back_empty_gets_a_run_with_all_values(
    server, folder, capfd, monkeypatch
):
    """Interrupted without its server, and resumed before it is back."""
    monkeypatch.setattr(runs, "INTERRUPTED_CLOSING_TIMEOUT_S", 0.2)
    with contextlib.suppress(SystemExit), start(server, folder) as first:
        log_epochs(first, 1, 10)
        server.kill()
        raise SystemExit(143)
    first_id = first.run_id
    with start(server, folder, resume=True) as second:
        assert second.run_id == first_id
        log_epochs(second, 8, 20)
        server.start(database="empty.db")
        log_epochs(second, 21, 30)
    assert second.run_id != first_id
    assert history(server, second.run_id) == expected(30)
    found = server.client.get_run(second.run_id)
    assert found.data.params == {"width": "4"}
    assert found.info.status == "FINISHED"
    assert server.num_runs() == 1
    assert f"no longer has run {first_id}; all its values are sent" in capfd.readouterr().err
