"""Stage evaluate: one network's test cases, scored in 3D on each scan's own grid."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from model.metrics import OrganScores, score_organ
from scans.cohort import Case, Cohort, read_cohort
from scans.files import write_atomically
from scans.volume import Volume, read_image, read_labels
from tasks.console import StageError, report_errors, track
from tasks.params import load_params
from tasks.pictures import draw_slices, save_picture
from tasks.predict import Predictor, Segmentation
from tasks.provenance import digest_test_set
from tasks.trained import Trained, load_trained

NUM_PICTURE_SLICES = 6
COUNTS = (
    "num_organ_slices",
    "num_free_slices",
    "num_false_positive_slices",
    "num_false_positive_voxels",
    "num_free_voxels",
    "num_false_closings",
    "num_closed_voxels",
    "num_true_voxels",
)


def score_cases(
    predictor: Predictor, cases: Sequence[Case], cohort: Cohort, min_false_positive_px: int
) -> pd.DataFrame:
    """Score every annotated organ of every case.

    Args:
        predictor: a network ready to segment.
        cases: the cases to score.
        cohort: the cohort they come from.
        min_false_positive_px: predicted pixels that make an organ-free slice a false positive.

    Returns:
        One row per case and organ: case, patient, organ, dice, slice_fpr, voxel_fpr and the
        counts of `OrganScores`. Organs that a case does not annotate have no row.
    """
    rows = []
    for case in track(cases, f"scoring {predictor.description.name}", len(cases)):
        scan, labels = read_pair(case)
        found = predictor.segment(scan)
        for organ, scores in score_segmentation(
            found, labels, predictor, case, cohort, min_false_positive_px
        ).items():
            rows.append(
                {
                    "case": case.name,
                    "patient": case.patient,
                    "organ": organ,
                    "dice": scores.dice,
                    "slice_fpr": scores.slice_fpr,
                    "voxel_fpr": scores.voxel_fpr,
                    **{key: value for key, value in asdict(scores).items() if key != "dice"},
                }
            )
    return pd.DataFrame(rows)


def read_pair(case: Case) -> tuple[Volume, Volume]:
    """Scan and annotation of a case."""
    return read_image(case.image), read_labels(case.label)


def score_segmentation(
    found: Segmentation,
    labels: Volume,
    predictor: Predictor,
    case: Case,
    cohort: Cohort,
    min_false_positive_px: int,
) -> dict[str, OrganScores]:
    """Scores of one case for each organ it annotates."""
    organs = predictor.description.organs
    return {
        organ: score_organ(
            torch.from_numpy(found.masks[organ]),
            torch.from_numpy(np.isin(labels.values_ZYX, organs[organ])),
            torch.from_numpy(found.gate_open[organ]),
            min_false_positive_px,
        )
        for organ in cohort.annotated_organs(case, organs)
    }


def summarise(scores: pd.DataFrame, organs: Sequence[str]) -> dict[str, float]:
    """Metrics over cases: mean Dice, pooled rates, and how many cases each mean holds.

    Keys are `test/<metric>/<organ>`, the same in reports and in MLflow. A metric that cannot be
    measured is left out.
    """
    metrics: dict[str, float] = {"test/dice": float(scores["dice"].mean())}
    for organ in organs:
        rows = scores[scores["organ"] == organ]
        total = rows[list(COUNTS)].sum()
        metrics |= {
            f"test/dice/{organ}": float(rows["dice"].mean()),
            f"test/num_cases/{organ}": int(rows["dice"].notna().sum()),
            f"test/slice_fpr/{organ}": _share(
                total["num_false_positive_slices"], total["num_free_slices"]
            ),
            f"test/num_free_slices/{organ}": int(total["num_free_slices"]),
            f"test/voxel_fpr/{organ}": _share(
                total["num_false_positive_voxels"], total["num_free_voxels"]
            ),
            f"test/false_closings/{organ}": _share(
                total["num_false_closings"], total["num_organ_slices"]
            ),
            f"test/closed_volume/{organ}": _share(
                total["num_closed_voxels"], total["num_true_voxels"]
            ),
        }
    return {key: value for key, value in metrics.items() if not math.isnan(value)}


def evaluate_network(
    trained: Trained,
    cohort: Cohort,
    test_cases: Sequence[str],
    *,
    threshold: float,
    batch_size: int,
    min_false_positive_px: int,
) -> tuple[Predictor, pd.DataFrame]:
    """Score a trained network on named cases of a cohort.

    Raises:
        StageError: there is no case to score, or the cohort lacks one.
    """
    by_name = {case.name: case for case in cohort.cases}
    missing = sorted(set(test_cases) - set(by_name))
    if missing or not test_cases:
        raise StageError(
            f"data/ lacks test cases {', '.join(missing)}; run `dvc repro` so that the split "
            "follows the data"
            if missing
            else "the split holds no test cases; add scans or change split.test_fraction"
        )
    predictor = Predictor(trained, threshold, batch_size)
    cases = [by_name[name] for name in test_cases]
    return predictor, score_cases(predictor, cases, cohort, min_false_positive_px)


def picture_cases(scores: pd.DataFrame) -> dict[str, str]:
    """The best, the median and the worst case by mean Dice over organs."""
    ranked = scores.groupby("case")["dice"].mean().dropna().sort_values()
    names = list(ranked.index)
    if not names:
        return {}
    return {"worst": names[0], "median": names[len(names) // 2], "best": names[-1]}


def draw_case(predictor: Predictor, case: Case, cohort: Cohort, heading: str, path: Path) -> None:
    """Picture of slices spread over the organs of a case, with the slices next to them."""
    scan, labels = read_pair(case)
    found = predictor.segment(scan)
    organs = predictor.description.organs
    shown = cohort.annotated_organs(case, organs)
    truth_KZYX = np.stack([np.isin(labels.values_ZYX, organs[organ]) for organ in shown])
    predicted_KZYX = np.stack([found.masks[organ] for organ in shown])
    with_organ = np.flatnonzero((truth_KZYX | predicted_KZYX).any(axis=(0, 2, 3)))
    low, high = (
        (with_organ[0], with_organ[-1]) if len(with_organ) else (0, len(scan.values_ZYX) - 1)
    )
    chosen = np.unique(np.linspace(low, high, NUM_PICTURE_SLICES).round().astype(int))
    figure = draw_slices(
        scan.values_ZYX[chosen],
        truth_KZYX[:, chosen].swapaxes(0, 1),
        predicted_KZYX[:, chosen].swapaxes(0, 1),
        predictor.description.slice.window_hu,
        titles=[f"slice {z}" for z in chosen],
        heading=heading,
    )
    save_picture(figure, path)


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan


@report_errors
def main() -> None:
    """Run the stage for one network: `python -m tasks.evaluate NETWORK`."""
    params = load_params(Path("params.yaml"))
    if len(sys.argv) != 2 or sys.argv[1] not in params.networks:
        raise StageError(
            f"usage: python -m tasks.evaluate NETWORK, one of {', '.join(params.networks)}"
        )
    name = sys.argv[1]
    cohort = read_cohort(Path("data"))
    split = pd.read_csv("artifacts/split.csv", dtype=str)
    test_cases = split.loc[split["fold"] == "test", "case"].tolist()
    predictor, scores = evaluate_network(
        load_trained(Path("artifacts/train") / name),
        cohort,
        test_cases,
        **params.evaluate.model_dump(),
    )
    folder = Path("reports") / name
    write_atomically(folder / "cases.csv", scores.to_csv(index=False, float_format="%.6f"))
    summary = {
        "test_set": digest_test_set(test_cases),
        **{key: round(value, 6) for key, value in summarise(scores, tuple(params.organs)).items()},
    }
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    by_name = {case.name: case for case in cohort.cases}
    for rank, case in picture_cases(scores).items():
        dice = scores.loc[scores["case"] == case, "dice"].mean()
        heading = f"{name}, {rank} test case {case}, Dice {dice:.3f}"
        draw_case(predictor, by_name[case], cohort, heading, folder / f"{rank}.png")
    print(
        f"{name}: " + ", ".join(f"{key} {value}" for key, value in summary.items() if "dice" in key)
    )


if __name__ == "__main__":
    main()
