"""A model is promoted in MLflow's UI by clicking, in a real browser, and is used from then on."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest
from bodies import make_body, save_nifti
from browser import find_browser
from cohorts import SPACING_MM, write_nnunet
from mlflow_server import Server
from playwright.sync_api import Page, expect, sync_playwright
from prefect.artifacts import Artifact
from project import Project, clone_project
from quick_project import set_seeds
from random_network import random_trained

from flows.promote_check import ARTIFACT_KEY, promote_check
from fullscale.evaluation.summary import evaluate_network, picture_cases, summarise
from fullscale.ingestion.ingest import ingest
from fullscale.params import Params, load_params
from fullscale.prediction.network_files import WEIGHTS_NAME, save_trained
from fullscale.reporting.model_card import PICTURES
from fullscale.runtime.files import file_sha256
from fullscale.scans.cohort import Cohort, read_cohort
from fullscale.tracking.run_record import RunDescription, RunRecord
from fullscale.tracking.store import connect
from fullscale.tracking.sync import sync_run
from fullscale.training.history import write_history
from fullscale.versioning.provenance import digest_test_set, read_provenance
from fullscale.workspace import open_workspace
from tasks.evaluate import draw_case
from tasks.register import decide, record_verdict, register

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

MODEL = "fullscale-organs"
PATIENCE_MS = 60_000


class Registered(NamedTuple):
    """A project and the weights of the versions that it registered."""

    project: Project
    weights_sha256: dict[str, str]


def add_network(root: Path, name: str, params: Params, cohort: Cohort, seed: int, dice: float):
    """A network, its scores and its pictures, as stages train and evaluate leave them.

    The scores are made up, or the gate would not let a network pass that learned nothing.
    """
    trained = random_trained(params, name, seed=seed)
    folder = root / "artifacts/train" / name / "0"
    save_trained(folder, trained.network, trained.description)
    write_history(folder / "history.csv", [{"epoch": 1, "val/dice": 0.25}])
    cases = {case.name: case for case in cohort.cases}
    predictor, scores = evaluate_network(trained, cohort, sorted(cases), params.evaluate)
    scores = scores.assign(dice=dice, num_false_positive_slices=0)
    reports = root / "reports" / name
    scores.to_csv(reports / "cases.csv", index=False)
    summary = {
        "test_set": digest_test_set(cohort.cases),
        "seeds": [0],
        "members": [0],
        **summarise(scores, tuple(params.organs), params.register_),
    }
    (reports / "summary.json").write_text(json.dumps(summary))
    for rank, case in picture_cases(scores).items():
        draw_case(predictor, cases[case], cohort, rank, reports / f"{rank}.png")


@pytest.fixture(scope="module")
def server(store_template, tmp_path_factory) -> Iterator[Server]:
    server = Server(shutil.copytree(store_template, tmp_path_factory.mktemp("server") / "mlflow"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def registered(tmp_path_factory, server) -> Registered:
    """Two versions that passed the gate; the first one is the champion."""
    folder = tmp_path_factory.mktemp("promotion")
    project = clone_project(folder / "project", with_sample=False)
    project.environment["MLFLOW_TRACKING_URI"] = server.uri
    set_seeds(project, [0])
    project.change_params("slice", size_px=32, pixel_mm=12)
    project.change_params("train", width=4)
    project.change_params("register", num_bootstrap=200, min_patients=2, confidence=0.7)
    project.run("git", "commit", "--all", "--quiet", "--message", "Smaller")
    root, params = project.root, load_params(project.root / "params.yaml")
    ingest(write_nnunet(folder / "source", 3), root / "data")
    cohort = read_cohort(root / "data")
    add_network(root, "unet", params, cohort, seed=0, dice=0.8)
    weights_sha256 = {}
    for seed in (1, 2):
        add_network(root, "unet3plus", params, cohort, seed=seed, dice=0.9)
        workspace = open_workspace(root)
        verdict = decide(params, workspace, server.store)
        provenance = read_provenance(root)
        content = record_verdict(verdict, params, workspace, provenance.data_version)
        version = register(params, workspace, server.store, content, provenance)
        assert version == str(seed)
        weights_sha256[version] = file_sha256(root / "artifacts/train/unet3plus/0" / WEIGHTS_NAME)
    return Registered(project, weights_sha256)


@contextmanager
def open_models(uri: str) -> Iterator[Page]:
    """MLflow's page of registered models, in a browser that reaches no other server."""
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_browser(), args=["--no-sandbox"], timeout=PATIENCE_MS
        )
        page = browser.new_page()
        page.set_default_timeout(PATIENCE_MS)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        news = page.get_by_role("dialog", name=re.compile("new Model Registry UI"))
        close = news.get_by_role("button", name="Close")
        page.add_locator_handler(news, lambda: close.click())
        page.goto(f"{uri}/#/models")
        yield page
        browser.close()
    hosts = {urlsplit(url).netloc for url in asked if not url.startswith("data:")}
    assert hosts == {urlsplit(uri).netloc}


def open_version(page: Page, version: str) -> None:
    """Go from the list of models to a version, by its links."""
    page.get_by_role("link", name=MODEL, exact=True).click()
    expect(page.get_by_text("To promote a version, open it and add champion")).to_be_visible()
    page.get_by_role("link", name=f"Version {version}", exact=True).click()
    expect(page.get_by_role("heading", name=f"Version {version}", exact=True)).to_be_visible()


def make_champion(page: Page, before: str, button: str) -> None:
    """Move the alias to the version whose page is open, as a person would.

    Args:
        page: in the browser.
        before: the version that has the alias.
        button: what stands beside the aliases; a version without any has "Add", as tags do below.
    """
    page.get_by_role("main").get_by_role("button", name=button, exact=True).first.click()
    dialog = page.get_by_role("dialog", name=re.compile("alias for model version"))
    dialog.get_by_role("combobox").fill("champion")
    dialog.get_by_role("combobox").press("Enter")
    warning = f"Adding it to this version will remove it from version {before}."
    expect(dialog.get_by_role("alert")).to_contain_text(warning)
    dialog.get_by_role("button", name="Save aliases").click()
    expect(dialog).to_be_hidden()
    expect(page.get_by_role("main").get_by_role("status", name="champion")).to_be_visible()


def check_page(page: Page, content: dict, git_commit: str) -> None:
    """The version's page shows its verdict, the scores of three networks, and its pictures."""
    main = page.get_by_role("main")
    expect(main.get_by_role("heading", name="PASS: the candidate may be promoted")).to_be_visible()
    for criterion in content["criteria"]:
        row = main.get_by_role("row").filter(
            has=page.get_by_role("cell", name=criterion["found"], exact=True)
        )
        expect(row.get_by_role("cell", name=criterion["wanted"], exact=True)).to_be_visible()
    scores = main.get_by_role("table").filter(
        has=page.get_by_role("columnheader", name="Dice, champion then", exact=True)
    )
    champions = content["champion"]["scores"]
    for organ in ("liver", "spleen"):
        row = scores.get_by_role("row").filter(has=page.get_by_role("cell", name=organ, exact=True))
        expect(row).to_contain_text("0.9000 (n = 3)")
        expect(row).to_contain_text("0.8000 (n = 3)")
        expect(row).to_contain_text(f"{champions[f'test/dice/{organ}']:.4f} (n = 3)")
    expect(main.get_by_text(f"git checkout {git_commit}")).to_be_visible()
    pictures = main.locator("img[src^='get-artifact']")
    expect(pictures).to_have_count(len(PICTURES))
    for picture in pictures.all():
        picture.scroll_into_view_if_needed()
        expect(picture).to_have_js_property("complete", True)
        assert picture.evaluate("picture => picture.naturalWidth") == 1000


def predict(project: Project, folder: Path) -> dict:
    """The model that a scan is segmented with, as the command's statistics name it."""
    scan = folder / "scan.nii.gz"
    save_nifti(scan, make_body(seed=7)[0], SPACING_MM)
    project.run(
        *(sys.executable, "-m", "tasks.cli", "predict", str(scan), str(folder / "mask.nii.gz")),
        *("--statistics", str(folder / "statistics.json"), "--device", "cpu"),
    )
    return json.loads((folder / "statistics.json").read_text())["model"]


@pytest.mark.parametrize(
    ("metrics", "first"),
    [
        (("time/training_s", "train/total", "val/dice"), ("train", "total")),
        (("time/training_s", "train/total", "val/dice", "test/dice"), ("test", "dice")),
    ],
)
def test_first_chart_of_a_run_is_what_people_look_for(server, tmp_path, metrics, first):
    """Losses as long as it trains, then test Dice; system metrics have a page of their own."""
    record = RunRecord.create(tmp_path, RunDescription(server.uri, None, "run", {}, {}, "scans"))
    record.log_metrics(dict.fromkeys(metrics, 0.5), 1)
    sync_run(record)
    _, experiment_id = connect(server.store)
    with open_models(server.uri) as page:
        page.goto(f"{server.uri}/#/experiments/{experiment_id}/runs/{record.run_id}/model-metrics")
        expect(page.get_by_text(first[1], exact=True).first).to_be_visible()
        lines = page.get_by_role("main").inner_text().splitlines()
    names = {part for metric in metrics for part in metric.split("/")}
    shown = [line for line in lines if line in names]
    assert tuple(shown[:2]) == first


def test_person_promotes_and_rolls_back_in_the_ui(
    registered, server, prefect, tmp_path, monkeypatch, caplog
):
    project, weights_sha256 = registered
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)

    def check_champion(version: str) -> None:
        used = predict(project, tmp_path)
        assert (used["name"], used["version"]) == (MODEL, version)
        assert used["weights_sha256"] == weights_sha256[version]
        assert promote_check(project.root) == version
        shown = Artifact.get(ARTIFACT_KEY)
        assert f"{MODEL} version {version} is champion" in shown.data

    check_champion("1")
    with open_models(server.uri) as page:
        open_version(page, "2")
        content = json.loads((project.root / "reports/gate.json").read_text())
        check_page(page, content, read_provenance(project.root).git_commit)
        make_champion(page, before="1", button="Edit aliases")
    check_champion("2")
    assert "champion moved from version 1 to 2" in caplog.text

    with open_models(server.uri) as page:
        open_version(page, "1")
        make_champion(page, before="2", button="Add")
    check_champion("1")
    assert "champion moved from version 2 to 1" in caplog.text
