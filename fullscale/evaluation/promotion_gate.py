"""The promotion gate: compare a candidate with the baseline and the champion on test patients.

Pure functions of score tables, without access to files or to the registry.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fullscale.evaluation.criteria import (
    Criterion,
    dice_gain_criterion,
    enumerate_names,
    failures_criterion,
    loss_criterion,
    organ_dice_criterion,
    organ_free_criteria,
    patients_criterion,
    percent,
    slice_fpr_criterion,
    trainings_criterion,
)
from fullscale.evaluation.paired import (
    MAX_EXACT_PATIENTS,
    NOISE,
    NUM_DRAWN,
    Comparison,
    Gain,
    compare_networks,
    count_seeds,
    of_organ,
    one_sided_level,
    paired_gain,
    seed_spread,
)
from fullscale.evaluation.statistics import RATE_CONFIDENCE
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
class Deployed:
    """The model that a pass registers of each network: one training, or the ensemble of several.

    Attributes:
        title: in words, such as "the ensemble of 3 trainings".
        candidate: scores of the candidate's, without a column `seed`.
        baseline: scores of what would be registered of the baseline in the same way.
    """

    title: str
    candidate: pd.DataFrame
    baseline: pd.DataFrame


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
    deployed: Deployed | None = None,
) -> Verdict:
    """Return the verdict on a candidate.

    The gain and the organ losses compare the networks: each patient's Dice is the mean over the
    trainings. From three trainings each on the gain must be more than luck in training, too.
    Failures, smallest mean Dice, slice FPR and the comparison with the champion judge
    what a pass registers, because that is what will segment patients; its failures are compared
    with those of the baseline deployed in the same way.

    Args:
        candidate: scores by case and organ, as `score_cases` returns them. With a column `seed` the
            table has several trainings, and each Dice is the mean over them.
        baseline: scores of the baseline on the same cases.
        champion: the model in use; None without a champion, or if it is the candidate itself.
        trial: the organs to judge, and the test set.
        params: the section `register` of params.yaml.
        deployed: what a pass registers; None if that is the only training of each network.
    """
    gain = paired_gain(candidate, baseline, params)
    registered, other = (
        (candidate, baseline) if deployed is None else (deployed.candidate, deployed.baseline)
    )
    criteria = [
        patients_criterion(candidate, baseline, trial.organs, params),
        dice_gain_criterion(gain, params),
    ]
    if _is_on_networks(candidate, baseline):
        criteria.append(trainings_criterion(candidate, baseline, params))
    criteria.append(failures_criterion("failures", registered, other, params.baseline, params))
    for organ in trial.organs:
        rows = of_organ(registered, organ)
        criteria.append(organ_dice_criterion(organ, rows, params))
        loss = paired_gain(of_organ(candidate, organ), of_organ(baseline, organ), params)
        criteria.append(
            loss_criterion(
                f"organ_loss/{organ}", f"{organ}: Dice", loss, params.baseline,
                params.max_organ_dice_loss, params,
            )
        )  # fmt: skip
        criteria.append(slice_fpr_criterion(organ, rows, params))
        criteria += organ_free_criteria(organ, rows, params)
    tables = {params.candidate: candidate, params.baseline: baseline}
    if deployed is not None:
        tables[f"{params.candidate} ({deployed.title})"] = registered
    if champion is not None:
        criteria += _champion_criteria(registered, champion, trial, params)
        tables[champion.title] = champion.scores
    if not criteria[0].passed:
        status: Status = "undecided"
    else:
        status = "pass" if all(criterion.passed for criterion in criteria) else "fail"
    return Verdict(
        status,
        tuple(criteria),
        tuple(_notes(candidate, baseline, champion, trial, params, deployed, gain)),
        gain,
        tuple(compare_networks(tables, params)),
        champion,
        trial,
    )


def _is_on_networks(candidate: pd.DataFrame, baseline: pd.DataFrame) -> bool:
    """Return whether a verdict is one on the networks, not on the weights of few trainings."""
    return min(count_seeds(candidate), count_seeds(baseline)) >= WANTED_SEEDS


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
        loss_criterion(
            "champion", "Dice", paired_gain(rows, champion.scores, params), title, margin, params
        ),
        failures_criterion("champion_failures", rows, champion.scores, title, params),
    ]
    for organ in common:
        gain = paired_gain(of_organ(rows, organ), of_organ(champion.scores, organ), params)
        subject = f"{organ}: Dice"
        criteria.append(loss_criterion(f"champion/{organ}", subject, gain, title, margin, params))
    return criteria


def _notes(
    candidate: pd.DataFrame,
    baseline: pd.DataFrame,
    champion: Champion | None,
    trial: Trial,
    params: RegisterParams,
    deployed: Deployed | None,
    gain: Gain,
) -> list[str]:
    exact = candidate["patient"].nunique() <= MAX_EXACT_PATIENTS
    how = "exact sign-flip test" if exact else f"sign-flip test ({NUM_DRAWN:,} random sign vectors)"
    count = trial.num_verdicts
    return [
        f'"At least" and p are of the {how} over patients, one-sided at '
        f'{percent(one_sided_level(params))}; "true rate at most" is the exact bound at '
        f"{percent(1 - RATE_CONFIDENCE)}.",
        _seeds_note(candidate, baseline, params),
        *(_margin_note(gain, params) if params.min_dice_gain < 0 else ()),
        *(() if deployed is None else (_deployed_note(deployed),)),
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
    if _is_on_networks(candidate, baseline):
        return (
            f"Judged: {params.candidate} against {params.baseline}, {counts[0]} and {counts[1]} "
            f"trainings.{between}"
        )
    return (
        f"Judged: these weights against those weights ({counts[0]} and {counts[1]} trainings; from "
        f"{WANTED_SEEDS} each on, {params.candidate} against {params.baseline}).{between}"
    )


def _deployed_note(deployed: Deployed) -> str:
    return (
        f"A pass registers {deployed.title}. Dice against the baseline and p are of the networks, "
        "each patient's Dice averaged over the trainings; failures, mean Dice, slice FPR and the "
        "comparison with a champion are of what is registered, the failures against those of the "
        "baseline deployed in the same way."
    )


def _margin_note(gain: Gain, params: RegisterParams) -> tuple[str]:
    """Say what a pass means where the candidate need not be better than the baseline."""
    better = "is" if gain.low > NOISE else "is not"
    return (
        f"A pass asks that {params.candidate} is not worse than {params.baseline} by "
        f"{-params.min_dice_gain:g}. That it is better {better} shown.",
    )


def _champion_notes(champion: Champion, trial: Trial, params: RegisterParams) -> list[str]:
    notes = []
    if lacking := [organ for organ in trial.organs if organ not in champion.organs]:
        notes.append(
            f"Not compared, because {champion.title} lacks it: {enumerate_names(lacking)}."
        )
    if lost := [organ for organ in champion.organs if organ not in trial.organs]:
        notes.append(
            f"{champion.title.capitalize()} also segments {enumerate_names(lost)}, which "
            f"{params.candidate} does not."
        )
    if champion.test_set != trial.test_set:
        notes.append(
            f"{champion.title.capitalize()} was registered on test set {champion.test_set}; both "
            "are scored on this one."
        )
    return notes
