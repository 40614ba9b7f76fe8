import json

from conftest import ROOT

from tasks.params import load_params
from tasks.summary import score_rows, verdict_lines


def test_readme_shows_the_published_scores_and_verdict():
    readme = (ROOT / "README.md").read_text()
    for row in score_rows(load_params(ROOT / "params.yaml"), ROOT):
        assert any(all(cell in line for cell in row) for line in readme.splitlines()), row
    gate = json.loads((ROOT / "reports/gate.json").read_text())
    for line in verdict_lines(gate):
        assert line in readme
