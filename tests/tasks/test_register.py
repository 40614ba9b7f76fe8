import base64
import gzip
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace

import mlflow
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from project import ROOT
from random_network import random_trained

from fullscale.evaluation.score_files import (
    read_scores,
    read_verdict,
    write_scores,
    write_summary,
)
from fullscale.evaluation.summary import evaluate_network, summarise
from fullscale.prediction.network_files import (
    WEIGHTS_NAME,
    Trained,
    build,
    describe_network,
    digest_weights,
    load_members,
    load_trained,
    save_trained,
)
from fullscale.prediction.segmentation import Model
from fullscale.reporting.model_card import make_model_page
from fullscale.reporting.results import read_results
from fullscale.reporting.text_summary import (
    classifier_lines,
    make_table,
    out_of_fold_lines,
    registry_line,
    score_rows,
    verdict_lines,
)
from fullscale.runtime.errors import StageError
from fullscale.runtime.files import file_sha256
from fullscale.tracking import store as tracking_store
from fullscale.tracking.registry import (
    CHALLENGER,
    CHAMPION,
    count_judged,
    find_alias,
    find_training_run,
)
from fullscale.tracking.run_record import RunDescription, RunRecord
from fullscale.tracking.runs import training_run
from fullscale.tracking.store import WEIGHTS_TAG, use_tracking_uri
from fullscale.training.history import write_history
from fullscale.versioning.provenance import Provenance, digest_test_set
from fullscale.workspace import open_workspace
from tasks.commands.score import CohortScores, publish
from tasks.register import (
    LIBRARIES,
    PACKAGES,
    decide,
    ensure_run,
    record_verdict,
    register,
    score_champion,
)

PROVENANCE = Provenance(git_commit="c" * 40, data_version="d" * 32 + ".dir")
TEST_CASES = ["case_00", "case_01", "case_06"]


def add_network(root, name, params, cohort, seed, dice):
    """A trained network with score tables, as stages train and evaluate leave them."""
    torch.manual_seed(seed)
    description = describe_network(name, params)
    network = build(description)
    folder = root / "artifacts/train" / name / "0"
    save_trained(folder, network, description)
    write_history(folder / "history.csv", [{"epoch": 1, "val/dice": 0.25}])
    trained = Trained(network.eval(), description)
    _, scores = evaluate_network(trained, cohort, TEST_CASES, params.evaluate)
    scores = scores.assign(dice=dice, num_false_positive_slices=0)
    reports = root / "reports" / name
    reports.mkdir(parents=True)
    scores.to_csv(reports / "cases.csv", index=False)
    test_set = digest_test_set(case for case in cohort.cases if case.name in TEST_CASES)
    metrics = summarise(scores, tuple(params.organs))
    summary = {"test_set": test_set, "seeds": [0], "members": [0], **metrics}
    (reports / "summary.json").write_text(json.dumps(summary))


@pytest.fixture(scope="module")
def project_template(tmp_path_factory, tiny_params, tiny_cohort, tiny_data):
    """A project whose UNet 3+ is said to score 0.9 and whose UNet 0.8; for copying alone."""
    root = tmp_path_factory.mktemp("register") / "project"
    add_network(root, "unet3plus", tiny_params, tiny_cohort, seed=0, dice=0.9)
    add_network(root, "unet", tiny_params, tiny_cohort, seed=1, dice=0.8)
    shutil.copytree(tiny_data, root / "data")
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    return root


@pytest.fixture
def project(project_template, tmp_path):
    """A copy of that project for one test."""
    return shutil.copytree(project_template, tmp_path / "project")


def run_stage(project, params, store):
    workspace = open_workspace(project)
    verdict = decide(params, workspace, store)
    content = record_verdict(verdict, params, workspace, PROVENANCE.data_version)
    return content, register(params, workspace, store, content, PROVENANCE)


def rescale(project, name, dice):
    path = project / "reports" / name / "cases.csv"
    pd.read_csv(path).assign(dice=dice).to_csv(path, index=False)


@pytest.mark.slow
def test_pass_registers_first_version_with_both_aliases(project, tiny_params, empty_store):
    content, version = run_stage(project, tiny_params, empty_store)
    assert content["status"] == "pass"
    assert version == "1"
    name = tiny_params.register_.model_name
    for alias in (CHALLENGER, CHAMPION):
        assert int(find_alias(empty_store, name, alias).version) == 1
    tags = find_alias(empty_store, name, CHAMPION).tags
    weights = file_sha256(project / "artifacts/train/unet3plus/0" / WEIGHTS_NAME)
    assert tags[WEIGHTS_TAG] == weights == content["weights_sha256"]
    assert tags["fullscale.data_version"] == PROVENANCE.data_version
    assert tags["fullscale.git_commit"] == PROVENANCE.git_commit
    assert tags["fullscale.test_set"] == content["test_set"]
    assert len(tags) == 6, "all of them are in MLflow's table of versions"
    assert content["notes"][-1] == f"First candidate judged on test set {content['test_set']}."

    client = mlflow.MlflowClient(empty_store.uri)
    run_id = find_training_run(empty_store, weights)
    assert client.get_run(run_id).info.run_name == "unet3plus-0, 0.900 test Dice, scans dddddddd"
    client.update_run(run_id, name="Ours")
    rescale(project, "unet3plus", 0.95)
    content, again = run_stage(project, tiny_params, empty_store)
    assert again == "1"
    assert client.get_run(run_id).info.run_name == "Ours"
    assert content["num_verdicts"] == 1
    assert len(client.search_model_versions(f"name = '{name}'")) == 1

    check_served_model(project, name, empty_store)
    check_better_candidate(project, tiny_params, empty_store)


def as_model(name, version, params):
    """A version as `find_model` returns it, with another network: only its name matters here."""
    return Model(name, version, "a" * 64, 0.5, random_trained(params))


@pytest.mark.slow
def test_version_says_why_until_a_person_says_otherwise(project, tiny_params, mlflow_store):
    settings = tiny_params.register_.model_copy(update={"model_name": "described"})
    params = tiny_params.model_copy(update={"register_": settings})
    Image.new("RGB", (1500, 300)).save(project / "reports/unet3plus/worst.png")
    client = mlflow.MlflowClient(mlflow_store.uri)

    def look():
        _, number = run_stage(project, params, mlflow_store)
        version = client.get_model_version("described", number)
        return version, version.description, client.get_registered_model("described").description

    version, page, text = look()
    assert page.startswith("PASS: the candidate may be promoted\n")
    assert "+0.1000" in page
    assert text == make_model_page(tuple(params.organs))
    picture = mlflow.artifacts.download_artifacts(
        run_id=version.run_id, artifact_path="page/worst.png", tracking_uri=mlflow_store.uri
    )
    assert Image.open(picture).size == (1000, 200)
    assert f"get-artifact?path=page%2Fworst.png&run_uuid={version.run_id}" in page

    scores = pd.DataFrame({"patient": ["p1", "p2"]})
    summary = {"test_set": "b" * 16, "test/dice/liver": 0.75, "test/num_cases/liver": 2}
    elsewhere = CohortScores("Elsewhere", scores, summary, ())
    model = as_model("described", version.version, params)
    (project / "out").mkdir()
    (project / "out/cases.csv").write_text("case\n")
    publish(elsewhere, model, project / "out", mlflow_store)
    rescale(project, "unet", 0.7)
    version, page, _ = look()
    assert "+0.2000" in page
    assert page.index("### Internal") < page.index("### External") < page.index("### Pictures")
    assert "| Elsewhere&nbsp; | liver&nbsp; | 0.7500" in page
    files = client.list_artifacts(version.run_id, "external/Elsewhere")
    assert [file.path for file in files] == ["external/Elsewhere/cases.csv"]

    client.update_model_version("described", version.version, f"Checked by us.\n\n{page}")
    client.update_registered_model("described", "Ours.")
    rescale(project, "unet", 0.6)
    version, theirs, text = look()
    assert theirs == f"Checked by us.\n\n{page}"
    publish(replace(elsewhere, cohort="Another"), model, project / "out", mlflow_store)
    version = client.get_model_version("described", version.version)
    assert version.description == theirs
    kept = json.loads(version.tags["fullscale.external.Another"])
    assert kept["test/dice/liver"] == 0.75
    assert text == "Ours."


def check_served_model(project, name, store):
    """The registered version segments a scan given as base64, and answers on its own grid."""
    with use_tracking_uri(store):
        model = mlflow.pyfunc.load_model(f"models:/{name}@{CHAMPION}")
    path = project / "data/imagesTr/case_01_0000.nii.gz"
    scan = base64.b64encode(path.read_bytes()).decode()
    answer = model.predict(pd.DataFrame({"scan": [scan]}))
    image = nib.load(path)
    mask = nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(answer["mask"][0])))
    assert mask.shape == image.shape
    assert np.allclose(mask.affine, image.affine)
    assert set(np.unique(mask.dataobj)) <= {0, 1, 2}
    assert set(json.loads(answer["statistics"][0])["organs"]) == {"liver", "spleen"}
    with pytest.raises(Exception, match="row 0: text that is not base64"):
        model.predict(pd.DataFrame({"scan": ["not base64!"]}))


def check_better_candidate(project, params, store):
    """Other weights are compared with the champion, become challenger, and leave it in place."""
    torch.manual_seed(5)
    description = describe_network("unet3plus", params)
    save_trained(project / "artifacts/train/unet3plus/0", build(description), description)
    content, version = run_stage(project, params, store)
    assert [criterion["name"] for criterion in content["criteria"]][-4:] == [
        *("champion", "champion_failures", "champion/liver", "champion/spleen")
    ]
    assert version == "2"
    assert content["num_verdicts"] == 2
    name = params.register_.model_name
    assert content["criteria"][-4]["found"].startswith("Dice against champion version 1 +")
    assert not any("was registered on" in note for note in content["notes"])
    assert {"unet3plus", "unet", "champion version 1"} == {
        name for each in content["comparisons"] for name in (each["first"], each["second"])
    }
    assert int(find_alias(store, name, CHALLENGER).version) == 2
    assert int(find_alias(store, name, CHAMPION).version) == 1
    scored = content["champion"]["scores"]
    assert content["champion"]["version"] == "1"
    assert scored["test/num_cases/liver"] == 3
    client = mlflow.MlflowClient(store.uri)
    page = client.get_model_version_by_alias(name, CHALLENGER).description
    assert f"{scored['test/dice/liver']:.4f}" in page
    assert "Champion then: version 1, scored again" in page
    first = client.get_model_version_by_alias(name, CHAMPION).description
    assert "No other version was champion" in first
    check_other_test_set(project, params, store)
    assert registry_line(params, content, store) == (
        f"Registered: {name} version 2 (aliases: challenger)"
    )


def check_other_test_set(project, params, store):
    """The verdict names the test set of a champion that was registered on another one."""
    client = mlflow.MlflowClient(store.uri)
    client.set_model_version_tag(
        params.register_.model_name, "1", "fullscale.test_set", "feedfeedfeedfeed"
    )
    verdict = decide(params, open_workspace(project), store)
    assert verdict.trial.test_set == read_verdict(open_workspace(project))["test_set"]
    assert any("registered on test set feedfeedfeedfeed; both" in note for note in verdict.notes)


def test_verdict_is_json_where_nothing_could_be_measured(project, tiny_params, mlflow_store):
    for name in ("unet", "unet3plus"):
        rescale(project, name, math.nan)
    verdict = decide(tiny_params, open_workspace(project), mlflow_store)
    record_verdict(verdict, tiny_params, open_workspace(project), PROVENANCE.data_version)
    text = (project / "reports/gate.json").read_text()

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads(text, parse_constant=refuse)
    assert content["status"] == "undecided"
    assert content["dice_gain"]["mean"] is None
    assert content["dice_gain"]["num_pairs"] == 0
    assert all(each["p_holm"] is None for each in content["comparisons"] if each["organ"] == "all")


def test_failed_gate_registers_nothing_and_says_why(project, tiny_params, mlflow_store):
    rescale(project, "unet3plus", 0.7)
    name = "never-registered"
    params = tiny_params.model_copy(
        update={"register_": tiny_params.register_.model_copy(update={"model_name": name})}
    )
    content, version = run_stage(project, params, mlflow_store)
    assert (content["status"], version) == ("fail", None)
    assert find_alias(mlflow_store, name, CHALLENGER) is None
    assert registry_line(params, content, mlflow_store).endswith("the promotion gate did not pass")
    lines = verdict_lines(content)
    assert lines[0].startswith("Verdict: FAIL")
    assert any(line.startswith("  FAIL  ") and "-0.1000" in line for line in lines)
    assert lines[-len(content["notes"]) :] == [f"  {note}" for note in content["notes"]]


def test_failed_verdicts_count_as_verdicts_on_the_test_set(project, tiny_params, empty_store):
    workspace = open_workspace(project)
    name = workspace.trained("unet3plus", 0)
    description = describe_network("unet3plus", tiny_params)
    rescale(project, "unet3plus", 0.7)
    for seed in (21, 22):
        torch.manual_seed(seed)
        save_trained(name, build(description), description)
        content, _ = run_stage(project, tiny_params, empty_store)
        assert content["status"] == "fail"
    assert content["num_verdicts"] == 2
    test_set, weights = content["test_set"], content["weights_sha256"]
    assert count_judged(empty_store, test_set, weights) == 1
    assert count_judged(empty_store, test_set, "f" * 64) == 2
    assert count_judged(empty_store, "f" * 16, weights) == 0


@pytest.mark.slow
def test_champion_keeps_its_threshold_and_is_scored_on_todays_labels(
    project, tiny_params, tiny_cohort, mlflow_store
):
    settings = tiny_params.register_.model_copy(update={"model_name": "relabelled"})
    params = tiny_params.model_copy(update={"register_": settings})
    assert run_stage(project, params, mlflow_store)[1] == "1"
    cohort = replace(tiny_cohort, labels={"background": 0, "spleen": 1, "liver": 2})
    today = params.model_copy(
        update={
            "organs": {"liver": ("liver",), "bone": ("spleen",)},
            "evaluate": params.evaluate.model_copy(update={"threshold": 0.999, "gate": "none"}),
        }
    )
    champion = score_champion(today, cohort, mlflow_store, TEST_CASES, "other weights")
    assert champion.organs == ("liver", "spleen")
    trained = load_trained(project / "artifacts/train/unet3plus/0")
    plain = params.evaluate.model_copy(update={"ablate_slice_classifier": False})
    _, wanted = evaluate_network(trained, cohort, TEST_CASES, plain, organs={"liver": (2,)})
    pd.testing.assert_frame_equal(champion.scores, wanted)
    assert set(wanted["organ"]) == {"liver"}
    assert wanted["num_predicted_voxels"].any()  # at 0.999 there would be none


@pytest.mark.slow
def test_test_results_are_added_to_the_run_once(project, tiny_params, mlflow_store):
    for _ in range(2):
        run_stage(project, tiny_params, mlflow_store)
    weights = file_sha256(project / "artifacts/train/unet/0" / WEIGHTS_NAME)
    run_id = find_training_run(mlflow_store, weights)
    client = mlflow.MlflowClient(mlflow_store.uri)
    history = client.get_metric_history(run_id, "test/dice/liver")
    assert [metric.value for metric in history] == [pytest.approx(0.8)]


def test_run_written_afterwards_says_so(project, tiny_params, mlflow_store, capsys):
    torch.manual_seed(11)
    description = describe_network("unet", tiny_params)
    save_trained(project / "artifacts/train/unet/0", build(description), description)
    run_id = ensure_run("unet", 0, open_workspace(project), mlflow_store, "d" * 32)
    assert "wrote a run for unet-0 from its stored history" in capsys.readouterr().out
    client = mlflow.MlflowClient(mlflow_store.uri)
    run = client.get_run(run_id)
    assert "written afterwards" in run.data.tags["mlflow.note.content"]
    assert run.data.metrics["val/dice"] == 0.25
    assert ensure_run("unet", 0, open_workspace(project), mlflow_store, "d" * 32) == run_id


def test_run_that_waits_on_disk_is_sent_before_runs_are_looked_for(
    project, tiny_params, mlflow_store, capsys
):
    torch.manual_seed(12)
    description = describe_network("unet", tiny_params)
    save_trained(project / "artifacts/train/unet/0", build(description), description)
    weights = file_sha256(project / "artifacts/train/unet/0" / WEIGHTS_NAME)
    folder = project / ".cache/train/unet/0/tracking"
    location = mlflow_store.artifact_location
    description = RunDescription(mlflow_store.uri, location, "unet", {}, {}, "d" * 32)
    with training_run(description, folder) as run:
        pass
    RunRecord(run.folder).set_tag(WEIGHTS_TAG, weights)
    assert find_training_run(mlflow_store, weights) is None
    run_stage(project, tiny_params, mlflow_store)
    assert find_training_run(mlflow_store, weights) == run.run_id
    assert "wrote a run for unet-0 from" not in capsys.readouterr().out


def test_missing_scores_say_what_to_do(project):
    shutil.rmtree(project / "reports/unet")
    with pytest.raises(StageError, match=r"cases\.csv is missing; run `dvc repro evaluate@unet`"):
        read_scores(open_workspace(project), "unet")


def test_scores_on_different_cases_are_refused(project, tiny_params, mlflow_store):
    path = project / "reports/unet/cases.csv"
    table = pd.read_csv(path)
    table[table["case"] != "case_00"].to_csv(path, index=False)
    with pytest.raises(StageError, match="scored on different test cases"):
        decide(tiny_params, open_workspace(project), mlflow_store)


def test_scores_on_another_annotation_are_refused(project, tiny_params, mlflow_store):
    path = project / "data/cases.csv"
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table.loc[table["case"] == TEST_CASES[0], "label_sha256"] = "0" * 64
    table.to_csv(path, index=False)
    with pytest.raises(StageError, match=r"unet3plus was scored on test set .*run `dvc repro`"):
        decide(tiny_params, open_workspace(project), mlflow_store)


def test_store_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    store = tracking_store.Store("http://127.0.0.1:9")
    with pytest.raises(StageError, match=r"store http://127\.0\.0\.1:9 does not answer .*start"):
        tracking_store.connect(store)


def test_default_store_is_sqlite_inside_the_project(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = tracking_store.default_store(tmp_path)
    assert store.uri == f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5999")
    assert tracking_store.default_store(tmp_path) == tracking_store.Store("http://127.0.0.1:5999")


@pytest.mark.slow
def test_every_library_that_a_version_needs_is_pinned_with_it():
    """Found by the imports of all modules that MLflow loads with the model."""
    code = """
import ast, sys, pathlib, fullscale.serving.pyfunc_model
names = set()
for name, module in list(sys.modules.items()):
    if name.split(".")[0] in ("fullscale", "model") and module.__file__:
        tree = ast.parse(pathlib.Path(module.__file__).read_text())
        for node in list(ast.walk(tree)):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {each.name for each in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module)
print(*sorted({name.split(".")[0] for name in names}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = set(done.stdout.split()) - set(sys.stdlib_module_names) - {*PACKAGES, "__future__"}
    known_as = {"yaml": "pyyaml"}
    assert {"torch", "nibabel", "yaml"} <= found
    assert {known_as.get(name, name) for name in found} == set(LIBRARIES)


def test_table_shows_every_organ_and_network(project, tiny_params):
    results = read_results(open_workspace(project), tiny_params)
    rows = score_rows(results)
    assert [row[:3] for row in rows] == [
        ("liver", "unet", "0.8000"),
        ("liver", "unet3plus", "0.9000"),
        ("spleen", "unet", "0.8000"),
        ("spleen", "unet3plus", "0.9000"),
    ]
    table = make_table(results)
    assert table.row_count == 4
    assert [column.header for column in table.columns][-2:] == ["Dice interval", "HD95 mm"]
    hd95_mm = list(table.columns[-1].cells)
    path = project / "reports/unet/summary.json"
    summary = json.loads(path.read_text())
    assert hd95_mm[0] == f"{summary['test/hd95_mm/liver']:.1f}"
    assert list(table.columns[-2].cells) == ["not measured"] * 4


def test_table_shows_the_interval_of_dice(project, tiny_params):
    path = project / "reports/unet/summary.json"
    interval = {"test/dice_low/liver": 0.71234, "test/dice_high/liver": 0.86666}
    path.write_text(json.dumps(json.loads(path.read_text()) | interval))
    results = read_results(open_workspace(project), tiny_params)
    assert next(make_table(results).columns[-2].cells) == "0.712 - 0.867"


def test_lines_show_what_the_slice_classifier_did(project, tiny_params):
    path = project / "reports/unet3plus/summary.json"
    summary = json.loads(path.read_text())
    known = {"test/classifier_sensitivity/liver": 0.96, "test/num_organ_slices/liver": 25}
    known |= {"test/classifier_specificity/liver": 4 / 31, "test/num_free_slices/liver": 31}
    del summary["test/classifier_sensitivity/spleen"]
    path.write_text(json.dumps(summary | known))
    lines = classifier_lines(read_results(open_workspace(project), tiny_params))
    assert lines[0] == (
        "Slice classifier (CGM) of unet3plus, liver: sensitivity 0.9600 (25 organ slices), "
        "specificity 0.1290 (31 organ-free slices)"
    )
    assert "unet3plus, spleen: sensitivity not measured" in lines[1]
    assert len(lines) == 2  # unet has no slice classifier


def test_line_shows_what_cross_validation_found(project, tiny_params):
    path = project / "reports/unet3plus/summary.json"
    found = {"out_of_fold/num_patients": 21, "out_of_fold/dice/liver": 0.91}
    path.write_text(json.dumps(json.loads(path.read_text()) | found))
    (line,) = out_of_fold_lines(read_results(open_workspace(project), tiny_params))
    assert line.startswith("Out of fold, unet3plus: liver 0.9100 (21 patients who are not tested")


def test_missing_verdict_says_what_to_do(tmp_path):
    with pytest.raises(StageError, match=r"gate\.json is missing; run `dvc repro register`"):
        read_verdict(open_workspace(tmp_path))


# Several seeds


def add_seeds(project, params, cohort, deploy):
    """Three trainings of both networks and their scores; the ensemble scores better than each."""
    seeds = (0, 1, 2)
    test_set = digest_test_set(case for case in cohort.cases if case.name in TEST_CASES)
    settings = params.register_.model_copy(update={"deploy": deploy, "model_name": f"of-{deploy}"})
    params = params.model_copy(update={"seeds": seeds, "register_": settings})
    workspace = open_workspace(project)
    for name, dice in (("unet3plus", 0.9), ("unet", 0.8)):
        scores = pd.read_csv(workspace.scores(name), dtype={"case": str, "patient": str})
        for seed in seeds:
            torch.manual_seed(10 * seed + len(name))
            description = describe_network(name, params).model_copy(
                update={"epoch": 1, "val_dice": 0.5 + 0.1 * (seed == 1)}
            )
            save_trained(workspace.trained(name, seed), build(description), description)
            history = [{"epoch": 1, "val/dice": 0.25}]
            write_history(workspace.trained(name, seed) / "history.csv", history)
        tables = {seed: scores.assign(dice=dice + 0.01 * seed) for seed in seeds}
        write_scores(workspace, name, tables, scores.assign(dice=dice + 0.05))
        members = seeds if deploy == "ensemble" else (1,)
        metrics = summarise(scores.assign(dice=dice + 0.05), tuple(params.organs))
        write_summary(workspace, name, test_set, metrics, seeds, members)
    return params, workspace


@pytest.mark.slow
def test_ensemble_is_registered_with_all_members_and_runs_of_its_own(
    project, tiny_params, tiny_cohort, empty_store
):
    params, workspace = add_seeds(project, tiny_params, tiny_cohort, "ensemble")
    content, version = run_stage(project, params, empty_store)
    assert (content["status"], version) == ("pass", "1")
    assert (content["seeds"], content["members"]) == ([0, 1, 2], [0, 1, 2])
    folders = workspace.trainings("unet3plus", params.seeds)
    assert content["weights_sha256"] == digest_weights(folders)
    assert any(
        note.startswith("Judged: unet3plus against unet, 3 and 3") for note in content["notes"]
    )
    assert any(
        "registers the ensemble of 3 trainings, seeds 0, 1, 2." in n for n in content["notes"]
    )
    found = find_alias(empty_store, "of-ensemble", CHAMPION)
    assert found.tags[WEIGHTS_TAG] == digest_weights(folders)
    client = mlflow.MlflowClient(empty_store.uri)
    run = client.get_run(find_training_run(empty_store, digest_weights(folders)))
    assert run.data.metrics["test/dice/liver"] == pytest.approx(0.95)
    assert run.data.tags["fullscale.verdict"] == "pass"
    assert run.data.tags["fullscale.members"] == "0, 1, 2"
    assert run.info.run_name.startswith("unet3plus-ensemble, 0.")
    assert run.info.run_name.endswith(" test Dice, scans dddddddd")
    for seed, folder in zip(params.seeds, folders, strict=True):
        training = client.get_run(find_training_run(empty_store, digest_weights([folder])))
        assert training.data.tags["fullscale.seed"] == str(seed)
        assert training.info.run_id in run.data.tags["mlflow.note.content"]
        assert training.data.metrics["test/dice/liver"] == pytest.approx(0.9 + 0.01 * seed)
        assert "fullscale.verdict" not in training.data.tags
    again, same = run_stage(project, params, empty_store)
    assert (again["num_verdicts"], same) == (1, "1")


@pytest.mark.slow
def test_champion_of_several_networks_is_loaded_and_scored_as_one(
    project, tiny_params, tiny_cohort, empty_store
):
    params, workspace = add_seeds(project, tiny_params, tiny_cohort, "ensemble")
    run_stage(project, params, empty_store)
    champion = score_champion(params, tiny_cohort, empty_store, TEST_CASES, "other weights")
    trained = load_members(workspace.trainings("unet3plus", params.seeds))
    _, wanted = evaluate_network(trained, tiny_cohort, TEST_CASES, params.evaluate)
    assert trained.num_members == 3
    pd.testing.assert_frame_equal(champion.scores, wanted)


@pytest.mark.slow
def test_best_training_is_registered_alone(project, tiny_params, tiny_cohort, empty_store):
    params, workspace = add_seeds(project, tiny_params, tiny_cohort, "best")
    content, version = run_stage(project, params, empty_store)
    assert (content["status"], version, content["members"]) == ("pass", "1", [1])
    weights = file_sha256(workspace.trained("unet3plus", 1) / WEIGHTS_NAME)
    assert content["weights_sha256"] == weights
    assert find_alias(empty_store, "of-best", CHAMPION).tags[WEIGHTS_TAG] == weights
    floor = next(each for each in content["criteria"] if each["name"] == "organ_dice/liver")
    assert floor["value"] == pytest.approx(0.91)
    assert content["dice_gain"]["mean"] == pytest.approx(0.1)


def test_scores_of_other_seeds_than_would_be_registered_are_refused(
    project, tiny_params, tiny_cohort, empty_store
):
    params, workspace = add_seeds(project, tiny_params, tiny_cohort, "ensemble")
    fewer = params.model_copy(update={"seeds": (0, 1)})
    with pytest.raises(StageError, match=r"seeds \[0, 1, 2\], and a pass would register \[0, 1\]"):
        decide(fewer, workspace, empty_store)
