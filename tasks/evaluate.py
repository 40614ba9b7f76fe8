"""Stage evaluate: one network's test cases, scored in 3D on each scan's own grid."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from fullscale.evaluation.calibration import ReliabilityCurve
from fullscale.evaluation.case_scores import read_pair
from fullscale.evaluation.score_files import write_calibration, write_scores, write_summary
from fullscale.evaluation.slice_pictures import choose_slices, draw_slices
from fullscale.evaluation.summary import (
    evaluate_network,
    picture_cases,
    summarise,
    summarise_calibration,
    tabulate_calibration,
)
from fullscale.label_names import resolve_organs
from fullscale.runtime.console import report_errors
from fullscale.runtime.cpu_kernels import fix_cpu_kernels
from fullscale.runtime.files import save_picture
from fullscale.scans.cohort import Case, Cohort, read_cohort
from fullscale.versioning.provenance import digest_test_set
from fullscale.workspace import parse_network_command

if TYPE_CHECKING:
    from fullscale.prediction.predictor import Predictor


def draw_case(predictor: Predictor, case: Case, cohort: Cohort, heading: str, path: Path) -> None:
    """Write a picture of slices spread over the organs of a case, with truth and prediction.

    Args:
        predictor: a network ready to segment.
        case: the case to draw.
        cohort: the cohort of the case.
        heading: title of the picture.
        path: the PNG file.
    """
    scan, labels = read_pair(case)
    found = predictor.segment(scan)
    organs = predictor.description.organs
    shown = cohort.annotated_organs(case, organs)
    truth_KZYX = np.stack([np.isin(labels.values_ZYX, organs[organ]) for organ in shown])
    predicted_KZYX = np.stack([found.masks[organ] for organ in shown])
    chosen = choose_slices([truth_KZYX, predicted_KZYX])
    figure = draw_slices(
        scan.values_ZYX[chosen],
        truth_KZYX[:, chosen].swapaxes(0, 1),
        predicted_KZYX[:, chosen].swapaxes(0, 1),
        predictor.description.slice.window_hu,
        titles=[f"slice {z}" for z in chosen],
        heading=heading,
    )
    save_picture(figure, path)


@report_errors
def main() -> None:
    """Run the stage for one network: `python -m tasks.evaluate NETWORK`."""
    # Late: torch takes seconds to import, and a wrong command line must fail at once.
    from fullscale.prediction.network_files import load_trained

    workspace, params, name = parse_network_command("evaluate", sys.argv[1:])
    fix_cpu_kernels(params.train.cpu_kernels, params.train.num_threads)
    cohort = read_cohort(workspace.data)
    organs = resolve_organs(params.organs, cohort.labels)
    split = pd.read_csv(workspace.split, dtype=str)
    test_cases = split.loc[split["fold"] == "test", "case"].tolist()
    trained = load_trained(workspace.trained(name))
    calibration = {organ: ReliabilityCurve() for organ in trained.description.organs}
    predictor, scores = evaluate_network(
        trained, cohort, test_cases, params.evaluate, calibration, organs
    )
    write_scores(workspace, name, scores)
    write_calibration(workspace, name, tabulate_calibration(calibration))
    metrics = summarise(scores, tuple(params.organs), params.register_)
    metrics |= summarise_calibration(calibration)
    by_name = {case.name: case for case in cohort.cases}
    test_set = digest_test_set(by_name[case] for case in scores["case"].unique())
    summary = write_summary(workspace, name, test_set, metrics)
    for rank, case in picture_cases(scores).items():
        dice = scores.loc[scores["case"] == case, "dice"].mean()
        heading = f"{name}, {rank} test case {case}, Dice {dice:.3f}"
        path = workspace.report(name) / f"{rank}.png"
        draw_case(predictor, by_name[case], cohort, heading, path)
    means = [key for key in summary if key == "test/dice" or key.startswith("test/dice/")]
    print(f"{name}: " + ", ".join(f"{key} {summary[key]}" for key in means))


if __name__ == "__main__":
    main()
