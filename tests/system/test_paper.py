import json
import shutil

import pandas as pd
import pytest
import yaml
from project import ROOT, copy_project
from quick_project import SALT

pytestmark = pytest.mark.slow
ROWS = ["unet", "unet3plus-hybrid-cgm"]


def change(path, **sections):
    content = yaml.safe_load(path.read_text())
    for name, values in sections.items():
        content[name] = {**content[name], **values} if isinstance(values, dict) else values
    path.write_text(yaml.safe_dump(content, sort_keys=False))


@pytest.fixture(scope="module")
def compared(quick_template, tmp_path_factory):
    """A clone that ran two of the paper's rows, with tiny networks and one epoch."""
    project = copy_project(quick_template, tmp_path_factory.mktemp("paper"))
    shutil.copytree(ROOT / "paper", project.root / "paper")
    project.run("git", "add", "paper")
    change(
        project.root / "paper/params.yaml",
        networks=ROWS,
        register={"candidate": ROWS[1], "baseline": ROWS[0], "num_bootstrap": 200},
    )
    change(
        project.root / "paper/sample.yaml",
        slice={"size_px": 32, "pixel_mm": 12},
        split={"salt": SALT},
        train={"width": 4, "num_epochs": 1},
    )
    change(project.root / "paper/dvc.yaml", vars=[{"crf_networks": ["unet"]}])
    project.run("git", "commit", "--all", "--quiet", "--message", "smaller")
    project.output = project.run("dvc", "repro", "paper/dvc.yaml:paper_table-sample")
    return project


def test_table_holds_what_was_measured(compared):
    assert "table: 3 of 3 rows were run" in compared.output
    table = pd.read_csv(compared.root / "reports/paper/table.csv")
    assert len(table) == 6
    run = table[table["not_run_because"].isna()]
    assert sorted(set(run["network"])) == ["unet", "unet-crf", ROWS[1]]
    assert (table["on_lits"] == "not run").all()
    assert (run["seconds_per_scan"] > 0).all()
    for network, rows in run.groupby("network"):
        path = compared.root / "artifacts/paper/sample/reports" / network / "summary.json"
        summary = json.loads(path.read_text())
        for _, row in rows.iterrows():
            assert row["dice"] == pytest.approx(summary[f"test/dice/{row['organ']}"], abs=1e-6)
    text = (compared.root / "reports/paper/table.md").read_text()
    assert "Slices of 32 px, width 4" in text
    assert (compared.root / "reports/paper/table.png").read_bytes().startswith(b"\x89PNG")


def test_main_pipeline_is_left_alone(compared):
    changed = compared.run("git", "status", "--porcelain", "--untracked-files=all")
    names = {line[3:] for line in changed.splitlines()}
    tables = {f"reports/paper/table.{ending}" for ending in ("csv", "md", "png")}
    assert {"paper/dvc.lock"} <= names <= {"paper/dvc.lock"} | tables
    assert not (compared.root / "artifacts/train").exists()
    planned = compared.run("dvc", "repro", "--dry", code=None)  # it ends where nothing is there
    assert "Running stage 'slice'" in planned
    assert "paper" not in planned.replace(str(compared.root), "")


def test_second_run_trains_nothing(compared):
    again = compared.run("dvc", "repro", "paper/dvc.yaml:paper_table-sample")
    assert "Running stage" not in again
    assert "up to date" in again
