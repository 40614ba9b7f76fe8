import grimp
import pytest
import yaml
from conftest import ROOT

from flows.stages import plan
from tasks.params import load_params

# What is only said, tracked or told from: a change there changes no artefact.
NO_ARTEFACT = {
    "scans.checks",
    "scans.errors",
    "scans.files",
    "scans.parallel",
    "tasks.checkpoint",
    "tasks.console",
    "tasks.curves",
    "tasks.delivery",
    "tasks.display",
    "tasks.interruption",
    "tasks.journal",
    "tasks.outbox",
    "tasks.params",
    "tasks.processes",
    "tasks.provenance",
    "tasks.registry",
    "tasks.run_folder",
    "tasks.sender",
    "tasks.system_metrics",
    "tasks.tracking",
}
STAGES = ("slice", "split", "train", "evaluate", "register")


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph("tasks", "scans", "model")


@pytest.fixture(scope="module")
def pipeline():
    return yaml.safe_load((ROOT / "dvc.yaml").read_text())


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


@pytest.mark.parametrize("stage", STAGES)
def test_stage_depends_on_the_code_it_imports(stage, graph, pipeline):
    needed = {f"tasks.{stage}"} | graph.find_upstream_modules(f"tasks.{stage}")
    needed -= NO_ARTEFACT
    if stage in ("split", "train"):
        # What scans do to a scan shows in the bytes of artifacts/slices, a dependency itself.
        needed = {name for name in needed if not name.startswith("scans.")}
    if stage == "train":
        needed.discard("tasks.pictures")  # drawn for MLflow only
    missing = needed - listed_modules(pipeline["stages"][stage]["deps"])
    assert not missing


@pytest.mark.parametrize("stage", STAGES)
def test_stage_lists_no_file_that_is_gone(stage, pipeline):
    code = [dep for dep in pipeline["stages"][stage]["deps"] if dep.startswith(("tasks/", "scans"))]
    assert [dep for dep in code if not (ROOT / dep).exists()] == []


@pytest.mark.parametrize("stage", STAGES)
def test_stage_file_and_command_are_the_same_word(stage, pipeline):
    assert (ROOT / "tasks" / f"{stage}.py").is_file()
    command = pipeline["stages"][stage]["cmd"].removeprefix("exec ")
    assert command.startswith(f"python -m tasks.{stage}")


def test_flow_plans_every_stage_of_the_pipeline(pipeline):
    networks = load_params(ROOT / "params.yaml").networks
    stages = []
    for name, stage in pipeline["stages"].items():
        stages += [f"{name}@{network}" for network in networks] if "matrix" in stage else [name]
    assert sorted(plan(load_params(ROOT / "params.yaml"))) == sorted(stages)


def test_every_section_of_params_is_read_by_a_stage(pipeline):
    read = {
        name.split(".")[0] for stage in pipeline["stages"].values() for name in stage["params"]
    } | {"networks"}
    assert set(yaml.safe_load((ROOT / "params.yaml").read_text())) - read == {"compute"}
