"""Scores of cases, their means and intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import pandas as pd

from fullscale.evaluation.calibration import ReliabilityCurve
from fullscale.evaluation.case_scores import (
    CLEANED,
    VARIANTS,
    ScoreRow,
    is_ablated,
    predict_case,
    score_case,
)
from fullscale.evaluation.paired import SEED, count_seeds, of_organ
from fullscale.evaluation.statistics import Interval, mean_over_cases, pooled_mean
from fullscale.params import EvaluateParams, RegisterParams
from fullscale.runtime.console import track
from fullscale.runtime.errors import StageError
from fullscale.scans.cohort import Case, Cohort
from fullscale.scans.volume import read_image, read_labels
from model.overlap import share

if TYPE_CHECKING:
    from fullscale.prediction.network_files import Trained
    from fullscale.prediction.predictor import Predictor

SUFFIXES = ("", *VARIANTS.values(), CLEANED)
MEANS = {
    "dice": (0.0, 1.0),
    "iou": (0.0, 1.0),
    "hd95_mm": (0.0, math.inf),
    "mean_surface_distance_mm": (0.0, math.inf),
    "surface_dice_1mm": (0.0, 1.0),
    "surface_dice_3mm": (0.0, 1.0),
    "area_surface_dice_1mm": (0.0, 1.0),
    "area_surface_dice_3mm": (0.0, 1.0),
    "volume_difference_ml": (-math.inf, math.inf),
}
"""Metrics that are averaged over cases, with their lowest and highest possible value."""
RATES = {
    "slice_fpr": ("num_false_positive_slices", "num_free_slices"),
    "near_slice_fpr": ("num_near_false_positive_slices", "num_near_free_slices"),
    "remote_slice_fpr": ("num_remote_false_positive_slices", "num_remote_free_slices"),
    "voxel_fpr": ("num_false_positive_voxels", "num_free_voxels"),
    "false_closings": ("num_false_closings", "num_organ_slices"),
    "false_openings": ("num_false_openings", "num_free_slices"),
    "closed_volume": ("num_closed_voxels", "num_true_voxels"),
}
"""Rates that are pooled over cases: the sum of one count divided by the sum of another.

The second one counts the annotation, so a variant of the prediction does not change it.
"""
TOTALS = (
    "num_organ_slices",
    "num_free_slices",
    "num_near_free_slices",
    "num_remote_free_slices",
    "num_free_voxels",
)
"""Counts of the annotation over which rates are taken; their sums are part of a summary."""


def score_cases(
    predictor: Predictor,
    cases: Sequence[Case],
    cohort: Cohort,
    settings: EvaluateParams,
    calibration: Mapping[str, ReliabilityCurve] | None = None,
    organs: Mapping[str, Sequence[int]] | None = None,
) -> pd.DataFrame:
    """Score every annotated organ of every case, one scan at a time.

    Args:
        predictor: a network ready to segment.
        cases: the cases to score.
        cohort: the cohort of the cases.
        settings: the section `evaluate` of params.yaml.
        calibration: organ to the curve to which its voxels are added.
        organs: the organs to score, with their label ids in the annotation; None: those that the
            network was trained with.

    Returns:
        One row per case and organ, as `score_case` makes them. Organs that a case does not
        annotate have no row.
    """
    return score_trainings([predictor], None, cases, cohort, settings, [calibration], organs)[0]


def score_trainings(
    members: Sequence[Predictor],
    ensemble: Predictor | None,
    cases: Sequence[Case],
    cohort: Cohort,
    settings: EvaluateParams,
    calibrations: Sequence[Mapping[str, ReliabilityCurve] | None],
    organs: Mapping[str, Sequence[int]] | None = None,
) -> list[pd.DataFrame]:
    """Score trainings of a network and their ensemble; each training segments a case once.

    Args:
        members: the trainings, ready to segment, of equal descriptions.
        ensemble: of all of them; None: only they are scored.
        cases: the cases to score.
        cohort: the cohort of the cases.
        settings: the section `evaluate` of params.yaml.
        calibrations: for each member, then for the ensemble, as for `score_cases`.
        organs: as for `score_cases`.

    Returns:
        For each member, then for the ensemble, what `score_cases` returns.
    """
    # Late: torch takes seconds to import, and most readers of scores do without.
    from model.inference import join_predictions

    predictors = [*members, *([] if ensemble is None else [ensemble])]
    organs = members[0].description.organs if organs is None else organs
    rows: list[list[ScoreRow]] = [[] for _ in predictors]
    for case in track(cases, f"scoring {members[0].description.name}", len(cases)):
        slices = members[0].slice_scan(read_image(case.image))
        predicted = [predict_case(member, slices, settings) for member in members]
        if ensemble is not None:
            gated = [
                found.gated(member.gate) if is_ablated(member, settings) else found
                for member, found in zip(members, predicted, strict=True)
            ]
            joined = join_predictions([found.prediction for found in gated])
            predicted.append(replace(gated[0], prediction=joined))
        labels = read_labels(case.label)
        for predictor, found, curve, scores in zip(
            predictors, predicted, calibrations, rows, strict=True
        ):
            scores += score_case(predictor, found, case, labels, cohort, organs, settings, curve)
    return [pd.DataFrame(scores) for scores in rows]


def summarise(
    scores: pd.DataFrame, organs: Sequence[str], params: RegisterParams | None = None
) -> dict[str, float]:
    """Return metrics over cases: means, pooled rates, and the counts behind them.

    Keys are `test/<metric>/<organ>`, the same in reports and in MLflow. A metric that cannot be
    measured is left out.

    Args:
        scores: as `score_cases` returns them.
        organs: sets the order of the keys.
        params: confidence, num_bootstrap and seed of intervals, with the keys
            `test/<metric>_low/<organ>` and `test/<metric>_high/<organ>`; None: no intervals. An
            interval without width or with an infinite end is left out: the cases are too few or
            too similar.

    Returns:
        For each organ the means over `num_cases` cases, of which `num_organ_free` do not have it,
        the rates with the counts of slices or voxels they are taken over, and the number of missed
        organs: those that only the prediction or only the annotation holds.
    """
    metrics: dict[str, float] = {
        "test/dice": float(scores["dice"].mean()),
        "test/num_pairs": int(scores["dice"].notna().sum()),
    }
    if params is not None:
        overall = mean_over_cases(scores["dice"], scores["patient"], params)
        metrics |= _ends("test/dice", overall, MEANS["dice"])
    for organ in organs:
        rows = scores[scores["organ"] == organ]
        missed = (rows["num_true_voxels"] == 0) != (rows["num_predicted_voxels"] == 0)
        found = {
            "num_cases": int(rows["dice"].notna().sum()),
            "num_organ_free": int((rows["num_true_voxels"] == 0).sum()),
            "num_missed": int(missed.sum()),
            **{name: int(rows[name].sum()) for name in TOTALS if name in rows},
        } | _summarise_organ(rows, params)
        metrics |= {f"test/{metric}/{organ}": value for metric, value in found.items()}
    return {key: value for key, value in metrics.items() if not math.isnan(value)}


def summarise_seeds(trainings: pd.DataFrame, organs: Sequence[str]) -> dict[str, float]:
    """Return mean and standard deviation of Dice over trainings; nothing with one training.

    Keys are `test/dice_seeds_mean` and `test/dice_seeds_sd`, of all organs together, and
    `test/dice_seeds_mean/<organ>` and `test/dice_seeds_sd/<organ>`. The Dice of a training is the
    mean over cases, as `summarise` takes it.

    Args:
        trainings: as `read_scores` returns them.
        organs: sets the order of the keys.
    """
    if count_seeds(trainings) < 2:
        return {}
    metrics: dict[str, float] = {}
    for organ in ("all", *organs):
        by_seed = of_organ(trainings, organ).groupby(SEED)["dice"].mean()
        ending = "" if organ == "all" else f"/{organ}"
        metrics[f"test/dice_seeds_mean{ending}"] = float(by_seed.mean())
        metrics[f"test/dice_seeds_sd{ending}"] = float(by_seed.std(ddof=1))
    return {key: value for key, value in metrics.items() if not math.isnan(value)}


def summarise_out_of_fold(scores: pd.DataFrame, organs: Sequence[str]) -> dict[str, float]:
    """Return means over patients outside the test set, scored by the trainings that left them out.

    Keys are `out_of_fold/num_patients`, `out_of_fold/dice` and `out_of_fold/dice/<organ>`, means
    over cases, and `out_of_fold/slice_fpr/<organ>`. There are none without cross-validation.

    Args:
        scores: as `read_out_of_fold` returns them.
        organs: sets the order of the keys.
    """
    if scores.empty:
        return {}
    found = summarise(scores, organs)
    names = ["dice", *(f"{metric}/{organ}" for metric in ("dice", "slice_fpr") for organ in organs)]
    means = {f"out_of_fold/{name}": found.get(f"test/{name}", math.nan) for name in names}
    return {
        "out_of_fold/num_patients": int(scores["patient"].nunique()),
        **{key: value for key, value in means.items() if not math.isnan(value)},
    }


def _summarise_organ(rows: pd.DataFrame, params: RegisterParams | None) -> dict[str, float]:
    found: dict[str, float] = {}
    patients = rows["patient"]
    for suffix in SUFFIXES:
        for metric, limits in MEANS.items():
            name = f"{metric}{suffix}"
            if name in rows:
                found[name] = float(rows[name].mean())
                if params is not None:
                    found |= _ends(name, mean_over_cases(rows[name], patients, params), limits)
        for metric, (part, whole) in RATES.items():
            name, parts = f"{metric}{suffix}", f"{part}{suffix}"
            if parts in rows:
                found[name] = share(rows[parts].sum(), rows[whole].sum())
                if params is not None:
                    pooled = pooled_mean(rows[parts], rows[whole], patients, params)
                    found |= _ends(name, pooled, (0.0, 1.0))
    if "false_closings" in found:
        found["classifier_sensitivity"] = 1 - found["false_closings"]
        found["classifier_specificity"] = 1 - found["false_openings"]
    return found


def _ends(metric: str, interval: Interval, limits: tuple[float, float]) -> dict[str, float]:
    if not (interval.low < interval.high and math.isfinite(interval.high - interval.low)):
        return {}
    low, high = limits
    return {f"{metric}_low": max(low, interval.low), f"{metric}_high": min(high, interval.high)}


def make_predictor(trained: Trained, settings: EvaluateParams) -> Predictor:
    """Return a network ready to segment, with the section `evaluate` of params.yaml."""
    from fullscale.prediction.predictor import Predictor

    return Predictor(
        trained,
        settings.threshold,
        settings.batch_size,
        precision=settings.precision,
        gate=settings.gate,
        refine=settings.refine,
    )


def evaluate_network(
    trained: Trained,
    cohort: Cohort,
    test_cases: Sequence[str],
    settings: EvaluateParams,
    calibration: Mapping[str, ReliabilityCurve] | None = None,
    organs: Mapping[str, Sequence[int]] | None = None,
) -> tuple[Predictor, pd.DataFrame]:
    """Score a trained network on named cases of a cohort.

    Args:
        trained: the network.
        cohort: the cohort of the cases.
        test_cases: names of the cases.
        settings: the section `evaluate` of params.yaml.
        calibration: organ to the curve to which its voxels are added.
        organs: as `score_cases` takes them.

    Returns:
        The network ready to segment, and the scores as `score_cases` returns them.

    Raises:
        StageError: as `find_cases`.
    """
    cases = find_cases(cohort, test_cases)
    predictor = make_predictor(trained, settings)
    return predictor, score_cases(predictor, cases, cohort, settings, calibration, organs)


def find_cases(cohort: Cohort, test_cases: Sequence[str]) -> list[Case]:
    """Return the named cases of a cohort.

    Raises:
        StageError: `test_cases` is empty, or the cohort lacks one of them.
    """
    by_name = {case.name: case for case in cohort.cases}
    missing = sorted(set(test_cases) - set(by_name))
    if missing or not test_cases:
        raise StageError(
            f"data/ lacks cases {', '.join(missing)}; run `dvc repro` so that the split "
            "follows the data"
            if missing
            else "the split holds no test cases; add scans or change split.test_fraction"
        )
    return [by_name[name] for name in test_cases]


def tabulate_calibration(calibration: Mapping[str, ReliabilityCurve]) -> pd.DataFrame:
    """Return reliability curves as one table: organ, and the columns of `ReliabilityCurve.rows`."""
    rows = [{"organ": organ, **row} for organ, curve in calibration.items() for row in curve.rows()]
    return pd.DataFrame(
        rows,
        columns=["organ", "bin_low", "bin_high", "num_voxels", "mean_probability", "fraction_true"],
    )


def summarise_calibration(calibration: Mapping[str, ReliabilityCurve]) -> dict[str, float]:
    """Return expected calibration errors and numbers of voxels of each organ that was counted."""
    metrics: dict[str, float] = {}
    for organ, curve in calibration.items():
        if curve.num_voxels:
            metrics[f"test/ece/{organ}"] = curve.expected_error
            metrics[f"test/num_calibration_voxels/{organ}"] = curve.num_voxels
        if curve.num_uncertain_voxels:
            metrics[f"test/uncertain_ece/{organ}"] = curve.uncertain_error
            metrics[f"test/num_uncertain_voxels/{organ}"] = curve.num_uncertain_voxels
    return metrics


def picture_cases(scores: pd.DataFrame) -> dict[str, str]:
    """Return the worst, the median and the best case by mean Dice over organs.

    Args:
        scores: columns case and dice.

    Returns:
        "worst", "median" and "best" to the name of a case; empty if no case has a Dice.
    """
    ranked = scores.groupby("case")["dice"].mean().dropna().sort_values()
    names = list(ranked.index)
    if not names:
        return {}
    return {"worst": names[0], "median": names[len(names) // 2], "best": names[-1]}
