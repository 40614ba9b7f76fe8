from __future__ import annotations

from fullscale.tracking.pages import models_url, version_url
from fullscale.tracking.store import Store

SERVER = Store("http://user:secret@127.0.0.1:5000/")


def test_pages_of_models_open_without_credentials_and_in_the_mode_for_training() -> None:
    assert version_url(SERVER, "organs", "3") == (
        "http://127.0.0.1:5000/#/models/organs/versions/3?workflowType=machine_learning"
    )
    assert models_url(SERVER.uri) == (
        "http://127.0.0.1:5000/#/models?workflowType=machine_learning"
    )


def test_store_without_a_server_has_no_pages() -> None:
    store = Store("sqlite:////project/mlruns/mlflow.db")
    assert version_url(store, "organs", "3") is None
    assert models_url(store.uri) == store.uri
