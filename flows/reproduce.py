"""Reproduce the published result: every stage of dvc.yaml, each as its own Prefect task.

`python -m flows.reproduce` needs no server: Prefect starts one for the time of the run.
"""

from __future__ import annotations

from pathlib import Path

from prefect import flow
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from flows.stages import pull_data, run_stage
from tasks.params import Params, load_params
from tasks.report_style import to_png_uri
from tasks.report_verdict import gain_charts
from tasks.results import Verdict
from tasks.summary import read_report, score_rows, verdict_lines


def plan(params: Params) -> list[str]:
    """The stages of dvc.yaml in an order in which each follows what it needs."""
    return [
        "slice",
        "split",
        *(f"train@{network}" for network in params.networks),
        *(f"evaluate@{network}" for network in params.networks),
        "register",
    ]


@flow(name="reproduce", log_prints=True)
def reproduce(root: Path | None = None) -> str:
    """Run the DAG and show its result.

    Args:
        root: the project; None is the working directory.

    Returns:
        The gate's status: pass, fail or undecided.
    """
    root = (root or Path()).resolve()
    params = load_params(root / "params.yaml")
    pull_data(root)
    for stage in plan(params):
        run_stage(stage, root)
    verdict = read_report(root / "reports" / "gate.json")
    headings = ("organ", "network", "dice", "slice_fpr", "num_cases")
    create_table_artifact(
        key="results",
        table=[dict(zip(headings, row, strict=True)) for row in score_rows(params, root)],
        description="Test set, scored in 3D on each scan's own grid",
    )
    show_verdict(verdict)
    return str(verdict["status"])


def show_verdict(verdict: Verdict) -> None:
    """Leave the verdict and its differences in Dice as artifacts of the run; call it in a flow."""
    create_markdown_artifact(key="verdict", markdown="\n".join(verdict_lines(verdict)))
    for figure, words in gain_charts(verdict)[:1]:
        create_image_artifact(key="differences", image_url=to_png_uri(figure), description=words)


def main() -> None:
    """Run the flow on the working directory, with Prefect's state kept inside the project."""
    reproduce(Path())


if __name__ == "__main__":
    main()
