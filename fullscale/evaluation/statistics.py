"""Bootstrap intervals of scores over patients, and paired tests between networks.

Pure functions of score tables. Patients, not scans or organs, are resampled, because the scans and
organs of one patient are not independent.

Intervals are bootstrap-t (Efron and Tibshirani 1993, chapter 12): every resample is divided by its
standard error, so an interval is as asymmetric as the scores. Percentile and BCa intervals of
Dice-like differences of 28 patients are too short. tests/evaluation/test_statistics.py measures how
often these intervals contain the true mean. If few patients differ strongly from all others, for
example because an organ is sometimes missed, no interval from 28 patients reaches its nominal
coverage.

P patients, B resamples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fullscale.params import RegisterParams

if TYPE_CHECKING:
    import pandas as pd

UNBOUNDED = (-math.inf, math.inf)
DICE_DIFFERENCES = (-1.0, 1.0)
PAIRING = ["case", "patient", "organ"]
NO_SPREAD = 1e-12
"""Smaller differences are ties (floating-point noise)."""

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


@dataclass(frozen=True)
class Gain:
    """A paired difference in Dice, first network - second network.

    Attributes:
        mean: mean over patients of each patient's mean difference.
        low, high: bootstrap interval of that mean, patients resampled.
        p_value: Wilcoxon signed-rank test of the patients' mean differences, two-sided.
        num_patients: patients with at least one pair.
        num_pairs: pairs of case and organ in which both Dice are defined.
    """

    mean: float
    low: float
    high: float
    p_value: float
    num_patients: int
    num_pairs: int


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of two networks on one organ, or on all organs.

    Attributes:
        first, second: the networks.
        organ: "all" for every organ together.
        gain: first - second.
        p_holm: the gain's p-value, corrected for the number of comparisons made together.
    """

    first: str
    second: str
    organ: str
    gain: Gain
    p_holm: float


def paired_gain(first: pd.DataFrame, second: pd.DataFrame, params: RegisterParams) -> Gain:
    """Return the difference in Dice between two networks scored on the same cases.

    Args:
        first: columns case, patient, organ, dice.
        second: the same columns.
        params: confidence, num_bootstrap and seed.

    Returns:
        The difference, first - second; NaN if no case has a Dice of both.
    """
    pairs = pair_scores(first, second)
    by_patient = (pairs["dice"] - pairs["dice_other"]).groupby(pairs["patient"]).mean()
    differences_P = by_patient.to_numpy()
    interval = bootstrap_mean(
        differences_P, np.ones(len(differences_P)), params, limits=DICE_DIFFERENCES
    )
    return Gain(
        **asdict(interval),
        p_value=wilcoxon_p(differences_P),
        num_patients=len(differences_P),
        num_pairs=len(pairs),
    )


def pair_scores(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Join the rows of two score tables in which both Dice are defined.

    Returns:
        Columns case, patient, organ, dice, and dice_other from the second table.
    """
    columns = [*PAIRING, "dice"]
    pairs = first[columns].merge(
        second[columns], on=PAIRING, suffixes=("", "_other"), validate="one_to_one"
    )
    return pairs.dropna(subset=["dice", "dice_other"])


def compare_networks(
    tables: Mapping[str, pd.DataFrame], params: RegisterParams
) -> list[Comparison]:
    """Return the differences in Dice of all pairs of networks, over all organs and for each organ.

    Args:
        tables: network to its scores by case and organ, on the same cases.
        params: confidence, num_bootstrap and seed.

    Returns:
        For each pair of networks all organs together, then each organ. p-values are corrected for
        the length of this list.
    """
    found = []
    for (first, scores), (second, others) in itertools.combinations(tables.items(), 2):
        for organ in ("all", *sorted(set(scores["organ"]) & set(others["organ"]))):
            gain = paired_gain(_of(scores, organ), _of(others, organ), params)
            found.append((first, second, organ, gain))
    p_holm = holm([gain.p_value for *_, gain in found])
    return [Comparison(*each, p) for each, p in zip(found, p_holm, strict=True)]


def _of(scores: pd.DataFrame, organ: str) -> pd.DataFrame:
    return scores if organ == "all" else scores[scores["organ"] == organ]


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


def bootstrap_mean(
    means_P: Array,
    weights_P: Array,
    params: RegisterParams,
    limits: tuple[float, float] = UNBOUNDED,
) -> Interval:
    """Return the weighted mean over patients with its bootstrap-t interval.

    The standard error is that of a ratio of sums. A resample without spread has an infinite t, and
    the interval then ends at `limits`. This is frequent with two or three patients, and when almost
    all patients are equal. If all patients are equal, the interval has no width.

    Args:
        means_P: a value for each patient.
        weights_P: a positive weight for each patient.
        params: confidence, num_bootstrap and seed.
        limits: the lowest and highest value possible.

    Returns:
        The mean and interval; NaN without patients, and `limits` for a single one.
    """
    if not len(means_P):
        return Interval(math.nan, math.nan, math.nan)
    mean, error = (float(each[0]) for each in _mean_and_error(means_P[None], weights_P[None]))
    if len(means_P) == 1:
        return Interval(mean, *limits)
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
    low, high = np.clip([mean - t_high * error, mean - t_low * error], *limits)
    return Interval(mean, float(low), float(high))


def _mean_and_error(values_BP: Array, weights_BP: Array) -> tuple[Array, Array]:
    """Return weighted means and their standard errors, both (B,); errors within noise are 0."""
    num_patients = values_BP.shape[1]
    total_B = weights_BP.sum(axis=1)
    means_B = (weights_BP * values_BP).sum(axis=1) / total_B
    squares_B = ((weights_BP * (values_BP - means_B[:, None])) ** 2).sum(axis=1)
    errors_B = np.sqrt(squares_B * num_patients / max(num_patients - 1, 1)) / total_B
    return means_B, np.where(errors_B <= NO_SPREAD, 0.0, errors_B)


def wilcoxon_p(differences: Array) -> float:
    """Return the two-sided p-value of Wilcoxon's signed-rank test of differences against 0.

    Differences of 0 are dropped (Wilcoxon 1945). NaN without differences, and 1 if all are 0.
    """
    from scipy import stats  # late: it takes a second, and most commands need no test

    if not len(differences):
        return math.nan
    nonzero = differences[np.abs(differences) > NO_SPREAD]
    if not len(nonzero):
        return 1.0
    # Rounded, so that ties with floating-point noise share a rank.
    return float(stats.wilcoxon(nonzero.round(12)).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's step-down method (Holm 1979).

    Args:
        p_values: NaN means that the test was not possible: it stays NaN and is not counted.

    Returns:
        Corrected p-values in the same order, at most 1.
    """
    corrected = [math.nan] * len(p_values)
    tested = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    highest = 0.0
    for rank, (p, place) in enumerate(tested):
        highest = max(highest, min(1.0, p * (len(tested) - rank)))
        corrected[place] = highest
    return corrected
