"""Stage evaluate: one network's test cases, scored in 3D on each scan's own grid."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from fullscale.evaluation.calibration import ReliabilityCurve
from fullscale.evaluation.case_scores import read_pair
from fullscale.evaluation.score_files import (
    read_out_of_fold,
    read_scores,
    write_calibration,
    write_scores,
    write_summary,
)
from fullscale.evaluation.slice_pictures import choose_slices, draw_slices
from fullscale.evaluation.summary import (
    find_cases,
    make_predictor,
    picture_cases,
    score_trainings,
    summarise,
    summarise_calibration,
    summarise_out_of_fold,
    summarise_seeds,
    tabulate_calibration,
)
from fullscale.label_names import resolve_organs
from fullscale.patient_split import cases_of, read_split, split_of_seed
from fullscale.prediction.components import label_mask
from fullscale.runtime.console import report_errors
from fullscale.runtime.cpu_kernels import fix_cpu_kernels
from fullscale.runtime.files import save_picture
from fullscale.runtime.startup import keep_freed_memory
from fullscale.scans.cohort import IGNORED_ID, Case, Cohort, read_cohort
from fullscale.versioning.provenance import digest_test_set
from fullscale.workspace import parse_evaluate_command

if TYPE_CHECKING:
    from fullscale.params import Params
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
    truth_KZYX = np.stack([label_mask(labels.values_ZYX, organs[organ]) for organ in shown])
    judged_ZYX = labels.values_ZYX != IGNORED_ID
    predicted_KZYX = np.stack([found.masks[organ] & judged_ZYX for organ in shown])
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


@dataclass(frozen=True)
class Scored:
    """A network or ensemble, ready to segment, and what it scored on the test cases.

    Attributes:
        predictor: the network or ensemble.
        scores: as `score_cases` returns them.
        calibration: organ to the curve of its voxels; empty unless it was asked for.
    """

    predictor: Predictor
    scores: pd.DataFrame
    calibration: dict[str, ReliabilityCurve]


def score_networks(
    folders: Sequence[Path],
    cohort: Cohort,
    names: Sequence[str],
    params: Params,
    calibrated: Sequence[Path] = (),
) -> list[Scored]:
    """Score each training of a network alone, then, of several, all of them as an ensemble.

    Args:
        folders: of the trainings.
        cohort: the cohort of the cases.
        names: of the cases.
        params: all of params.yaml.
        calibrated: the trainings, one or all, whose calibration is wanted.

    Raises:
        StageError: a network is missing or damaged, or the cohort lacks a case.
    """
    # Late: torch takes seconds to import, and a wrong command line must fail at once.
    from fullscale.prediction.network_files import load_members

    groups = [[folder] for folder in folders]
    if len(folders) > 1:
        groups.append(list(folders))
    cases = find_cases(cohort, names)
    predictors = [make_predictor(load_members(group), params.evaluate) for group in groups]
    organs = resolve_organs(params.organs, cohort.labels)
    curves = [
        {organ: ReliabilityCurve() for organ in params.organs if group == list(calibrated)}
        for group in groups
    ]
    tables = score_trainings(
        predictors[: len(folders)],
        predictors[-1] if len(folders) > 1 else None,
        cases,
        cohort,
        params.evaluate,
        [curve or None for curve in curves],
        organs,
    )
    return [Scored(*each) for each in zip(predictors, tables, curves, strict=True)]


@report_errors
def main() -> None:
    """Run the stage for one network: `python -m tasks.evaluate NETWORK [--refine crf]`."""
    from fullscale.prediction.network_files import choose_deployed

    keep_freed_memory()
    workspace, params, network, name = parse_evaluate_command(sys.argv[1:])
    fix_cpu_kernels(params.train.cpu_kernels, params.train.num_threads)
    cohort = read_cohort(workspace.data)
    split = read_split(workspace.split)
    test_cases = cases_of(split, "test")
    seeds = tuple(sorted(params.seeds))
    folders = workspace.trainings(network, seeds)
    chosen = choose_deployed(folders, params.register_.deploy)
    *alone, together = score_networks(folders, cohort, test_cases, params, chosen)
    alone = alone or [together]
    members = tuple(int(folder.name) for folder in chosen)
    deployed = together if len(members) > 1 else alone[seeds.index(members[0])]
    trainings = {seed: each.scores for seed, each in zip(seeds, alone, strict=True)}
    # Each training on the cases that it validated on: together all that are not tested.
    unseen = {
        seed: score_networks(
            workspace.trainings(name, [seed]),
            cohort,
            cases_of(split_of_seed(split, params.split, seed), "val"),
            params,
        )[0].scores
        for seed in (seeds if params.split.rotate else ())
    }
    ensemble = together.scores if len(seeds) > 1 else None
    write_scores(workspace, name, trainings, ensemble, unseen)
    write_calibration(workspace, name, tabulate_calibration(deployed.calibration))
    organs = tuple(params.organs)
    metrics = summarise(deployed.scores, organs, params.register_)
    metrics |= summarise_seeds(read_scores(workspace, name), organs)
    metrics |= summarise_out_of_fold(read_out_of_fold(workspace, name), organs)
    metrics |= summarise_calibration(deployed.calibration)
    by_name = {case.name: case for case in cohort.cases}
    test_set = digest_test_set(by_name[case] for case in deployed.scores["case"].unique())
    summary = write_summary(workspace, name, test_set, metrics, seeds, members)
    for rank, case in picture_cases(deployed.scores).items():
        dice = deployed.scores.loc[deployed.scores["case"] == case, "dice"].mean()
        heading = f"{name}, {rank} test case {case}, Dice {dice:.3f}"
        path = workspace.report(name) / f"{rank}.png"
        draw_case(deployed.predictor, by_name[case], cohort, heading, path)
    means = [key for key in summary if key == "test/dice" or key.startswith("test/dice/")]
    print(f"{name}: " + ", ".join(f"{key} {summary[key]}" for key in means))


if __name__ == "__main__":
    main()
