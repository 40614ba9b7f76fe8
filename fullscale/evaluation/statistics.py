"""Bootstrap intervals of a network's own scores over patients, and exact bounds of rates.

Pure functions of score tables. Patients, not scans or organs, are resampled, because the scans and
organs of one patient are not independent.

Intervals are bootstrap-t (Efron and Tibshirani 1993, chapter 12): every resample is divided by its
standard error, so an interval is as asymmetric as the scores. Percentile and BCa intervals of
Dice-like scores of 28 patients are too short. tests/evaluation/test_statistics.py measures how
often these intervals contain the true mean. If few patients differ strongly from all others, for
example because an organ is sometimes missed, no interval from 28 patients reaches its nominal
coverage. Differences between networks are tested in `paired`, not by the bootstrap.

P patients, B resamples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fullscale.params import RegisterParams

if TYPE_CHECKING:
    import pandas as pd

NO_SPREAD = 1e-12
"""Smaller differences are ties (floating-point noise)."""
RATE_CONFIDENCE = 0.95
"""Of the one-sided upper bound of a rate, as in the rule of three."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean and the bootstrap interval around it.

    Attributes:
        mean: NaN without values.
        low, high: the interval's ends.
    """

    mean: float
    low: float
    high: float


def highest_rate(num_events: int, num_trials: int) -> float:
    """Return the exact one-sided upper bound of a rate (Clopper and Pearson 1934).

    Without events it is 1 - 0.05^(1 / num_trials): 31 % for 8 patients.

    Args:
        num_events: patients with the event.
        num_trials: patients, at least 1.
    """
    from scipy import stats  # late: it takes a second, and most commands need no bound

    if num_events >= num_trials:
        return 1.0
    return float(stats.beta.ppf(RATE_CONFIDENCE, num_events + 1, num_trials - num_events))


def mean_over_cases(
    scores: pd.Series[float], patients: pd.Series[str], params: RegisterParams
) -> Interval:
    """Return the mean of a score over cases; the interval resamples patients with all their cases.

    Args:
        scores: one for each case; NaN is left out.
        patients: the patient of each case, in the same order.
        params: confidence, num_bootstrap and seed.
    """
    return pooled_mean(scores.fillna(0), scores.notna().astype(float), patients, params)


def pooled_mean(
    parts: pd.Series[float],
    wholes: pd.Series[float],
    patients: pd.Series[str],
    params: RegisterParams,
) -> Interval:
    """Return sum(parts) / sum(wholes); the interval resamples patients with all their cases.

    Args:
        parts: a count for each case, such as its false-positive slices.
        wholes: the count it is a part of, such as its organ-free slices.
        patients: the patient of each case, in the same order.
        params: confidence, num_bootstrap and seed.
    """
    import pandas as pd

    sums = pd.DataFrame({"part": parts, "whole": wholes}).astype(float).groupby(patients).sum()
    sums = sums[sums["whole"] > 0]
    means_P = (sums["part"] / sums["whole"]).to_numpy()
    return bootstrap_mean(means_P, sums["whole"].to_numpy(), params)


def bootstrap_mean(means_P: Array, weights_P: Array, params: RegisterParams) -> Interval:
    """Return the weighted mean over patients with its bootstrap-t interval.

    The standard error is that of a ratio of sums. A resample without spread has an infinite t, and
    the interval then has no end. This is frequent with two or three patients, and when almost all
    patients are equal. If all patients are equal, the interval has no width.

    Args:
        means_P: a value for each patient.
        weights_P: a positive weight for each patient.
        params: confidence, num_bootstrap and seed.

    Returns:
        The mean and interval; NaN without patients, and without ends for a single one.
    """
    if not len(means_P):
        return Interval(math.nan, math.nan, math.nan)
    mean, error = (float(each[0]) for each in _mean_and_error(means_P[None], weights_P[None]))
    if len(means_P) == 1:
        return Interval(mean, -math.inf, math.inf)
    if np.ptp(means_P) <= NO_SPREAD:
        return Interval(mean, mean, mean)
    rng = np.random.default_rng(params.seed)
    drawn_BP = rng.integers(len(means_P), size=(params.num_bootstrap, len(means_P)))
    means_B, errors_B = _mean_and_error(means_P[drawn_BP], weights_P[drawn_BP])
    off_B = means_B - mean
    with np.errstate(divide="ignore", invalid="ignore"):
        t_B = np.where(np.abs(off_B) <= NO_SPREAD, 0.0, off_B / errors_B)
    tail = (1 - params.confidence) / 2
    t_low = np.quantile(t_B, tail, method="lower")
    t_high = np.quantile(t_B, 1 - tail, method="higher")
    return Interval(mean, float(mean - t_high * error), float(mean - t_low * error))


def _mean_and_error(values_BP: Array, weights_BP: Array) -> tuple[Array, Array]:
    """Return weighted means and their standard errors, both (B,); errors within noise are 0."""
    num_patients = values_BP.shape[1]
    total_B = weights_BP.sum(axis=1)
    means_B = (weights_BP * values_BP).sum(axis=1) / total_B
    squares_B = ((weights_BP * (values_BP - means_B[:, None])) ** 2).sum(axis=1)
    errors_B = np.sqrt(squares_B * num_patients / max(num_patients - 1, 1)) / total_B
    return means_B, np.where(errors_B <= NO_SPREAD, 0.0, errors_B)
