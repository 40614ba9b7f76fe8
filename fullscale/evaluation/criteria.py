"""The conditions of the promotion gate: what was found, what was wanted, and whether it is met.

Pure functions of score tables. The patient is the unit of every test and bound but one: scans and
organs of one patient are not independent. The test over trainings has the training as its unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fullscale.evaluation.paired import (
    NOISE,
    Gain,
    compare_trainings,
    count_seeds,
    is_reachable,
    mean_over_seeds,
    of_organ,
    one_sided_level,
    pair_scores,
    training_means,
)
from fullscale.evaluation.statistics import highest_rate
from fullscale.params import RegisterParams

if TYPE_CHECKING:
    import pandas as pd

MAX_TRAININGS_P = 0.05
"""Of the test over trainings: the smallest that three trainings each can reach, 1 / 20."""
MAX_NAMED = 3
"""Items of a list that a text names; it counts the others."""


@dataclass(frozen=True)
class Criterion:
    """One condition of the promotion gate, and its result.

    Attributes:
        name: key of the condition, such as "slice_fpr/liver".
        passed: True if the condition is met.
        value: the number that is compared with `limit`; NaN if it cannot be computed.
        limit: the threshold.
        found: the number in words.
        wanted: the limit in words.
    """

    name: str
    passed: bool
    value: float
    limit: float
    found: str
    wanted: str


def patients_criterion(
    candidate: pd.DataFrame,
    baseline: pd.DataFrame,
    organs: Sequence[str],
    params: RegisterParams,
) -> Criterion:
    """Ask for enough patients of each organ in whom both networks were scored."""
    pairs = pair_scores(candidate, baseline)
    num_patients = {organ: of_organ(pairs, organ)["patient"].nunique() for organ in organs}
    organ = min(organs, key=lambda each: num_patients[each])
    return Criterion(
        "num_patients",
        num_patients[organ] >= params.min_patients,
        num_patients[organ],
        params.min_patients,
        f"{pairs['patient'].nunique()} test patients; {organ} has the fewest, "
        f"{num_patients[organ]}",
        f"at least {params.min_patients} for each organ",
    )


def dice_gain_criterion(gain: Gain, params: RegisterParams) -> Criterion:
    """Ask that the gain over the baseline is shown to be above `min_dice_gain`."""
    level = one_sided_level(params)
    if is_reachable(gain.num_patients, level):
        found = f"at least {gain.low:+.4f}, p {gain.p_greater:.2g}"
    else:
        found = (
            f"but p of {gain.num_patients} patients is never below "
            f"{0.5**gain.num_patients:.2g}, wanted {level:.3g}"
        )
    return Criterion(
        "dice_gain",
        gain.low > params.min_dice_gain + NOISE,
        gain.low,
        params.min_dice_gain,
        f"Dice against {params.baseline} {_signed(gain.mean)}, {found}",
        f"more than {params.min_dice_gain:g}",
    )


def trainings_criterion(
    candidate: pd.DataFrame, baseline: pd.DataFrame, params: RegisterParams
) -> Criterion:
    """Ask that the gain over the baseline is more than luck in training, on several trainings."""
    candidate_T, baseline_T = training_means(candidate), training_means(baseline)
    p_value = compare_trainings(candidate_T - params.min_dice_gain, baseline_T, params.seed)
    return Criterion(
        "trainings",
        p_value <= MAX_TRAININGS_P + NOISE,
        p_value,
        MAX_TRAININGS_P,
        f"mean Dice of each of {count_seeds(candidate)} trainings "
        f"{candidate_T.min():.4f} to {candidate_T.max():.4f}, {params.baseline} "
        f"{baseline_T.min():.4f} to {baseline_T.max():.4f}, p {p_value:.2g}",
        f"p at most {MAX_TRAININGS_P:g}",
    )


def loss_criterion(
    name: str, subject: str, gain: Gain, other: str, margin: float, params: RegisterParams
) -> Criterion:
    """Ask that a loss above `margin` is excluded; on few patients, that the mean is not one.

    Args:
        name: of the criterion.
        subject: what is compared, at the beginning of the text.
        gain: of the candidate over the other network.
        other: name of the other network.
        margin: largest loss in Dice.
        params: confidence.
    """
    has_bound = is_reachable(gain.num_patients, one_sided_level(params))
    value = gain.low if has_bound else gain.mean
    if not gain.num_patients:
        found = f"{subject}: no case to compare with {other}"
    else:
        found = f"{subject} against {other} {_signed(gain.mean)}, " + (
            f"at least {gain.low:+.4f}"
            if has_bound
            else f"the mean of {gain.num_patients} patients, too few to bound it"
        )
    return Criterion(
        name,
        value >= -margin - NOISE,
        value,
        -margin,
        found,
        f"at least {-margin:g}",
    )


def failures_criterion(
    name: str, candidate: pd.DataFrame, other: pd.DataFrame, title: str, params: RegisterParams
) -> Criterion:
    """Ask that the candidate fails for no organ of a case for which the other network does not.

    Args:
        name: of the criterion.
        candidate: its scores.
        other: scores of the other network.
        title: name of the other network.
        params: failure_dice.
    """
    limit = params.failure_dice
    pairs = pair_scores(candidate, other)
    failed = pairs[pairs["dice"] < limit]
    new = failed[failed["dice_other"] >= limit]
    num_failed, num_patients = (each["patient"].nunique() for each in (failed, pairs))
    names = [
        f"{row.patient} {row.organ} {row.dice:.2f} ({title} {row.dice_other:.2f})"
        for row in new.sort_values(["dice", "case"]).itertuples()
    ]
    return Criterion(
        name,
        not names and num_patients > 0,
        len(names),
        0,
        f"Dice below {limit:g} in {_part_of_patients(num_failed, num_patients)}; new against "
        f"{title}: {enumerate_names(names)}",
        "no new failure",
    )


def organ_dice_criterion(organ: str, rows: pd.DataFrame, params: RegisterParams) -> Criterion:
    """Ask for a mean Dice of the patients who have the organ: organ-free cases are too easy."""
    with_organ = rows[rows["num_true_voxels"] > 0]
    by_patient = mean_over_seeds(with_organ).groupby("patient")["dice"].mean()
    mean, floor = float(by_patient.mean()), params.organ_floor(organ)
    return Criterion(
        f"organ_dice/{organ}",
        mean >= floor - NOISE,
        mean,
        floor,
        f"{organ}: mean Dice {mean:.4f} ({len(by_patient)} patients)"
        if len(by_patient)
        else f"{organ}: no test case has the organ",
        f"at least {floor:g}",
    )


def slice_fpr_criterion(organ: str, rows: pd.DataFrame, params: RegisterParams) -> Criterion:
    """Ask that the organ is seen in few organ-free slices; an organ in every slice passes."""
    num_free = int(rows["num_free_slices"].sum())
    num_false = int(rows["num_false_positive_slices"].sum())
    rate = num_false / num_free if num_free else math.nan
    counts = rows.groupby("patient")[["num_free_slices", "num_false_positive_slices"]].sum()
    num_patients, num_seen = ((counts[name] > 0).sum() for name in counts)
    return Criterion(
        f"slice_fpr/{organ}",
        not num_free or rate <= params.max_slice_fpr,
        rate,
        params.max_slice_fpr,
        f"{organ}: seen in {num_false} of {num_free} organ-free slices ({rate:.4f}), in "
        f"{_part_of_patients(num_seen, num_patients)}"
        if num_free
        else f"{organ}: no organ-free slice",
        f"slice FPR at most {params.max_slice_fpr:g}",
    )


def organ_free_criteria(organ: str, rows: pd.DataFrame, params: RegisterParams) -> list[Criterion]:
    """Ask that the organ is not seen in patients who do not have it; nothing without any."""
    free = rows[rows["num_true_voxels"] == 0]
    num_free = free["patient"].nunique()
    if not num_free:
        return []
    num_seen = free.loc[free["dice"] < 1, "patient"].nunique()
    rate = num_seen / num_free
    return [
        Criterion(
            f"organ_free/{organ}",
            rate <= params.max_slice_fpr,
            rate,
            params.max_slice_fpr,
            f"{organ}: seen in {_part_of_patients(num_seen, num_free, 'organ-free patients')}",
            f"in a share of at most {params.max_slice_fpr:g}",
        )
    ]


def _part_of_patients(num_events: int, num_patients: int, noun: str = "patients") -> str:
    """Return a count of patients; without an event, with the highest rate that they allow."""
    text = f"{num_events} of {num_patients} {noun}"
    if num_events or not num_patients:
        return text
    return f"{text} (true rate at most {percent(highest_rate(0, num_patients))})"


def enumerate_names(names: Sequence[str]) -> str:
    """Return the first names, and the number of the others."""
    more = len(names) - MAX_NAMED
    return ", ".join([*names[:MAX_NAMED], *([f"{more} more"] if more > 0 else [])]) or "none"


def _signed(value: float) -> str:
    return "not measured" if math.isnan(value) else f"{value:+.4f}"


def percent(share: float) -> str:
    """Format a share in percent with 2 significant digits."""
    return f"{100 * share:.2g} %"
