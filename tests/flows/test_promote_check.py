from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from prefect.artifacts import Artifact
from prefect.variables import Variable

from flows import promote_check as module
from flows.promote_check import promote_check
from fullscale.tracking.errors import UnreachableError
from fullscale.tracking.pages import run_url
from fullscale.tracking.registry import CHAMPION, find_alias, list_champions
from fullscale.tracking.store import Store, connect, default_store

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect")]
ROOT = Path(__file__).parents[2]
MODEL = "fullscale-organs"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Parameters and an empty registry; no champion was ever seen."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("FULLSCALE_NOTIFY", raising=False)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    connect(default_store(tmp_path))
    yield tmp_path
    Variable.unset(module.VARIABLE)


def register(project: Path, verdict: str) -> str:
    client = mlflow.MlflowClient(default_store(project).uri)
    if not client.search_registered_models(f"name = '{MODEL}'"):
        client.create_registered_model(MODEL)
    version = client.create_model_version(MODEL, (project / "model").as_uri())
    client.set_model_version_tag(MODEL, version.version, "fullscale.verdict", verdict)
    return str(version.version)


def promote(project: Path, version: str) -> None:
    client = mlflow.MlflowClient(default_store(project).uri)
    client.set_registered_model_alias(MODEL, "champion", version)


def shown() -> str:
    found = Artifact.get(module.ARTIFACT_KEY)
    assert found is not None
    return str(found.data)


def test_moved_alias_is_told_once_and_shown(project: Path, caplog) -> None:
    assert promote_check(project) == "none"
    assert f"No version of {MODEL} is champion" in shown()
    first = register(project, "pass")
    assert promote_check(project) == "none"
    promote(project, first)
    assert promote_check(project) == "1"
    assert "champion moved from version none to 1" in caplog.text
    assert f"{MODEL} version 1 is champion, seen since 20" in shown()
    assert "- fullscale.verdict: pass" in shown()

    promote(project, register(project, "by hand"))
    assert promote_check(project) == "2"
    assert "champion moved from version 1 to 2" in caplog.text
    client = mlflow.MlflowClient(default_store(project).uri)
    assert list_champions(client.get_registered_model(MODEL).tags) == ["1", "2"]
    caplog.clear()
    before = Artifact.get(module.ARTIFACT_KEY)
    assert promote_check(project) == "2"
    assert "moved" not in caplog.text
    assert Artifact.get(module.ARTIFACT_KEY).id == before.id


def test_first_look_takes_note_and_tells_of_no_move(project: Path, caplog) -> None:
    promote(project, register(project, "pass"))
    assert promote_check(project) == "1"
    assert f"{MODEL}: champion is 1" in caplog.text
    assert "moved" not in caplog.text
    assert Variable.get(module.VARIABLE)["version"] == "1"


def test_champion_of_another_model_is_not_compared(project: Path, caplog) -> None:
    Variable.set(
        module.VARIABLE,
        {"model_name": "other", "version": "7", "since": "2026-01-01T00:00:00+00:00"},
        overwrite=True,
    )
    assert promote_check(project) == "none"
    assert "moved" not in caplog.text


def test_registry_that_is_away_is_asked_again_then_fails(
    project: Path, caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(module, "RETRY_DELAYS_S", [0.1, 0.1])
    with pytest.raises(UnreachableError, match=r"http://127.0.0.1:9 does not answer"):
        promote_check(project)
    assert "Retry 2/2 will start" in caplog.text
    assert Variable.get(module.VARIABLE) is None


def test_champion_carries_the_tags_of_its_version(project: Path) -> None:
    store = default_store(project)
    assert find_alias(store, MODEL, CHAMPION) is None
    promote(project, register(project, "pass"))
    found = find_alias(store, MODEL, CHAMPION)
    assert found is not None
    assert (found.version, found.tags["fullscale.verdict"]) == ("1", "pass")


def test_run_has_a_page_only_on_a_server(project: Path) -> None:
    assert run_url(default_store(project), "0123") is None
    with pytest.raises(UnreachableError, match="does not answer"):
        run_url(Store("http://user:secret@127.0.0.1:9"), "0123")
