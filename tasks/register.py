"""Stage register: the promotion gate's verdict, and on a pass a registered model version."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fullscale.evaluation.paired import SEED
from fullscale.evaluation.promotion_gate import Champion, Deployed, Trial, Verdict, judge
from fullscale.evaluation.score_files import (
    VerdictContent,
    read_deployed_scores,
    read_scores,
    read_summary,
    write_verdict,
)
from fullscale.evaluation.summary import evaluate_network, summarise
from fullscale.label_names import resolve_organs
from fullscale.params import Params
from fullscale.prediction.network_files import (
    choose_deployed,
    digest_weights,
    load_trained,
    package_files,
)
from fullscale.reporting.model_card import (
    PICTURE_WIDTH_PX,
    PICTURES,
    PICTURES_PATH,
    add_external,
    make_model_page,
    make_version_page,
)
from fullscale.reporting.numbers import deployed_title
from fullscale.reporting.text_summary import verdict_lines
from fullscale.runtime.console import report_errors
from fullscale.runtime.errors import StageError
from fullscale.runtime.files import file_sha256, write_atomically
from fullscale.runtime.progress import training_title
from fullscale.scans.cohort import Cohort, read_cohort
from fullscale.serving.model_lookup import DEFAULT_GATE, DEFAULT_REFINE, DEFAULT_THRESHOLD
from fullscale.serving.row_segmenter import ANSWERS, COLUMNS, example_rows
from fullscale.tracking.outages import translate_outages
from fullscale.tracking.registry import (
    CHAMPION,
    TEST_SET_TAG,
    VERDICT_TAG,
    ModelPackage,
    add_files,
    add_test_results,
    add_verdict,
    announce,
    count_judged,
    describe_version,
    download_model,
    find_alias,
    find_numbered,
    find_training_run,
    find_version,
    log_model,
    model_settings,
    read_external_scores,
)
from fullscale.tracking.run_record import RunDescription
from fullscale.tracking.runs import send_leftovers, write_finished_run
from fullscale.tracking.store import (
    COMMIT_TAG,
    DATA_VERSION_TAG,
    MEMBERS_TAG,
    NETWORK_TAG,
    SEED_TAG,
    WEIGHTS_TAG,
    Store,
    default_store,
)
from fullscale.training.history import HISTORY_NAME, read_history
from fullscale.versioning.git import CODE_VARIABLE
from fullscale.versioning.provenance import Provenance, digest_test_set, read_provenance
from fullscale.workspace import Workspace, open_workspace

if TYPE_CHECKING:
    from fullscale.prediction.predictor import Refine
    from model.output import Gating

CHAMPION_METRICS = ("num_cases", "dice", "num_free_slices", "slice_fpr")
PACKAGES = ("model", "fullscale")
LIBRARIES = (
    "mlflow", "torch", "numpy", "pandas", "scipy", "nibabel", "isal", "pydantic", "pyyaml",
    "safetensors", "SimpleITK",
)  # fmt: skip


def decide(params: Params, workspace: Workspace, store: Store) -> Verdict:
    """Compare the candidate with the baseline and the champion on the same test cases.

    Raises:
        StageError: scores are missing, or were made on different test cases or annotation.
    """
    names = (params.register_.candidate, params.register_.baseline)
    summaries = {name: read_summary(workspace, name) for name in names}
    candidate, baseline = (read_scores(workspace, name) for name in names)
    if set(candidate["case"]) != set(baseline["case"]):
        raise StageError(
            f"{' and '.join(names)} were scored on different test cases; run `dvc repro`"
        )
    folders = {name: deployed_folders(params, workspace, name) for name in names}
    for name, summary in summaries.items():
        wanted = [int(folder.name) for folder in folders[name]]
        if summary.get("members") != wanted:
            raise StageError(
                f"{workspace.summary(name)} is of the trainings with seeds "
                f"{summary.get('members', 'unknown')}, and a pass would register {wanted}; run "
                "`dvc repro`"
            )
    cohort = read_cohort(workspace.data)
    test_cases = sorted(candidate["case"].unique())
    test_set = digest_test_set(case for case in cohort.cases if case.name in set(test_cases))
    for name, summary in summaries.items():
        if (scored_on := summary["test_set"]) != test_set:
            raise StageError(
                f"{name} was scored on test set {scored_on}, and data/ has test set {test_set}: "
                "patients, cases or labels differ; run `dvc repro`"
            )
    weights = digest_weights(folders[params.register_.candidate])
    trial = Trial(tuple(params.organs), test_set, 1 + count_judged(store, test_set, weights))
    champion = score_champion(params, cohort, store, test_cases, weights)
    deployed = None
    if len(params.seeds) > 1:
        deployed = Deployed(
            deployed_title(summaries[params.register_.candidate]),
            *(read_deployed_scores(workspace, name, summaries[name]) for name in names),
        )
    return judge(candidate, baseline, champion, trial, params.register_, deployed)


def deployed_folders(params: Params, workspace: Workspace, name: str) -> Sequence[Path]:
    """Return the folders of the trainings of a network that are registered together."""
    return choose_deployed(workspace.trainings(name, params.seeds), params.register_.deploy)


def score_champion(
    params: Params, cohort: Cohort, store: Store, test_cases: list[str], candidate_sha256: str
) -> Champion | None:
    """Score the champion on these cases; None if there is none, or if it is the candidate.

    The annotation is read with today's label ids, and the network segments with the threshold and
    the gate that it was registered with. Settings that change nothing the promotion gate reads are
    off.
    """
    found = find_alias(store, params.register_.model_name, CHAMPION)
    if found is None or found.tags.get(WEIGHTS_TAG) == candidate_sha256:
        return None
    with tempfile.TemporaryDirectory() as temporary:
        folder = download_model(store, found, Path(temporary))
        trained = load_trained(folder)
        settings = params.evaluate.model_copy(
            update={
                "threshold": float(model_settings(folder).get("threshold", DEFAULT_THRESHOLD)),
                "gate": model_settings(folder).get("gate", DEFAULT_GATE),
                "refine": model_settings(folder).get("refine", DEFAULT_REFINE),
                "largest_component": False,
                "ablate_slice_classifier": False,
            }
        )
        organs = trained.description.organs
        label_ids = resolve_organs(params.organs, cohort.labels)
        known = {organ: ids for organ, ids in label_ids.items() if organ in organs}
        _, scores = evaluate_network(trained, cohort, test_cases, settings, organs=known)
    return Champion(
        found.version,
        found.tags.get(TEST_SET_TAG, "unknown"),
        tuple(organs),
        scores,
    )


def record_verdict(
    verdict: Verdict, params: Params, workspace: Workspace, data_version: str
) -> VerdictContent:
    """Write reports/gate.json and return its content.

    The file is in git, so it does not hold the commit: a result that is reproduced bit for bit
    leaves it as it is.
    """
    candidate = params.register_.candidate
    members = deployed_folders(params, workspace, candidate)
    content = {
        "status": verdict.status,
        "candidate": candidate,
        "baseline": params.register_.baseline,
        "dice_gain": asdict(verdict.gain),
        "criteria": [asdict(criterion) for criterion in verdict.criteria],
        "notes": verdict.notes,
        "comparisons": [asdict(each) for each in verdict.comparisons],
        "champion": _champion_scores(verdict.champion, tuple(params.organs)),
        "seeds": sorted(params.seeds),
        "members": [int(folder.name) for folder in members],
        "weights_sha256": digest_weights(members),
        "scores_sha256": {
            name: file_sha256(workspace.scores(name))
            for name in (candidate, params.register_.baseline)
        },
        "test_set": verdict.trial.test_set,
        "num_verdicts": verdict.trial.num_verdicts,
        "data_version": data_version,
    }
    return write_verdict(workspace, content)


def _champion_scores(champion: Champion | None, organs: tuple[str, ...]) -> dict[str, Any] | None:
    """Return version and main scores, under the keys of reports/NAME/summary.json."""
    if champion is None:
        return None
    summary = summarise(champion.scores, organs)
    keys = [f"test/{metric}/{organ}" for organ in organs for metric in CHAMPION_METRICS]
    scores = {key: summary[key] for key in keys if key in summary}
    return {"version": champion.version, "scores": scores}


def ensure_run(name: str, seed: int, workspace: Workspace, store: Store, data_version: str) -> str:
    """Return the id of the tracked run that trained a network's weights with a seed.

    A store may have never seen the training, where DVC restored the weights from its cache. Then a
    run is written from the stored history.
    """
    title = training_title(name, seed)
    written_afterwards = workspace.root / ".cache/register" / title
    for records in (workspace.tracking(name, seed), written_afterwards):
        send_leftovers(records)
    folder = workspace.trained(name, seed)
    weights_sha256 = digest_weights([folder])
    run_id = find_training_run(store, weights_sha256)
    if run_id is None:
        tags = {
            WEIGHTS_TAG: weights_sha256,
            NETWORK_TAG: name,
            SEED_TAG: str(seed),
            "mlflow.note.content": "Trained elsewhere or earlier, and restored from the DVC cache: "
            "written afterwards from the stored history.",
        }
        parameters = {"network": name, "seed": seed}
        description = RunDescription(
            store.uri, store.artifact_location, title, parameters, tags, data_version
        )
        history = folder / HISTORY_NAME
        epochs = read_history(history) if history.is_file() else []  # an imported network has none
        run_id = write_finished_run(description, written_afterwards, epochs, folder)
        print(f"register: wrote a run for {title} from its stored history; this store had none")
    return run_id


def ensure_deployed_run(
    name: str, params: Params, workspace: Workspace, store: Store, data_version: str
) -> str:
    """Return the id of the run of what is registered of a network; each training gets its run too.

    One training is its own run. An ensemble has a run of its own, which names those of its members:
    test scores, verdict and registered version belong to it. With several seeds the run of each
    training gets that training's test scores.
    """
    runs = {
        seed: ensure_run(name, seed, workspace, store, data_version)
        for seed in sorted(params.seeds)
    }
    if len(runs) > 1:
        scores, summary = read_scores(workspace, name), read_summary(workspace, name)
        for seed, run_id in runs.items():
            rows = scores[scores[SEED] == seed]
            metrics = summarise(rows, tuple(params.organs))
            add_test_results(store, run_id, {"test_set": summary["test_set"], **metrics})
    folders = deployed_folders(params, workspace, name)
    members = [int(folder.name) for folder in folders]
    if len(members) == 1:
        return runs[members[0]]
    records = workspace.root / ".cache/register" / f"{name}-ensemble"
    send_leftovers(records)
    weights_sha256 = digest_weights(folders)
    ensemble_run = find_training_run(store, weights_sha256)
    if ensemble_run is None:
        listed = ", ".join(str(seed) for seed in members)
        tags = {
            WEIGHTS_TAG: weights_sha256,
            NETWORK_TAG: name,
            MEMBERS_TAG: listed,
            "mlflow.note.content": f"Ensemble of the trainings of {name} with seeds {listed}: runs "
            + ", ".join(runs[seed] for seed in members),
        }
        description = RunDescription(
            store.uri, store.artifact_location, f"{name}-ensemble",
            {"network": name, "seeds": listed}, tags, data_version,
        )  # fmt: skip
        ensemble_run = write_finished_run(description, records, [])
    return ensemble_run


def register(
    params: Params,
    workspace: Workspace,
    store: Store,
    verdict: VerdictContent,
    provenance: Provenance,
) -> str | None:
    """Track test results, and register the candidate if it passed; return its version.

    Weights that are registered already get no second version: its tags are updated instead. The
    commit is a tag of the version and part of its description.
    """
    settings = params.register_
    run_ids, summaries = {}, {}
    for name in (settings.candidate, settings.baseline):
        run_ids[name] = ensure_deployed_run(name, params, workspace, store, verdict["data_version"])
        summaries[name] = read_summary(workspace, name)
        add_test_results(store, run_ids[name], summaries[name], workspace.report(name))
    add_verdict(store, run_ids[settings.candidate], verdict["status"])
    tags = version_tags(verdict)
    version = None
    if verdict["status"] == "pass":
        run_id = run_ids[settings.candidate]
        version = find_version(store, settings.model_name, tags[WEIGHTS_TAG]) or log_model(
            store, run_id, settings.model_name, package_candidate(params, workspace)
        )
        announce(store, settings.model_name, version, {**tags, COMMIT_TAG: provenance.git_commit})
        organs = tuple(params.organs)
        pictures = add_previews(store, run_id, workspace.report(settings.candidate))
        page = make_version_page(verdict, provenance, summaries, organs, run_id, pictures)
        known = find_numbered(store, settings.model_name, version)
        page = add_external(page, read_external_scores(known.tags if known else {}))
        describe_version(store, settings.model_name, version, page, make_model_page(organs))
    receipt = {"model_name": settings.model_name, "tags": tags}
    # An artefact, unlike reports/gate.json: without it, this machine has not registered yet.
    path = workspace.artifacts / "register/receipt.json"
    write_atomically(path, json.dumps(receipt, indent=2) + "\n")
    return version


def add_previews(store: Store, run_id: str, reports: Path) -> list[str]:
    """Add the pictures of a version's page to a run, in its size; returns their names.

    Args:
        store: where the run is kept.
        run_id: the run.
        reports: the folder in which stage evaluate left its pictures.
    """
    from PIL import Image

    names = [name for name in PICTURES if (reports / f"{name}.png").is_file()]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            with Image.open(reports / f"{name}.png") as picture:
                height_px = round(picture.height * PICTURE_WIDTH_PX / picture.width)
                small = picture.convert("RGB").resize((PICTURE_WIDTH_PX, height_px))
                small.save(Path(folder) / f"{name}.png")
        add_files(store, run_id, Path(folder), PICTURES_PATH)
    return names


def version_tags(verdict: VerdictContent) -> dict[str, str]:
    """Return the tags of a registered version that depend on its verdict.

    MLflow's table of versions shows all of them; what only people read is in the description.
    """
    return {
        WEIGHTS_TAG: verdict["weights_sha256"],
        DATA_VERSION_TAG: verdict["data_version"],
        TEST_SET_TAG: verdict["test_set"],
        VERDICT_TAG: verdict["status"],
    }


def package_candidate(params: Params, workspace: Workspace) -> ModelPackage:
    """Return what a version of the candidate consists of: network, verdict, code, libraries."""
    folders = deployed_folders(params, workspace, params.register_.candidate)
    settings = params.evaluate
    files = {"verdict": workspace.verdict}
    return package_networks(
        folders, workspace.root, settings.threshold, settings.gate, settings.refine, files
    )


def package_networks(
    folders: Sequence[Path],
    root: Path,
    threshold: float,
    gate: Gating = DEFAULT_GATE,
    refine: Refine = DEFAULT_REFINE,
    more_files: Mapping[str, Path] = MappingProxyType({}),
) -> ModelPackage:
    """Return what a version of a trained network, or of an ensemble, consists of.

    Args:
        folders: of the networks, as stage train leaves them.
        root: the project, whose code goes with the version.
        threshold: probability from which a voxel belongs to an organ.
        gate: how the slice classifier (CGM) acts, as `model.output.gate_weights` takes it.
        refine: how masks are refined, as `Predictor` takes it.
        more_files: artifact name to file, in addition to the network's.
    """
    return ModelPackage(
        trained_files={**package_files(folders), **more_files},
        code=tuple(root / package for package in PACKAGES),
        model_file=root / "fullscale/serving/pyfunc_model.py",
        model_config={"threshold": threshold, "gate": gate, "refine": refine},
        pip_requirements=[f"{library}=={get_version(library)}" for library in LIBRARIES],
        inputs=COLUMNS,
        outputs=ANSWERS,
        input_example=example_rows(),
    )


def get_version(library: str) -> str:
    """Return the installed version, without a build's suffix such as +cpu."""
    return metadata.version(library).split("+")[0]


@report_errors
def main() -> None:
    """Run the stage: scores of candidate and baseline -> reports/gate.json and the registry."""
    workspace = open_workspace(Path())
    params = workspace.load_params()
    store = default_store(workspace.root)
    with translate_outages(store.uri):
        verdict = decide(params, workspace, store)
        provenance = read_provenance(workspace.root, os.environ.get(CODE_VARIABLE, ""))
        content = record_verdict(verdict, params, workspace, provenance.data_version)
        registered = register(params, workspace, store, content, provenance)
    for line in verdict_lines(content):
        print(f"register: {line}")
    if registered is not None:
        print(f"register: {params.register_.model_name} version {registered}")


if __name__ == "__main__":
    main()
