"""Stage register: the gate's verdict, and on a pass a registered model that people may promote."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from fullscale.evaluation.promotion_gate import Champion, Verdict, judge
from fullscale.evaluation.summary import evaluate_network, summarise
from fullscale.params import Params
from fullscale.prediction.network_files import DESCRIPTION_NAME, WEIGHTS_NAME, load_trained
from fullscale.reporting.model_card import (
    PICTURE_WIDTH_PX,
    PICTURES,
    PICTURES_PATH,
    describe_model,
    make_page,
)
from fullscale.runtime.console import report_errors
from fullscale.runtime.errors import StageError
from fullscale.runtime.files import file_sha256, write_atomically
from fullscale.scans.cohort import read_cohort
from fullscale.serving.row_segmenter import ANSWERS, COLUMNS, example_rows
from fullscale.tracking.registry import (
    CHAMPION,
    add_files,
    add_test_results,
    announce,
    describe_version,
    download_model,
    find_alias,
    find_training_run,
    find_version,
    log_model,
)
from fullscale.tracking.runs import send_leftovers, training_run
from fullscale.tracking.store import WEIGHTS_TAG, Store, default_store
from fullscale.training.history import HISTORY_NAME, read_history
from fullscale.versioning.provenance import Provenance, digest_test_set, read_provenance
from fullscale.workspace import open_workspace

# An artefact, unlike reports/gate.json: where it is missing, this machine has not registered yet.
RECEIPT = Path("artifacts/register/receipt.json")
TEST_SET_TAG = "fullscale.test_set"
CHAMPION_METRICS = ("num_cases", "dice", "num_free_slices", "slice_fpr")
PACKAGES = ("model", "fullscale")
LIBRARIES = (
    "mlflow", "torch", "numpy", "pandas", "scipy", "nibabel", "isal", "pydantic", "pyyaml",
    "safetensors", "rich",
)  # fmt: skip


def decide(params: Params, root: Path, store: Store) -> Verdict:
    """Judge the candidate against the baseline and the present champion, on the same test cases.

    Raises:
        StageError: scores are missing or were made on different test cases.
    """
    scores = {
        name: read_scores(root, name)
        for name in (params.register_.candidate, params.register_.baseline)
    }
    candidate, baseline = scores.values()
    if set(candidate["case"]) != set(baseline["case"]):
        raise StageError(
            f"{' and '.join(scores)} were scored on different test cases; run `dvc repro`"
        )
    champion = score_champion(params, root, store, sorted(candidate["case"].unique()))
    return judge(candidate, baseline, champion, params.register_)


def score_champion(
    params: Params, root: Path, store: Store, test_cases: list[str]
) -> Champion | None:
    """The champion with its scores on these cases, made now.

    None when there is no champion, or when it is the candidate itself. Only what the gate reads
    is scored.
    """
    settings = params.evaluate.model_copy(update={"largest_component": False, "ablate_gate": False})
    found = find_alias(store, params.register_.model_name, CHAMPION)
    weights = root / "artifacts/train" / params.register_.candidate / WEIGHTS_NAME
    if found is None or found.tags.get(WEIGHTS_TAG) == file_sha256(weights):
        return None
    with tempfile.TemporaryDirectory() as folder:
        trained = load_trained(download_model(store, found, Path(folder)))
        _, scores = evaluate_network(
            trained, read_cohort(root / "data"), test_cases, **settings.model_dump()
        )
    return Champion(found.version, found.tags.get(TEST_SET_TAG, "unknown"), scores)


def read_scores(root: Path, name: str) -> pd.DataFrame:
    """The score table that stage evaluate wrote for a network."""
    path = root / "reports" / name / "cases.csv"
    try:
        return pd.read_csv(path, dtype={"case": str, "patient": str})
    except FileNotFoundError:
        raise StageError(f"{path} is missing; run `dvc repro evaluate@{name}`") from None


def write_verdict(
    verdict: Verdict, params: Params, root: Path, provenance: Provenance
) -> dict[str, Any]:
    """Write reports/gate.json and return its content."""
    candidate = params.register_.candidate
    test_cases = read_scores(root, candidate)["case"].unique()
    content = {
        "status": verdict.status,
        "candidate": candidate,
        "baseline": params.register_.baseline,
        "dice_gain": _plain(asdict(verdict.gain)),
        "clauses": [_plain(asdict(clause)) for clause in verdict.clauses],
        "comparisons": [_plain(asdict(each)) for each in verdict.comparisons],
        "champion": _champion_scores(verdict.champion, tuple(params.organs)),
        "weights_sha256": file_sha256(root / "artifacts/train" / candidate / WEIGHTS_NAME),
        "test_set": digest_test_set(test_cases),
        "data_version": provenance.data_version,
        "git_commit": provenance.git_commit,
    }
    write_atomically(root / "reports/gate.json", json.dumps(content, indent=2) + "\n")
    return content


def _champion_scores(champion: Champion | None, organs: tuple[str, ...]) -> dict[str, Any] | None:
    """Its version, and what people compare, under the keys of reports/NAME/summary.json."""
    if champion is None:
        return None
    summary = summarise(champion.scores, organs)
    keys = [f"test/{metric}/{organ}" for organ in organs for metric in CHAMPION_METRICS]
    scores = {key: _plain(summary[key]) for key in keys if key in summary}
    return {"version": champion.version, "scores": scores}


def _plain(value: Any) -> Any:
    """Numbers rounded for JSON, which has no NaN: null is what could not be measured."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def _afterwards(root: Path, name: str) -> Path:
    """Where the run of a training that this store never saw is told of."""
    return root / ".cache/register" / name


def ensure_run(name: str, params: Params, root: Path, store: Store, data_version: str) -> str:
    """The tracked run that trained a network's weights.

    Where DVC restored the weights from its cache and this store never saw the training, a run is
    written from the stored history, and says so.
    """
    folder = root / "artifacts/train" / name
    weights_sha256 = file_sha256(folder / WEIGHTS_NAME)
    run_id = find_training_run(store, weights_sha256)
    if run_id is not None:
        return run_id
    tags = {
        WEIGHTS_TAG: weights_sha256,
        "fullscale.network": name,
        "mlflow.note.content": "Trained elsewhere or earlier, and restored from the DVC cache: "
        "written afterwards from the stored history.",
    }
    with training_run(
        store, name, {"network": name}, tags, data_version, _afterwards(root, name)
    ) as run:
        for metrics in read_history(folder / HISTORY_NAME):
            run.log_metrics(metrics, step=int(metrics.pop("epoch")))
        run.log_files(folder, "trained")
    print(f"register: wrote a run for {name} from its stored history; this store had none")
    return run.run_id


def register(params: Params, root: Path, store: Store, verdict: dict[str, Any]) -> str | None:
    """Track test results, and register the candidate if it passed; returns its version.

    Weights that were registered before are not registered again: their tags are brought up to
    date with the verdict.
    """
    settings = params.register_
    run_ids, summaries = {}, {}
    for name in (settings.candidate, settings.baseline):
        for folder in (open_workspace(root).tracking(name), _afterwards(root, name)):
            send_leftovers(store, folder)
        run_ids[name] = ensure_run(name, params, root, store, verdict["data_version"])
        summary = json.loads((root / "reports" / name / "summary.json").read_text(encoding="utf-8"))
        add_test_results(store, run_ids[name], summary, root / "reports" / name)
        summaries[name] = summary
    tags = version_tags(verdict)
    version = None
    if verdict["status"] == "pass":
        run_id = run_ids[settings.candidate]
        version = _register_once(params, root, store, run_id, tags)
        organs = tuple(params.organs)
        pictures = add_previews(store, run_id, root / "reports" / settings.candidate)
        page = make_page(verdict, summaries, organs, run_id, pictures)
        describe_version(store, settings.model_name, version, page, describe_model(organs))
    receipt = {"model_name": settings.model_name, "tags": tags}
    write_atomically(root / RECEIPT, json.dumps(receipt, indent=2) + "\n")
    return version


def add_previews(store: Store, run_id: str, reports: Path) -> list[str]:
    """Add the pictures of a version's page to a run, in its size; returns their names.

    Args:
        store: where the run is kept.
        run_id: the run.
        reports: the folder in which stage evaluate left its pictures.
    """
    names = [name for name in PICTURES if (reports / f"{name}.png").is_file()]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            with Image.open(reports / f"{name}.png") as picture:
                height_px = round(picture.height * PICTURE_WIDTH_PX / picture.width)
                small = picture.convert("RGB").resize((PICTURE_WIDTH_PX, height_px))
                small.save(Path(folder) / f"{name}.png")
        add_files(store, run_id, Path(folder), PICTURES_PATH)
    return names


def version_tags(verdict: dict[str, Any]) -> dict[str, str]:
    """What a registered version says of itself."""
    return {
        WEIGHTS_TAG: verdict["weights_sha256"],
        "fullscale.data_version": verdict["data_version"],
        "fullscale.git_commit": verdict["git_commit"],
        TEST_SET_TAG: verdict["test_set"],
        "fullscale.verdict": verdict["status"],
        **{
            f"fullscale.verdict.{clause['name'].replace('/', '.')}": clause["found"]
            for clause in verdict["clauses"]
        },
    }


def _register_once(
    params: Params, root: Path, store: Store, run_id: str, tags: dict[str, str]
) -> str:
    name = params.register_.model_name
    known = find_version(store, name, tags[WEIGHTS_TAG])
    folder = root / "artifacts/train" / params.register_.candidate
    version = known or log_model(
        store,
        run_id,
        name,
        trained_files={
            "weights": folder / WEIGHTS_NAME,
            "description": folder / DESCRIPTION_NAME,
            "verdict": root / "reports/gate.json",
        },
        code=tuple(root / package for package in PACKAGES),
        model_file=root / "fullscale/serving/pyfunc_model.py",
        model_config={"threshold": params.evaluate.threshold},
        pip_requirements=[f"{library}=={get_version(library)}" for library in LIBRARIES],
        inputs=COLUMNS,
        outputs=ANSWERS,
        input_example=example_rows(),
    )
    announce(store, name, version, tags)
    return version


def get_version(library: str) -> str:
    """The installed version, without a build's suffix such as +cpu."""
    return metadata.version(library).split("+")[0]


@report_errors
def main() -> None:
    """Run the stage: scores of candidate and baseline -> reports/gate.json and the registry."""
    root = Path()
    params = open_workspace(root).load_params()
    store = default_store(root)
    verdict = decide(params, root, store)
    content = write_verdict(verdict, params, root, read_provenance(root))
    registered = register(params, root, store, content)
    print(f"register: verdict {verdict.status}")
    for clause in verdict.clauses:
        print(
            f"register: {'yes' if clause.passed else 'NO '} {clause.found}; wanted {clause.wanted}"
        )
    if registered is not None:
        print(f"register: {params.register_.model_name} version {registered}")


if __name__ == "__main__":
    main()
