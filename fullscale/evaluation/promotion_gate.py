"""The promotion gate: compare a candidate with the baseline on paired test cases.

Pure functions of score tables, without access to files or to the registry.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fullscale.evaluation.statistics import (
    Comparison,
    Gain,
    compare_networks,
    pair_scores,
    paired_gain,
)
from fullscale.params import RegisterParams
from fullscale.versioning.provenance import digest_test_set

if TYPE_CHECKING:
    import pandas as pd

VERDICT_WORDS = {
    "pass": "PASS: the candidate may be promoted",
    "fail": "FAIL: the candidate does not beat the baseline as params ask",
    "undecided": "UNDECIDED: too few test cases for a verdict",
}

Status = Literal["pass", "fail", "undecided"]


@dataclass(frozen=True)
class Champion:
    """The model in use (alias `champion`).

    Attributes:
        version: its version in the registry.
        test_set: digest of the test cases on which it was registered.
        scores: its scores on the present test cases.
    """

    version: str
    test_set: str
    scores: pd.DataFrame


@dataclass(frozen=True)
class Criterion:
    """One condition of the promotion gate, and its result.

    Attributes:
        name: key of the condition, such as "slice_fpr/liver".
        passed: True if the condition is met.
        value: the number that is compared with `limit`; NaN, which never passes, if it cannot be
            computed.
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
        status: "undecided" on too few cases, else "pass" if every criterion is met.
        criteria: the conditions, the number of cases first.
        gain: the candidate's gain over the baseline.
        comparisons: candidate, baseline and champion with each other, for the reader; they do not
            change the decision.
        champion: the model in use that the candidate was compared with, if any.
    """

    status: Status
    criteria: tuple[Criterion, ...]
    gain: Gain
    comparisons: tuple[Comparison, ...]
    champion: Champion | None


def judge(
    candidate: pd.DataFrame,
    baseline: pd.DataFrame,
    champion: Champion | None,
    params: RegisterParams,
) -> Verdict:
    """Return the verdict on a candidate.

    Args:
        candidate: scores by case and organ, as `score_cases` returns them.
        baseline: scores of the baseline on the same cases.
        champion: the model in use; None without a champion, or if it is the candidate itself.
        params: the section `register` of params.yaml.
    """
    gain = paired_gain(candidate, baseline, params)
    criteria = [
        _num_cases_criterion(candidate, params),
        _dice_gain_criterion(gain, params),
        *_organ_dice_criteria(candidate, baseline, params),
        *(_slice_fpr_criterion(organ, rows, params) for organ, rows in candidate.groupby("organ")),
    ]
    tables = {params.candidate: candidate, params.baseline: baseline}
    if champion is not None:
        criteria.append(_champion_criterion(candidate, champion, params))
        tables[f"champion version {champion.version}"] = champion.scores
    if not criteria[0].passed:
        status: Status = "undecided"
    else:
        status = "pass" if all(criterion.passed for criterion in criteria) else "fail"
    comparisons = tuple(compare_networks(tables, params))
    return Verdict(status, tuple(criteria), gain, comparisons, champion)


def _num_cases_criterion(candidate: pd.DataFrame, params: RegisterParams) -> Criterion:
    num_cases = candidate["case"].nunique()
    return Criterion(
        "num_cases",
        num_cases >= params.min_cases,
        num_cases,
        params.min_cases,
        f"{num_cases} test cases of {candidate['patient'].nunique()} patients",
        f"at least {params.min_cases} test cases",
    )


def _dice_gain_criterion(gain: Gain, params: RegisterParams) -> Criterion:
    return Criterion(
        "dice_gain",
        gain.low > params.min_dice_gain,
        gain.low,
        params.min_dice_gain,
        f"{params.candidate} - {params.baseline}: {_format_gain(gain, params)}",
        f"lower bound above {params.min_dice_gain:g}",
    )


def _organ_dice_criteria(
    candidate: pd.DataFrame, baseline: pd.DataFrame, params: RegisterParams
) -> list[Criterion]:
    """Compare the mean Dice of each organ, so that a gain in one does not hide a loss in another.

    Means are over the cases in which both networks have a Dice.
    """
    pairs = pair_scores(candidate, baseline)
    criteria = []
    for organ in sorted(set(candidate["organ"])):
        rows = pairs[pairs["organ"] == organ]
        mean, other = rows["dice"].mean(), rows["dice_other"].mean()
        criteria.append(
            Criterion(
                f"organ_dice/{organ}",
                # 1e-9: a loss of exactly the tolerance passes in spite of floating-point noise.
                bool(mean - other >= -params.max_organ_dice_loss - 1e-9),
                float(mean - other),
                -params.max_organ_dice_loss,
                f"{organ}: mean Dice {mean:.4f}, {params.baseline} {other:.4f} ({len(rows)} cases)"
                if len(rows)
                else f"{organ}: no case in which both networks have a Dice",
                f"at most {params.max_organ_dice_loss:g} below {params.baseline}",
            )
        )
    return criteria


def _slice_fpr_criterion(organ: object, rows: pd.DataFrame, params: RegisterParams) -> Criterion:
    num_free = int(rows["num_free_slices"].sum())
    num_false = int(rows["num_false_positive_slices"].sum())
    rate = num_false / num_free if num_free else math.nan
    return Criterion(
        f"slice_fpr/{organ}",
        rate <= params.max_slice_fpr,
        rate,
        params.max_slice_fpr,
        f"{organ}: {num_false} of {num_free} organ-free slices"
        + (f" ({rate:.4f})" if num_free else ", so no rate"),
        f"at most {params.max_slice_fpr:g}",
    )


def _champion_criterion(
    candidate: pd.DataFrame, champion: Champion, params: RegisterParams
) -> Criterion:
    gain = paired_gain(candidate, champion.scores, params)
    test_set = digest_test_set(candidate["case"].unique())
    return Criterion(
        "champion",
        gain.mean >= 0,
        gain.mean,
        0.0,
        f"{params.candidate} - champion version {champion.version}: {_format_gain(gain, params)}"
        + (
            ""
            if champion.test_set == test_set
            else f"; it was registered on test set {champion.test_set}, both are scored on "
            f"{test_set}"
        ),
        "mean not below 0",
    )


def _format_gain(gain: Gain, params: RegisterParams) -> str:
    return (
        f"{gain.mean:+.4f}, {params.confidence:.0%} interval {gain.low:+.4f} to {gain.high:+.4f}, "
        f"Wilcoxon p {gain.p_value:.2g}"
    )
