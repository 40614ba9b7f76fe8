"""The gate: does a candidate beat the baseline, on paired test cases, by what params ask for?

Pure functions of score tables; nothing here knows where scores or models are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from tasks.params import RegisterParams

Status = Literal["pass", "fail", "undecided"]


@dataclass(frozen=True)
class Gain:
    """A paired difference in Dice, candidate less other.

    Attributes:
        mean: mean over patients of each patient's mean difference.
        low, high: bootstrap interval of that mean, patients resampled.
        num_patients: patients with at least one pair.
        num_pairs: pairs of case and organ in which both Dice are defined.
    """

    mean: float
    low: float
    high: float
    num_patients: int
    num_pairs: int


@dataclass(frozen=True)
class Clause:
    """One condition of the gate: what was found, what was wanted, and whether it holds."""

    name: str
    passed: bool
    found: str
    wanted: str


@dataclass(frozen=True)
class Verdict:
    """The outcome and every reason for it."""

    status: Status
    clauses: tuple[Clause, ...]
    gain: Gain


def paired_gain(candidate: pd.DataFrame, other: pd.DataFrame, params: RegisterParams) -> Gain:
    """Difference in Dice between two networks scored on the same cases.

    Patients, not scans, are resampled, because two scans of one patient are not independent
    (percentile bootstrap; Efron and Tibshirani 1993).

    Args:
        candidate: columns case, patient, organ, dice.
        other: the same columns.
        params: confidence, num_bootstrap and seed.

    Returns:
        The difference; NaN figures when no pair is defined.
    """
    pairs = candidate.merge(
        other, on=["case", "patient", "organ"], suffixes=("", "_other"), validate="one_to_one"
    )
    pairs = pairs.assign(gain=pairs["dice"] - pairs["dice_other"]).dropna(subset=["gain"])
    by_patient = pairs.groupby("patient")["gain"].mean().to_numpy()
    if not len(by_patient):
        return Gain(math.nan, math.nan, math.nan, 0, 0)
    rng = np.random.default_rng(params.seed)
    drawn = rng.integers(len(by_patient), size=(params.num_bootstrap, len(by_patient)))
    means = by_patient[drawn].mean(axis=1)
    tail = (1 - params.confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Gain(float(by_patient.mean()), float(low), float(high), len(by_patient), len(pairs))


def judge(
    candidate: pd.DataFrame,
    baseline: pd.DataFrame,
    champion: pd.DataFrame | None,
    params: RegisterParams,
) -> Verdict:
    """Give a verdict.

    Args:
        candidate: scores by case and organ, as `tasks.evaluate.score_cases` returns them.
        baseline: scores of the baseline on the same cases.
        champion: scores of the model in use on the same cases; None when there is none, or when
            it is the candidate itself.
        params: the section `register` of params.yaml.
    """
    gain = paired_gain(candidate, baseline, params)
    num_cases = candidate["case"].nunique()
    clauses = [
        Clause(
            "num_cases",
            num_cases >= params.min_cases,
            f"{num_cases} test cases of {candidate['patient'].nunique()} patients",
            f"at least {params.min_cases} test cases",
        ),
        Clause(
            "dice_gain",
            gain.low > params.min_dice_gain,
            f"{params.candidate} less {params.baseline}: {gain.mean:+.4f}, "
            f"{params.confidence:.0%} interval {gain.low:+.4f} to {gain.high:+.4f}",
            f"lower bound above {params.min_dice_gain:g}",
        ),
        *(_slice_fpr_clause(organ, rows, params) for organ, rows in candidate.groupby("organ")),
    ]
    if champion is not None:
        difference = paired_gain(candidate, champion, params)
        clauses.append(
            Clause(
                "champion",
                difference.mean >= 0,
                f"{params.candidate} less champion: {difference.mean:+.4f}, "
                f"{params.confidence:.0%} interval {difference.low:+.4f} to "
                f"{difference.high:+.4f}",
                "mean not below 0",
            )
        )
    if not clauses[0].passed:
        status: Status = "undecided"
    else:
        status = "pass" if all(clause.passed for clause in clauses) else "fail"
    return Verdict(status, tuple(clauses), gain)


def _slice_fpr_clause(organ: object, rows: pd.DataFrame, params: RegisterParams) -> Clause:
    num_free = int(rows["num_free_slices"].sum())
    num_false = int(rows["num_false_positive_slices"].sum())
    rate = num_false / num_free if num_free else math.nan
    return Clause(
        f"slice_fpr/{organ}",
        rate <= params.max_slice_fpr,
        f"{organ}: {num_false} of {num_free} organ-free slices"
        + (f" ({rate:.4f})" if num_free else ", so no rate"),
        f"at most {params.max_slice_fpr:g}",
    )
