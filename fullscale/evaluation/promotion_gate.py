"""The gate: does a candidate beat the baseline, on paired test cases, by what params ask for?

Pure functions of score tables; nothing here knows where scores or models are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pandas as pd

from fullscale.evaluation.statistics import (
    Comparison,
    Gain,
    compare_networks,
    pair_scores,
    paired_gain,
)
from fullscale.params import RegisterParams
from fullscale.versioning.provenance import digest_test_set

VERDICT_WORDS = {
    "pass": "PASS: the candidate may be promoted",
    "fail": "FAIL: the candidate does not beat the baseline as params ask",
    "undecided": "UNDECIDED: too few test cases for a verdict",
}

if TYPE_CHECKING:
    pass

Status = Literal["pass", "fail", "undecided"]


@dataclass(frozen=True)
class Champion:
    """The model in use.

    Attributes:
        version: its version in the registry.
        test_set: digest of the test cases on which it was registered.
        scores: its scores on the present test cases, made now.
    """

    version: str
    test_set: str
    scores: pd.DataFrame


@dataclass(frozen=True)
class Clause:
    """One condition of the gate, and whether it holds.

    Attributes:
        name: the condition's own, such as "slice_fpr/liver".
        passed: whether it holds.
        value: the number it rests on; NaN where there is none, and then it does not hold.
        limit: what the number is compared with.
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
    """The outcome and every reason for it.

    Attributes:
        status: "undecided" on too few cases, else "pass" if every clause holds.
        clauses: the conditions, the number of cases first.
        gain: the candidate's gain over the baseline.
        comparisons: candidate, baseline and champion with each other, for the reader; the gate
            does not use them.
        champion: the model in use that the candidate was compared with, if there was one.
    """

    status: Status
    clauses: tuple[Clause, ...]
    gain: Gain
    comparisons: tuple[Comparison, ...]
    champion: Champion | None


def judge(
    candidate: pd.DataFrame,
    baseline: pd.DataFrame,
    champion: Champion | None,
    params: RegisterParams,
) -> Verdict:
    """Give a verdict.

    Args:
        candidate: scores by case and organ, as `tasks.evaluate.score_cases` returns them.
        baseline: scores of the baseline on the same cases.
        champion: the model in use; None when there is none, or when it is the candidate itself.
        params: the section `register` of params.yaml.
    """
    gain = paired_gain(candidate, baseline, params)
    clauses = [
        _num_cases_clause(candidate, params),
        _dice_gain_clause(gain, params),
        *_organ_dice_clauses(candidate, baseline, params),
        *(_slice_fpr_clause(organ, rows, params) for organ, rows in candidate.groupby("organ")),
    ]
    tables = {params.candidate: candidate, params.baseline: baseline}
    if champion is not None:
        clauses.append(_champion_clause(candidate, champion, params))
        tables[f"champion version {champion.version}"] = champion.scores
    if not clauses[0].passed:
        status: Status = "undecided"
    else:
        status = "pass" if all(clause.passed for clause in clauses) else "fail"
    comparisons = tuple(compare_networks(tables, params))
    return Verdict(status, tuple(clauses), gain, comparisons, champion)


def _num_cases_clause(candidate: pd.DataFrame, params: RegisterParams) -> Clause:
    num_cases = candidate["case"].nunique()
    return Clause(
        "num_cases",
        num_cases >= params.min_cases,
        num_cases,
        params.min_cases,
        f"{num_cases} test cases of {candidate['patient'].nunique()} patients",
        f"at least {params.min_cases} test cases",
    )


def _dice_gain_clause(gain: Gain, params: RegisterParams) -> Clause:
    return Clause(
        "dice_gain",
        gain.low > params.min_dice_gain,
        gain.low,
        params.min_dice_gain,
        f"{params.candidate} less {params.baseline}: {_describe(gain, params)}",
        f"lower bound above {params.min_dice_gain:g}",
    )


def _organ_dice_clauses(
    candidate: pd.DataFrame, baseline: pd.DataFrame, params: RegisterParams
) -> list[Clause]:
    """No organ pays for another: mean Dice of each, over cases in which both networks have one."""
    pairs = pair_scores(candidate, baseline)
    clauses = []
    for organ in sorted(set(candidate["organ"])):
        rows = pairs[pairs["organ"] == organ]
        mean, other = rows["dice"].mean(), rows["dice_other"].mean()
        clauses.append(
            Clause(
                f"organ_dice/{organ}",
                # A loss of exactly the tolerance is allowed, whatever rounding makes of it.
                bool(mean - other >= -params.max_organ_dice_loss - 1e-9),
                float(mean - other),
                -params.max_organ_dice_loss,
                f"{organ}: mean Dice {mean:.4f}, {params.baseline} {other:.4f} ({len(rows)} cases)"
                if len(rows)
                else f"{organ}: no case in which both networks have a Dice",
                f"at most {params.max_organ_dice_loss:g} below {params.baseline}",
            )
        )
    return clauses


def _slice_fpr_clause(organ: object, rows: pd.DataFrame, params: RegisterParams) -> Clause:
    num_free = int(rows["num_free_slices"].sum())
    num_false = int(rows["num_false_positive_slices"].sum())
    rate = num_false / num_free if num_free else math.nan
    return Clause(
        f"slice_fpr/{organ}",
        rate <= params.max_slice_fpr,
        rate,
        params.max_slice_fpr,
        f"{organ}: {num_false} of {num_free} organ-free slices"
        + (f" ({rate:.4f})" if num_free else ", so no rate"),
        f"at most {params.max_slice_fpr:g}",
    )


def _champion_clause(candidate: pd.DataFrame, champion: Champion, params: RegisterParams) -> Clause:
    gain = paired_gain(candidate, champion.scores, params)
    test_set = digest_test_set(candidate["case"].unique())
    return Clause(
        "champion",
        gain.mean >= 0,
        gain.mean,
        0.0,
        f"{params.candidate} less champion version {champion.version}: {_describe(gain, params)}"
        + (
            ""
            if champion.test_set == test_set
            else f"; it was registered on test set {champion.test_set}, both are scored on "
            f"{test_set}"
        ),
        "mean not below 0",
    )


def _describe(gain: Gain, params: RegisterParams) -> str:
    return (
        f"{gain.mean:+.4f}, {params.confidence:.0%} interval {gain.low:+.4f} to {gain.high:+.4f}, "
        f"Wilcoxon p {gain.p_value:.2g}"
    )
