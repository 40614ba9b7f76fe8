"""Paired differences in Dice between two networks, tested over patients.

Pure functions of score tables. The test is the sign-flip test (Fisher 1935): if two networks are
exchangeable, each patient's difference is as probable as its negative, so all sign vectors are
equally probable. It is exact for any distribution and any number of patients.

A sign vector flips a subset of the patients. Its mean is at least the found one if the mean
difference of that subset is at most 0, and after a shift of all differences if it is at most the
shift. So the p-value counts subsets, and the bounds are order statistics of their means
(Hartigan 1969, "Using subsample values as typical values"). A subset's mean never falls when a
difference rises: no patient in whom the first network gains more can make its bound worse.

P patients, S subsets of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fullscale.evaluation.statistics import Array
from fullscale.params import RegisterParams

if TYPE_CHECKING:
    import pandas as pd

PAIRING = ["case", "patient", "organ"]
SEED = "seed"
"""Optional column of a score table: the training that the scores are from."""
MAX_EXACT_PATIENTS = 16
"""Up to so many patients all 2^P sign vectors are tried, above it `NUM_DRAWN` random ones."""
NUM_DRAWN = 100_000
NOISE = 1e-9
"""Smaller differences in Dice are rounding."""
LARGEST_DIFFERENCE = 1.0


@dataclass(frozen=True)
class Gain:
    """A paired difference in Dice, first network - second network.

    Attributes:
        mean: mean over patients of each patient's mean difference; NaN without patients.
        low, high: one-sided bounds of that mean, each at `one_sided_level`; -1 and 1 if the
            patients are too few for that level.
        p_greater: one-sided p-value of no gain.
        p_value: two-sided p-value of no difference.
        num_patients: patients with at least one pair.
        num_pairs: pairs of case and organ that both networks scored.
    """

    mean: float
    low: float
    high: float
    p_greater: float
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


def one_sided_level(params: RegisterParams) -> float:
    """Return the level of each one-sided bound, such that two of them hold `params.confidence`."""
    return (1 - params.confidence) / 2


def is_reachable(num_patients: int, level: float) -> bool:
    """Return True if a test of so many patients can reject at a level: its smallest p is 2^-P."""
    return num_patients > 0 and 0.5**num_patients <= level + NOISE


def paired_gain(first: pd.DataFrame, second: pd.DataFrame, params: RegisterParams) -> Gain:
    """Return the difference in Dice between two networks scored on the same cases.

    Args:
        first: columns case, patient, organ, dice, and optionally seed.
        second: the same columns.
        params: confidence and seed.

    Returns:
        The difference, first - second; NaN if no case has a Dice of both.
    """
    pairs = pair_scores(first, second)
    by_patient = (pairs["dice"] - pairs["dice_other"]).groupby(pairs["patient"]).mean()
    return compare_differences(
        by_patient.to_numpy(), one_sided_level(params), params.seed, len(pairs)
    )


def compare_differences(differences_P: Array, level: float, seed: int, num_pairs: int) -> Gain:
    """Return mean, bounds and p-values of the differences of patients; their order is irrelevant.

    Args:
        differences_P: one for each patient.
        level: of each one-sided bound.
        seed: of the sign vectors drawn for more than `MAX_EXACT_PATIENTS`.
        num_pairs: for the result.
    """
    num_patients = len(differences_P)
    if not num_patients:
        return Gain(math.nan, math.nan, math.nan, math.nan, math.nan, 0, num_pairs)
    differences_P = np.sort(differences_P)
    means_S, num_vectors = _subset_means(differences_P, seed)
    # The other sign vectors flip nobody, and always have at least the found mean.
    num_others = num_vectors - len(means_S)
    p_greater = (num_others + int(np.count_nonzero(means_S <= NOISE))) / num_vectors
    p_less = (num_others + int(np.count_nonzero(means_S >= -NOISE))) / num_vectors
    low, high = -LARGEST_DIFFERENCE, LARGEST_DIFFERENCE
    place = math.floor(level * num_vectors + NOISE) - num_others
    if place >= 0:
        low = float(np.partition(means_S, place)[place])
        high = float(np.partition(means_S, -1 - place)[-1 - place])
    return Gain(
        mean=float(np.mean(differences_P)),
        low=low,
        high=high,
        p_greater=p_greater,
        p_value=min(1.0, 2 * min(p_greater, p_less)),
        num_patients=num_patients,
        num_pairs=num_pairs,
    )


def _subset_means(differences_P: Array, seed: int) -> tuple[Array, int]:
    """Return the mean of each subset that is not empty, (S,), and the number of sign vectors."""
    if len(differences_P) > MAX_EXACT_PATIENTS:
        drawn = list(_drawn_means(differences_P, seed))
        return np.concatenate(drawn), NUM_DRAWN + 1  # the found vector is one of them
    sums_S, sizes_S = np.zeros(1), np.zeros(1)
    for difference in differences_P:
        sums_S = np.concatenate([sums_S, sums_S + difference])
        sizes_S = np.concatenate([sizes_S, sizes_S + 1])
    return sums_S[1:] / sizes_S[1:], len(sums_S)


def _drawn_means(differences_P: Array, seed: int) -> Iterator[Array]:
    for drawn_SP in np.array_split(_draw_subsets(len(differences_P), seed), 10):  # for the memory
        sizes_S = drawn_SP.sum(axis=1, dtype=np.int64)
        some_S = sizes_S > 0
        yield (drawn_SP @ differences_P)[some_S] / sizes_S[some_S]


@lru_cache(maxsize=1)
def _draw_subsets(num_patients: int, seed: int) -> NDArray[np.int8]:
    """Return NUM_DRAWN random subsets, (S, P), 1 for a member; the same for all tests of a size."""
    rng = np.random.default_rng(seed)
    return rng.integers(2, size=(NUM_DRAWN, num_patients), dtype=np.int8)


def mean_over_seeds(scores: pd.DataFrame) -> pd.DataFrame:
    """Return a table's Dice for each case, patient and organ: the mean over its trainings.

    Args:
        scores: columns case, patient, organ, dice, and optionally seed.

    Raises:
        ValueError: a training has two rows for the same case and organ.
    """
    names = [*PAIRING, *([SEED] if SEED in scores else [])]
    if scores.duplicated(names).any():
        first = scores.loc[scores.duplicated(names), names].iloc[0].to_dict()
        raise ValueError(f"two rows of scores for {first}; wanted one")
    return scores.groupby(PAIRING, sort=False)["dice"].mean().reset_index()


def pair_scores(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Join the rows of two score tables in which both Dice are defined, means over seeds.

    Returns:
        Columns case, patient, organ, dice, and dice_other from the second table.
    """
    pairs = mean_over_seeds(first).merge(
        mean_over_seeds(second), on=PAIRING, suffixes=("", "_other"), validate="one_to_one"
    )
    return pairs.dropna(subset=["dice", "dice_other"])


def count_seeds(scores: pd.DataFrame) -> int:
    """Return the number of trainings that a table has scores of."""
    return scores[SEED].nunique() if SEED in scores else 1


def training_means(scores: pd.DataFrame) -> Array:
    """Return the mean Dice over patients of each training, (T,), in the order of seeds."""
    by_patient = scores.groupby([SEED, "patient"])["dice"].mean()
    return by_patient.groupby(SEED).mean().to_numpy(dtype=float)


def seed_spread(first: pd.DataFrame, second: pd.DataFrame) -> float:
    """Return the standard deviation of the mean gain between trainings of two networks.

    Trainings of different networks are independent, so the variances of both add. NaN if a network
    was trained only once.
    """
    if min(count_seeds(first), count_seeds(second)) < 2:
        return math.nan
    variances = [training_means(scores).var(ddof=1) for scores in (first, second)]
    return math.sqrt(sum(variances))


def compare_trainings(first_T: Array, second_T: Array, seed: int) -> float:
    """Return the one-sided p-value of the permutation test over trainings (Fisher 1935).

    If two networks are the same, each choice of trainings is as probable to be the first's. The
    p-value is the share of choices whose gain is at least the found one: of all of them up to
    `NUM_DRAWN`, else of so many drawn ones. Exact for any distribution and number of trainings.

    Args:
        first_T: mean Dice of each training of the first network.
        second_T: of the second network.
        seed: of drawn choices.
    """
    from scipy.stats import permutation_test  # late: it takes a second

    def gain(first: Array, second: Array, axis: int) -> Array:
        gained: Array = first.mean(axis) - second.mean(axis)
        return np.round(gained / NOISE)  # smaller differences are ties

    found = permutation_test(
        (first_T, second_T), gain, alternative="greater", n_resamples=NUM_DRAWN, rng=seed
    )
    return float(found.pvalue)


def compare_networks(
    tables: Mapping[str, pd.DataFrame], params: RegisterParams
) -> list[Comparison]:
    """Return the differences in Dice of all pairs of networks, over all organs and for each organ.

    Args:
        tables: network to its scores by case and organ, on the same cases.
        params: confidence and seed.

    Returns:
        For each pair of networks all organs together, then each organ. p-values are corrected for
        the length of this list.
    """
    found = []
    for (first, scores), (second, others) in itertools.combinations(tables.items(), 2):
        for organ in ("all", *sorted(set(scores["organ"]) & set(others["organ"]))):
            gain = paired_gain(of_organ(scores, organ), of_organ(others, organ), params)
            found.append((first, second, organ, gain))
    p_holm = holm([gain.p_value for *_, gain in found])
    return [Comparison(*each, p) for each, p in zip(found, p_holm, strict=True)]


def of_organ(scores: pd.DataFrame, organ: str) -> pd.DataFrame:
    """Return the rows of an organ, or every row for "all"."""
    return scores if organ == "all" else scores[scores["organ"] == organ]


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
