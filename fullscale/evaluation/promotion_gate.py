"""The promotion gate: compare a candidate with the baseline and the champion on test patients.

Pure functions of score tables, without access to files or to the registry. The patient is the unit
of every test and bound: scans and organs of one patient are not independent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fullscale.evaluation.paired import (
    MAX_EXACT_PATIENTS,
    NOISE,
    NUM_DRAWN,
    Comparison,
    Gain,
    compare_networks,
    count_seeds,
    is_reachable,
    mean_over_seeds,
    of_organ,
    one_sided_level,
    pair_scores,
    paired_gain,
    seed_spread,
)
from fullscale.evaluation.statistics import RATE_CONFIDENCE, highest_rate
from fullscale.params import RegisterParams

if TYPE_CHECKING:
    import pandas as pd

VERDICT_WORDS = {
    "pass": "PASS: the candidate may be promoted",
    "fail": "FAIL: the candidate does not meet every condition",
    "undecided": "UNDECIDED: too few test patients for a verdict",
}
WANTED_SEEDS = 3
"""Trainings of a network from which a verdict is one on the network, not on its weights."""
MAX_NAMED = 3

Status = Literal["pass", "fail", "undecided"]


@dataclass(frozen=True)
class Trial:
    """The test set that a verdict is made on.

    Attributes:
        organs: each of them must meet the conditions, also without a test case.
        test_set: digest of patients, cases and annotation.
        num_verdicts: candidates that were judged on this test set, this one included.
    """

    organs: tuple[str, ...]
    test_set: str
    num_verdicts: int = 1


@dataclass(frozen=True)
class Champion:
    """The model in use (alias `champion`).

    Attributes:
        version: its version in the registry.
        test_set: digest of the test set on which it was registered.
        organs: that it segments.
        scores: its scores on the present test cases.
    """

    version: str
    test_set: str
    organs: tuple[str, ...]
    scores: pd.DataFrame

    @property
    def title(self) -> str:
        """Name in texts and comparisons."""
        return f"champion version {self.version}"


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


@dataclass(frozen=True)
class Verdict:
    """The decision of the promotion gate, with its reasons.

    Attributes:
        status: "undecided" on too few patients of an organ, else "pass" if every criterion is met.
        criteria: the conditions, the number of patients first.
        notes: sentences for the reader: the test, and what the verdict is about.
        gain: the candidate's gain over the baseline.
        comparisons: candidate, baseline and champion with each other, for the reader; they do not
            change the decision.
        champion: the model in use that the candidate was compared with, if any.
        trial: the test set that it was made on.
    """

    status: Status
    criteria: tuple[Criterion, ...]
    notes: tuple[str, ...]
    gain: Gain
    comparisons: tuple[Comparison, ...]
    champion: Champion | None
    trial: Trial


def judge(
    candidate: pd.DataFrame,
    baseline: pd.DataFrame,
    champion: Champion | None,
    trial: Trial,
    params: RegisterParams,
) -> Verdict:
    """Return the verdict on a candidate.

    Args:
        candidate: scores by case and organ, as `score_cases` returns them. With a column `seed` the
            table has several trainings, and each Dice is the mean over them.
        baseline: scores of the baseline on the same cases.
        champion: the model in use; None without a champion, or if it is the candidate itself.
        trial: the organs to judge, and the test set.
        params: the section `register` of params.yaml.
    """
    gain = paired_gain(candidate, baseline, params)
    criteria = [
        _patients_criterion(candidate, baseline, trial, params),
        _dice_gain_criterion(gain, params),
        _failures_criterion("failures", candidate, baseline, params.baseline, params),
    ]
    for organ in trial.organs:
        rows = of_organ(candidate, organ)
        others = of_organ(baseline, organ)
        criteria.append(_organ_dice_criterion(organ, rows, params))
        loss = paired_gain(rows, others, params)
        criteria.append(
            _loss_criterion(
                f"organ_loss/{organ}", f"{organ}: Dice", loss, params.baseline,
                params.max_organ_dice_loss, params,
            )
        )  # fmt: skip
        criteria.append(_slice_fpr_criterion(organ, rows, params))
        criteria += _organ_free_criteria(organ, rows, params)
    tables = {params.candidate: candidate, params.baseline: baseline}
    if champion is not None:
        criteria += _champion_criteria(candidate, champion, trial, params)
        tables[champion.title] = champion.scores
    if not criteria[0].passed:
        status: Status = "undecided"
    else:
        status = "pass" if all(criterion.passed for criterion in criteria) else "fail"
    return Verdict(
        status,
        tuple(criteria),
        tuple(_notes(candidate, baseline, champion, trial, params)),
        gain,
        tuple(compare_networks(tables, params)),
        champion,
        trial,
    )


def _patients_criterion(
    candidate: pd.DataFrame, baseline: pd.DataFrame, trial: Trial, params: RegisterParams
) -> Criterion:
    pairs = pair_scores(candidate, baseline)
    num_patients = {organ: of_organ(pairs, organ)["patient"].nunique() for organ in trial.organs}
    organ = min(trial.organs, key=lambda each: num_patients[each])
    return Criterion(
        "num_patients",
        num_patients[organ] >= params.min_patients,
        num_patients[organ],
        params.min_patients,
        f"{pairs['patient'].nunique()} test patients; {organ} has the fewest, "
        f"{num_patients[organ]}",
        f"at least {params.min_patients} for each organ",
    )


def _dice_gain_criterion(gain: Gain, params: RegisterParams) -> Criterion:
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


def _loss_criterion(
    name: str, subject: str, gain: Gain, other: str, margin: float, params: RegisterParams
) -> Criterion:
    """Ask that a loss above `margin` is excluded; on few patients, that the mean is not one."""
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


def _failures_criterion(
    name: str, candidate: pd.DataFrame, other: pd.DataFrame, title: str, params: RegisterParams
) -> Criterion:
    """Ask that the candidate fails for no organ of a case for which the other network does not."""
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
        f"{title}: {_enumerate(names)}",
        "no new failure",
    )


def _organ_dice_criterion(organ: str, rows: pd.DataFrame, params: RegisterParams) -> Criterion:
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


def _slice_fpr_criterion(organ: str, rows: pd.DataFrame, params: RegisterParams) -> Criterion:
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


def _organ_free_criteria(organ: str, rows: pd.DataFrame, params: RegisterParams) -> list[Criterion]:
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


def _champion_criteria(
    candidate: pd.DataFrame, champion: Champion, trial: Trial, params: RegisterParams
) -> list[Criterion]:
    """Ask that the candidate is not worse than the champion, on the organs that it segments."""
    common = [organ for organ in trial.organs if organ in champion.organs]
    if not common:
        return []
    margin, title = params.champion_margin, champion.title
    rows = candidate[candidate["organ"].isin(common)]
    criteria = [
        _loss_criterion(
            "champion", "Dice", paired_gain(rows, champion.scores, params), title, margin, params
        ),
        _failures_criterion("champion_failures", rows, champion.scores, title, params),
    ]
    for organ in common:
        gain = paired_gain(of_organ(rows, organ), of_organ(champion.scores, organ), params)
        subject = f"{organ}: Dice"
        criteria.append(_loss_criterion(f"champion/{organ}", subject, gain, title, margin, params))
    return criteria


def _notes(
    candidate: pd.DataFrame,
    baseline: pd.DataFrame,
    champion: Champion | None,
    trial: Trial,
    params: RegisterParams,
) -> list[str]:
    exact = candidate["patient"].nunique() <= MAX_EXACT_PATIENTS
    how = "exact sign-flip test" if exact else f"sign-flip test ({NUM_DRAWN:,} random sign vectors)"
    count = trial.num_verdicts
    return [
        f'"At least" and p are of the {how} over patients, one-sided at '
        f'{_percent(one_sided_level(params))}; "true rate at most" is the exact bound at '
        f"{_percent(1 - RATE_CONFIDENCE)}.",
        _seeds_note(candidate, baseline, params),
        *(_champion_notes(champion, trial, params) if champion is not None else ()),
        f"First candidate judged on test set {trial.test_set}."
        if count == 1
        else f"Candidate number {count} judged on test set {trial.test_set}: with each one it is "
        "more probable that one passes by chance.",
    ]


def _seeds_note(candidate: pd.DataFrame, baseline: pd.DataFrame, params: RegisterParams) -> str:
    counts = count_seeds(candidate), count_seeds(baseline)
    spread = seed_spread(candidate, baseline)
    between = (
        ""
        if math.isnan(spread)
        else f" The standard deviation of the gain between trainings is {spread:.4f}."
    )
    if min(counts) >= WANTED_SEEDS:
        return (
            f"Judged: {params.candidate} against {params.baseline}, {counts[0]} and {counts[1]} "
            f"trainings.{between}"
        )
    return (
        f"Judged: these weights against those weights ({counts[0]} and {counts[1]} trainings; from "
        f"{WANTED_SEEDS} each on, {params.candidate} against {params.baseline}).{between}"
    )


def _champion_notes(champion: Champion, trial: Trial, params: RegisterParams) -> list[str]:
    notes = []
    if lacking := [organ for organ in trial.organs if organ not in champion.organs]:
        notes.append(f"Not compared, because {champion.title} lacks it: {_enumerate(lacking)}.")
    if lost := [organ for organ in champion.organs if organ not in trial.organs]:
        notes.append(
            f"{champion.title.capitalize()} also segments {_enumerate(lost)}, which "
            f"{params.candidate} does not."
        )
    if champion.test_set != trial.test_set:
        notes.append(
            f"{champion.title.capitalize()} was registered on test set {champion.test_set}; both "
            "are scored on this one."
        )
    return notes


def _part_of_patients(num_events: int, num_patients: int, noun: str = "patients") -> str:
    """Return a count of patients; without an event, with the highest rate that they allow."""
    text = f"{num_events} of {num_patients} {noun}"
    if num_events or not num_patients:
        return text
    return f"{text} (true rate at most {_percent(highest_rate(0, num_patients))})"


def _enumerate(names: list[str]) -> str:
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED] + ([f"{more} more"] if more > 0 else [])) or "none"


def _signed(value: float) -> str:
    return "not measured" if math.isnan(value) else f"{value:+.4f}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"
