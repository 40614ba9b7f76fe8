from itertools import product

import grimp
import pytest
import yaml
from project import ROOT

from flows.stages import plan
from fullscale.params import load_params

# What is only shown, tracked or kept while work goes on: a change there changes no artefact.
NO_ARTEFACT = (
    "fullscale.params",
    "fullscale.reporting.",
    "fullscale.runtime.",
    "fullscale.tracking.",
    "fullscale.versioning.",
    "fullscale.workspace",
)
STAGES = ("slice", "split", "train", "evaluate", "register")
PAPER_STAGES = (
    *("slice", "split", "train", "evaluate"),
    *("evaluate-crf", "paper_table-sample", "paper_table-paper"),
)
CASES = [("dvc.yaml", stage) for stage in STAGES]
CASES += [("paper/dvc.yaml", stage) for stage in PAPER_STAGES]
CASES += [("btcv/dvc.yaml", stage) for stage in (*PAPER_STAGES[:5], "paper_table")]


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph("tasks", "fullscale", "model", cache_dir=None)


def read_pipeline(name):
    return yaml.safe_load((ROOT / name).read_text())


@pytest.fixture(scope="module")
def pipeline():
    return read_pipeline("dvc.yaml")


def listed_modules(deps):
    """Modules among a stage's dependencies; a folder stands for all it holds."""
    names = set()
    for dep in deps:
        path = ROOT / dep
        files = path.rglob("*.py") if path.is_dir() and dep != "data" else [path]
        names |= {
            ".".join(file.relative_to(ROOT).with_suffix("").parts)
            for file in files
            if file.suffix == ".py"
        }
    return names


@pytest.mark.parametrize(("file", "stage"), CASES)
def test_stage_depends_on_the_code_it_imports(file, stage, graph):
    deps = read_pipeline(file)["stages"][stage]["deps"]
    module = f"tasks.{stage.split('-')[0]}"
    needed = {module} | graph.find_upstream_modules(module)
    listed = listed_modules(deps)
    # A package's __init__ holds its docstring alone.
    needed = {name for name in needed if not (ROOT / name.replace(".", "/")).is_dir()}
    needed = {name for name in needed - listed if not name.startswith(NO_ARTEFACT)}
    if stage in ("split", "train"):
        # What scans do to a scan shows in the bytes of artifacts/slices, a dependency itself.
        readers = ("fullscale.scans.", "fullscale.formats.")
        needed = {name for name in needed if not name.startswith(readers)}
    if stage == "train":
        # Drawn for MLflow only, with what it needs.
        needed = {name for name in needed if not name.startswith("fullscale.evaluation.")}
    assert not needed


@pytest.mark.parametrize(("file", "stage"), CASES)
def test_stage_lists_no_file_that_is_gone(file, stage):
    deps = read_pipeline(file)["stages"][stage]["deps"]
    code = [dep for dep in deps if dep.startswith(("tasks/", "fullscale", "model", "paper/"))]
    assert code
    assert [dep for dep in code if not (ROOT / dep).exists()] == []


@pytest.mark.parametrize(("file", "stage"), CASES)
def test_stage_file_and_command_are_the_same_word(file, stage):
    word = stage.split("-")[0]
    assert (ROOT / "tasks" / f"{word}.py").is_file()
    command = read_pipeline(file)["stages"][stage]["cmd"].removeprefix("exec ")
    assert command.startswith(f"python -m tasks.{word}")


@pytest.mark.parametrize("stage", PAPER_STAGES[:4])
def test_all_pipelines_run_a_stage_on_the_same_code(stage):
    ours, papers, btcvs = (
        {
            dep
            for dep in read_pipeline(file)["stages"][stage]["deps"]
            if not dep.startswith("artifacts/")
        }
        for file in ("dvc.yaml", "paper/dvc.yaml", "btcv/dvc.yaml")
    )
    assert ours == papers == btcvs


def test_rows_of_the_paper_are_those_that_are_trained():
    trained = read_pipeline("paper/params.yaml")["networks"]
    on_btcv = read_pipeline("btcv/params.yaml")["networks"]
    published = (ROOT / "paper/published.csv").read_text().splitlines()[1:]
    rows = [line.split(",")[0] for line in published]
    more = [name for name in on_btcv if name not in trained]
    assert rows == [*trained, "unet-crf", "deeplabv2-crf", *more]


def test_flow_plans_every_stage_of_the_pipeline(pipeline):
    params = load_params(ROOT / "params.yaml").model_copy(update={"seeds": (0, 3)})
    values = {"network": params.networks, "seed": params.seeds}
    stages = []
    for name, stage in pipeline["stages"].items():
        items = product(*(values[key] for key in stage.get("matrix", [])))
        names = ["-".join(str(part) for part in item) for item in items]
        stages += [f"{name}@{item}" if item else name for item in names]
    assert sorted(plan(params)) == sorted(stages)


def test_every_section_of_params_is_read_by_a_stage(pipeline):
    read = {
        name.split(".")[0] for stage in pipeline["stages"].values() for name in stage["params"]
    } | {"networks"}
    assert set(yaml.safe_load((ROOT / "params.yaml").read_text())) - read == {"compute"}
