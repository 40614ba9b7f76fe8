import os
import subprocess
import sys

import mlflow
import pytest
from project import ROOT

from fullscale.runtime.errors import StageError, TransientStageError
from fullscale.tracking import store as tracking_store
from fullscale.tracking.errors import translate_mlflow_errors
from fullscale.tracking.store import Store, use_tracking_uri

DEAD = Store("http://127.0.0.1:9")


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


def test_child_processes_get_the_address_only_while_the_store_is_used(mlflow_store, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracking_store.connect(mlflow_store)
    assert "MLFLOW_TRACKING_URI" not in os.environ
    with use_tracking_uri(mlflow_store):
        assert os.environ["MLFLOW_TRACKING_URI"] == mlflow.get_tracking_uri() == mlflow_store.uri
        with use_tracking_uri(DEAD):
            assert mlflow.get_tracking_uri() == DEAD.uri
        assert mlflow.get_tracking_uri() == mlflow_store.uri
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_child_processes_get_the_address_also_where_mlflow_remembers_it(mlflow_store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD.uri)
    mlflow.set_tracking_uri(mlflow_store.uri)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with use_tracking_uri(mlflow_store):
        assert os.environ["MLFLOW_TRACKING_URI"] == mlflow_store.uri
    assert "MLFLOW_TRACKING_URI" not in os.environ


# All that takes long is imported before both begin, so that they meet at the tables.
FIRST_START = """
import sys, time
from pathlib import Path
import mlflow.store.tracking.sqlalchemy_store
from fullscale.tracking.store import connect, sqlite_store
(Path(sys.argv[1]) / sys.argv[2]).touch()
while len(list(Path(sys.argv[1]).glob("ready-*"))) < 2:
    time.sleep(0.001)
print(connect(sqlite_store(Path(sys.argv[1]) / "mlflow.db"))[1])
"""


@pytest.mark.slow
def test_two_first_starts_make_one_database(tmp_path):
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", FIRST_START, str(tmp_path), f"ready-{number}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    told = [start.communicate(timeout=120) for start in starts]
    assert [start.returncode for start in starts] == [0, 0], told
    assert {out.strip() for out, _ in told} == {"1"}


def test_deleted_experiment_is_named_with_the_cure(empty_store):
    store = empty_store
    client, experiment_id = tracking_store.connect(store)
    client.delete_experiment(experiment_id)
    with pytest.raises(StageError, match=r"experiment fullscale is deleted: restore it"):
        tracking_store.connect(store)
    client.restore_experiment(experiment_id)
    assert tracking_store.connect(store)[1] == experiment_id


@pytest.mark.parametrize("error", [OSError("disk full"), mlflow.MlflowException("no route")])
def test_every_failure_on_the_way_to_a_store_is_transient(error):
    with (
        pytest.raises(TransientStageError, match=rf"9 does not answer \(.*{error}\); start the"),
        translate_mlflow_errors(DEAD.uri),
    ):
        raise error
