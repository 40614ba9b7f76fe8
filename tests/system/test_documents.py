import hashlib
import json

import yaml
from project import ROOT

from fullscale.params import load_params
from fullscale.reporting.text_summary import score_rows, verdict_lines


def test_readme_shows_the_published_scores_and_verdict():
    readme = (ROOT / "README.md").read_text()
    for row in score_rows(load_params(ROOT / "params.yaml"), ROOT):
        assert any(all(cell in line for cell in row) for line in readme.splitlines()), row
    gate = json.loads((ROOT / "reports/gate.json").read_text())
    for line in verdict_lines(gate):
        assert line in readme


def test_papers_table_is_the_one_its_pipeline_wrote():
    lock = yaml.safe_load((ROOT / "paper/dvc.lock").read_text())["stages"]["paper_table-sample"]
    for out in lock["outs"]:
        content = (ROOT / out["path"]).read_bytes()
        assert hashlib.md5(content, usedforsecurity=False).hexdigest() == out["md5"], out["path"]
    for file, values in lock["params"].items():
        now = yaml.safe_load((ROOT / file).read_text())
        assert {key: now[key] for key in values} == values


def test_method_shows_the_papers_table():
    method = (ROOT / "docs/method.md").read_text()
    table = (ROOT / "reports/paper/table.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) > 50
    assert [line for line in rows if line not in method] == []


def test_reading_of_the_papers_table_has_its_gains():
    method = (ROOT / "docs/method.md").read_text()
    table = (ROOT / "reports/paper/table.md").read_text()
    claims = table.partition("## What the paper says is better\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in claims.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 7
    for claim, _, _, gain, *_ in rows:
        assert f"{claim} | {gain} |" in method
