"""Rules for the split of the patients, and for the margins that the test patients can resolve.

They count patients and annotated organs; no scan is looked at. docs/plan.md says where they come
from.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from fullscale.evaluation.paired import is_reachable, one_sided_level
from fullscale.params import RegisterParams, SplitParams
from fullscale.patient_split import FOLDS as SETS
from fullscale.patient_split import NUM_SALTS, count_patients, find_gap, split_cases

LOW_FRACTION, HIGH_FRACTION = 0.2, 0.35
"""Shares of test patients that are kept if they are there and give enough patients."""
FRACTIONS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
WANTED_PATIENTS = 8
"""Test patients of each organ that are enough; seven resolve a margin of 0.02."""
FOLDS = 5
MIN_VAL_PATIENTS = 3
DICE_SPREAD = 0.02
"""Assumed standard deviation over patients of the difference in Dice between two networks."""
MARGIN_STEP = 0.005


@dataclass(frozen=True)
class SplitChoice:
    """A split of the patients.

    Attributes:
        params: the section split, with the chosen values.
        table: columns case, patient, fold_index, fold.
        gap: what every split lacks, so that stage split refuses them all, and all cases are in
            the training set of the table; None if nothing.
        num_test: the smallest number of test patients of an organ.
    """

    params: SplitParams
    table: pd.DataFrame
    gap: str | None
    num_test: int


def choose_split(
    cases: pd.DataFrame,
    organs: Sequence[str],
    present: SplitParams,
    min_patients: int,
    mine: Collection[str] = (),
) -> SplitChoice:
    """Choose test fraction, number of folds and validation fold.

    The present fraction is kept where it is usual and gives enough test patients, because another
    one makes another test set. Otherwise the smallest one that gives enough is taken. So few
    patients that every fraction lacks something get another salt.

    Args:
        cases: columns case, patient, annotated (organs, ";"-separated) and training_only.
        organs: the organs of params.yaml.
        present: the section split of params.yaml.
        min_patients: `register.min_patients`.
        mine: keys of the section that may not change, such as "folds".
    """
    for salted in _salts(cases, organs, present, mine):
        choices = [
            _divide(cases, organs, salted, fraction, mine) for fraction in _fractions(salted, mine)
        ]
        choices.append(_choice(cases, organs, salted))
        for wanted in (max(min_patients, WANTED_PATIENTS), min_patients, 1, 0):
            for choice in choices:
                if choice.gap is None and choice.num_test >= wanted:
                    return choice
    found = _choice(cases, organs, present)
    return replace(found, table=found.table.assign(fold="train"), num_test=0)


def resolved_margin(num_test: int, register: RegisterParams) -> float | None:
    """Return the smallest loss in Dice, in steps of 0.005, that so many patients can exclude.

    Two networks that are equally good are meant, whose differences over patients have
    `DICE_SPREAD`. None: so few patients can exclude nothing at the gate's level.
    """
    from scipy import stats

    level = one_sided_level(register)
    if not is_reachable(num_test, level):
        return None
    half = float(stats.t.ppf(1 - level, num_test - 1)) * DICE_SPREAD / math.sqrt(num_test)
    return round(math.ceil(half / MARGIN_STEP - 1e-9) * MARGIN_STEP, 3)


def _salts(
    cases: pd.DataFrame, organs: Sequence[str], present: SplitParams, mine: Collection[str]
) -> Iterator[SplitParams]:
    """Yield the settings with the present salt, then with others, named as stage split does."""
    yield present
    drawn = [set(text.split(";")) for text in cases.groupby("patient")["annotated"].agg(";".join)]
    fewest = min(sum(organ in each for each in drawn) for organ in organs)
    # Training and validation need a patient of every organ, and each set a patient.
    if "salt" in mine or present.test_patients or len(drawn) < len(SETS) or fewest < 2:
        return
    for number in range(2, NUM_SALTS + 2):
        yield present.model_copy(update={"salt": f"{present.salt}-{number}"})


def _fractions(present: SplitParams, mine: Collection[str]) -> list[float]:
    if present.test_patients or "test_fraction" in mine:
        return [present.test_fraction]
    if LOW_FRACTION <= present.test_fraction <= HIGH_FRACTION:
        return list(dict.fromkeys((present.test_fraction, *FRACTIONS)))
    return list(FRACTIONS)


def _divide(
    cases: pd.DataFrame,
    organs: Sequence[str],
    present: SplitParams,
    fraction: float,
    mine: Collection[str],
) -> SplitChoice:
    """Return the split of a test fraction with the first folds that lack nothing."""
    first: SplitChoice | None = None
    changed = present.model_copy(update={"test_fraction": fraction})
    table = split_cases(cases, changed)
    others = table.loc[table["fold"].isin(["train", "val"]), "patient"].nunique()
    for folds, val_fold in _folds(others, present, mine):
        choice = _choice(
            cases, organs, changed.model_copy(update={"folds": folds, "val_fold": val_fold})
        )
        few = min(MIN_VAL_PATIENTS, others // 4)
        if choice.gap is None and count_patients(choice.table, "val") >= few:
            return choice
        if first is None or (first.gap is not None and choice.gap is None):
            first = choice
    assert first is not None  # noqa: S101 - there are always two folds
    return first


def _choice(cases: pd.DataFrame, organs: Sequence[str], params: SplitParams) -> SplitChoice:
    table = split_cases(cases, params)
    gap, num_test = find_gap(table, cases, organs), _count_tested(table, cases, organs)
    return SplitChoice(params, table, gap, num_test)


def _folds(
    num_patients: int, present: SplitParams, mine: Collection[str]
) -> Iterator[tuple[int, int]]:
    """Yield numbers of folds, from the wanted one down, each with its folds, the present first."""
    wanted = max(2, min(FOLDS, num_patients // MIN_VAL_PATIENTS))
    numbers = [present.folds] if "folds" in mine else range(wanted, 1, -1)
    for folds in numbers:
        if "val_fold" in mine:
            places = [present.val_fold] if present.val_fold < folds else []
        else:
            places = sorted(range(folds), key=lambda place: (place != present.val_fold, place))
        yield from ((folds, place) for place in places)
    if "val_fold" in mine:
        yield present.folds, present.val_fold


def _count_tested(table: pd.DataFrame, cases: pd.DataFrame, organs: Sequence[str]) -> int:
    tested = cases[cases["case"].isin(table.loc[table["fold"] == "test", "case"])]
    drawn = tested["annotated"].str.split(";")
    return min(
        int(tested.loc[drawn.map(lambda names, organ=organ: organ in names), "patient"].nunique())
        for organ in organs
    )
