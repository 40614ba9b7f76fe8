"""Artifacts of a run in the Prefect UI: scores, verdict, folds, pictures."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from prefect import get_run_logger, task
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

from fullscale.evaluation.promotion_gate import VERDICT_WORDS
from fullscale.evaluation.score_files import VerdictContent
from fullscale.params import Params
from fullscale.reporting.results import Results, read_results
from fullscale.reporting.text_summary import score_rows, verdict_lines
from fullscale.tracking.pages import run_url
from fullscale.tracking.registry import find_training_run
from fullscale.tracking.store import Store
from fullscale.workspace import Workspace, open_workspace

if TYPE_CHECKING:
    import pandas as pd

PICTURES = {"worst": "The test case with the lowest Dice", "median": "The median test case"}


def show_results(params: Params, root: Path, store: Store) -> VerdictContent:
    """Show the results of finished stages as artifacts of the run; call it in a flow.

    Args:
        params: of the project at `root`.
        root: the project, or a checkout of it.
        store: the MLflow store of its trainings.

    Returns:
        The content of reports/gate.json.
    """
    workspace = open_workspace(root)
    results = read_results(workspace, params)
    verdict = results.require_verdict()
    headings = ("organ", "network", "dice", "slice_fpr", "num_cases")
    show_verdict(verdict)
    create_table_artifact(
        key="results",
        table=[dict(zip(headings, row, strict=True)) for row in score_rows(results)],
        description="Test set, scored in 3D on each scan's own grid",
    )
    show_folds(workspace)
    show_training_run(verdict, store)
    for rank, words in PICTURES.items():
        picture = (workspace.report(verdict["candidate"]) / f"{rank}.png").read_bytes()
        create_image_artifact(
            key=f"overlay-{rank}",
            image_url=f"data:image/png;base64,{base64.b64encode(picture).decode()}",
            description=f"{words}, segmented by {verdict['candidate']}",
        )
    show_report(results, params, store)
    return verdict


@task(task_run_name="report")
def show_report(results: Results, params: Params, store: Store) -> None:
    """Write the report's page, add it to the candidate's MLflow run, and show its charts.

    Its overlays stay in the page and in MLflow: there are too many for a list of artifacts.
    """
    from fullscale.reporting.page import PAGE  # charts take a second to import
    from tasks.report import track_report, write_report

    workspace = results.workspace
    report = write_report(results, params, workspace.reports / PAGE, with_overlays=True)
    for note in report.notes:
        get_run_logger().info("report: %s", note)
    track_report(report, params, workspace, store)
    for name, picture in report.pictures.items():
        if not name.startswith(("verdict-", "cases-")):
            create_image_artifact(
                key=f"report-{name}", image_url=picture.uri, description=picture.alt
            )


def show_status(status: str) -> None:
    """Add the status of the promotion gate to name and tags of the run; call it in a flow.

    Prefect's lists of runs show both, while the state is `Completed` for a pass and a fail alike.
    """
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(UUID(str(flow_run.id)))
        name = f"{run.name}: {status.upper() if status in VERDICT_WORDS else status}"
        client.update_flow_run(run.id, name=name, tags=[*run.tags, status])


def show_verdict(verdict: VerdictContent) -> None:
    """Show the verdict and its differences in Dice as artifacts of the run; call it in a flow."""
    from fullscale.reporting.sections import gain_charts  # charts take a second to import
    from fullscale.reporting.style import to_png_uri

    create_markdown_artifact(
        key="verdict",
        markdown="\n".join(verdict_lines(verdict)),
        description=f"Verdict of the promotion gate: {VERDICT_WORDS[verdict['status']]}",
    )
    for figure, words in gain_charts(verdict)[:1]:
        create_image_artifact(key="differences", image_url=to_png_uri(figure), description=words)


def show_folds(workspace: Workspace) -> None:
    """Show the patients of each fold as an artifact of the run; call it in a flow."""
    from fullscale.patient_split import read_split  # it loads pandas

    table = read_split(workspace.split)
    create_table_artifact(key="folds", table=fold_rows(table), description="Patients by fold")


def fold_rows(split: pd.DataFrame) -> list[dict[str, str | int]]:
    """Return one row per fold: its name, number of patients and cases, and the patients.

    Args:
        split: columns case, patient, fold; one row per case.
    """
    return [
        {
            "fold": str(fold),
            "num_patients": rows["patient"].nunique(),
            "num_cases": len(rows),
            "patients": ", ".join(sorted(rows["patient"].unique())),
        }
        for fold, rows in split.groupby("fold", sort=False)
    ]


def show_training_run(verdict: VerdictContent, store: Store) -> None:
    """Link to the MLflow run that trained the candidate, if a server shows it."""
    run_id = find_training_run(store, verdict["weights_sha256"])
    url = None if run_id is None else run_url(store, run_id)
    if url is None:
        get_run_logger().info("MLflow run %s is in %s", run_id, store.uri)
        return
    create_link_artifact(
        key="mlflow-run", link=url, link_text="MLflow run", description="Training of the candidate"
    )
