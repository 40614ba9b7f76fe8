"""Stage evaluate: one network's test cases, scored in 3D on each scan's own grid."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from fullscale.evaluation.calibration import ReliabilityCurve
from fullscale.evaluation.case_scores import read_pair
from fullscale.evaluation.slice_pictures import choose_slices, draw_slices
from fullscale.evaluation.summary import (
    evaluate_network,
    picture_cases,
    summarise,
    summarise_calibration,
    tabulate,
)
from fullscale.prediction.network_files import load_trained
from fullscale.prediction.predictor import Predictor
from fullscale.runtime.console import report_errors
from fullscale.runtime.files import save_picture, write_atomically
from fullscale.scans.cohort import Case, Cohort, read_cohort
from fullscale.versioning.provenance import digest_test_set
from fullscale.workspace import parse_network_command


def draw_case(predictor: Predictor, case: Case, cohort: Cohort, heading: str, path: Path) -> None:
    """Picture of slices spread over the organs of a case, with the slices next to them."""
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
    workspace, params, name = parse_network_command("evaluate", sys.argv[1:])
    cohort = read_cohort(workspace.root / "data")
    split = pd.read_csv(workspace.split, dtype=str)
    test_cases = split.loc[split["fold"] == "test", "case"].tolist()
    trained = load_trained(workspace.trained(name))
    calibration = {organ: ReliabilityCurve() for organ in trained.description.organs}
    predictor, scores = evaluate_network(
        trained, cohort, test_cases, **params.evaluate.model_dump(), calibration=calibration
    )
    folder = workspace.reports / name
    for file, table in (("cases.csv", scores), ("calibration.csv", tabulate(calibration))):
        write_atomically(folder / file, table.to_csv(index=False, float_format="%.6f"))
    metrics = summarise(scores, tuple(params.organs), params.register_)
    metrics |= summarise_calibration(calibration)
    summary = {
        "test_set": digest_test_set(test_cases),
        **{key: round(value, 6) for key, value in metrics.items()},
    }
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    by_name = {case.name: case for case in cohort.cases}
    for rank, case in picture_cases(scores).items():
        dice = scores.loc[scores["case"] == case, "dice"].mean()
        heading = f"{name}, {rank} test case {case}, Dice {dice:.3f}"
        draw_case(predictor, by_name[case], cohort, heading, folder / f"{rank}.png")
    means = [key for key in summary if key == "test/dice" or key.startswith("test/dice/")]
    print(f"{name}: " + ", ".join(f"{key} {summary[key]}" for key in means))


if __name__ == "__main__":
    main()
