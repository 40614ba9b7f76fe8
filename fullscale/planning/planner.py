"""Make a plan: a value and a reason for each parameter, the time of each stage, what is unknown."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from fullscale.label_names import resolve_organs
from fullscale.params import Params
from fullscale.patient_split import count_patients
from fullscale.planning import rules
from fullscale.planning.draft import Draft, Proposal, get_value
from fullscale.planning.fingerprint import Fingerprint, Progress, Reading, measure_cohort
from fullscale.planning.machine import Machine
from fullscale.planning.split_rules import FRACTIONS, SplitChoice, choose_split, resolved_margin
from fullscale.planning.step_time import measure_speed, measuring_scan
from fullscale.planning.training_planner import START_S, Measure, TrainingPlanner
from fullscale.runtime.errors import StageError
from fullscale.scans.cohort import Cohort

SCORING_FACTOR = 3.0
"""Time of scoring a scan by that of reading and measuring it; see docs/plan.md."""
EVALUATE_START_S = 4.0
"""Time of stage evaluate before it opens a scan."""


@dataclass(frozen=True)
class Plan:
    """Parameters for a cohort, a machine and a time.

    Attributes:
        proposals: in the order of params.yaml.
        stages: seconds of each stage; None if unknown.
        impossible: what the cohort is too small for, and what that takes.
        unknown: what the plan cannot know.
        reading: of the cohort; has its fingerprint.
    """

    proposals: tuple[Proposal, ...]
    stages: dict[str, float | None]
    impossible: tuple[str, ...]
    unknown: tuple[str, ...]
    reading: Reading

    @property
    def changes(self) -> dict[str, Any]:
        """Key to value of all that params.yaml has otherwise."""
        return {each.key: each.value for each in self.proposals if each.is_change}


def plan_cohort(
    cohort: Cohort,
    data_version: str,
    params: Params,
    mine: Collection[str],
    machine: Machine,
    hours: float,
    progress: Progress | None = None,
) -> Plan:
    """Measure a cohort and training steps on it, and make a plan.

    Args:
        cohort: the scans.
        data_version: MD5 of the scans.
        params: of params.yaml.
        mine: keys that the user decides.
        machine: to train on.
        hours: of all trainings of `dvc repro` together.
        progress: shows how many scans were measured.

    Raises:
        ScanError: a scan cannot be read.
        StageError: there is no scan outside the test set, or no training fits time or memory.
    """
    organs = resolve_organs(params.organs, cohort.labels)
    draft = Draft(params, mine)
    split = plan_split(draft, list_cases(cohort, organs))
    reading = measure_cohort(
        cohort,
        organs,
        list_tested(split),
        data_version,
        body_threshold_hu=params.slice.body_threshold_hu,
        progress=progress,
    )
    if not reading.fingerprint.cases:
        raise StageError("every case is in the test set, so nothing is left to plan by; add scans")
    if not machine.is_here:
        return make_plan(draft, split, reading, machine, hours, None)
    first = reading.fingerprint.measured[0].case
    with measuring_scan(next(case for case in cohort.cases if case.name == first)) as part:
        measure = partial(measure_speed, case=part)
        return make_plan(draft, split, reading, machine, hours, measure)


def list_cases(cohort: Cohort, organs: Mapping[str, tuple[int, ...]]) -> pd.DataFrame:
    """Return the table of cases that a split is chosen by, as `choose_split` takes it."""
    return pd.DataFrame(
        {
            "case": [case.name for case in cohort.cases],
            "patient": [case.patient for case in cohort.cases],
            "annotated": [";".join(cohort.annotated_organs(c, organs)) for c in cohort.cases],
            "training_only": [case.training_only for case in cohort.cases],
        }
    )


def list_tested(split: SplitChoice) -> list[str]:
    """Return the cases of test patients, which a plan may not look at."""
    tested = split.table["fold"].isin(["test", "unused"])
    return [str(case) for case in split.table.loc[tested, "case"]]


def make_plan(
    draft: Draft,
    split: SplitChoice,
    reading: Reading,
    machine: Machine,
    hours: float,
    measure: Measure | None,
) -> Plan:
    """Make a plan of what was measured; the same measurements give the same plan.

    Args:
        draft: with the split, as `plan_split` leaves it.
        split: of the patients.
        reading: of the scans outside the test set, at least one.
        machine: to train on.
        hours: of all trainings of `dvc repro` together.
        measure: returns the speed of a network; None if it cannot be known, so that epochs and
            times are not planned.

    Raises:
        StageError: no training fits time or memory.
    """
    fingerprint = reading.fingerprint
    _plan_slices(draft, fingerprint)
    _plan_recipes(draft, split)
    training = TrainingPlanner(draft, split, fingerprint, machine, hours, measure)
    training.plan()
    _plan_margins(draft, split)
    order = list(_dotted(draft.params.model_dump(mode="json", by_alias=True)))
    return Plan(
        tuple(sorted(draft.proposals, key=lambda each: order.index(each.key))),
        {} if split.gap else _stage_times(training, split, reading),
        tuple(_impossible(split, draft.params)),
        tuple(_unknown(fingerprint, machine)),
        reading,
    )


def _dotted(content: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in content.items():
        keys.append(f"{prefix}{key}")
        keys += _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else []
    return keys


def plan_split(draft: Draft, cases: pd.DataFrame) -> SplitChoice:
    """Choose and propose the split of the patients.

    Args:
        draft: receives the proposals.
        cases: as `list_cases` returns it.
    """
    params = draft.params
    own = {key.removeprefix("split.") for key in draft.mine if key.startswith("split.")}
    wanted = params.register_.min_patients
    choice = choose_split(cases, list(params.organs), params.split, wanted, own)
    if choice.gap is not None:
        for key in ("split.test_fraction", "split.folds", "split.val_fold"):
            draft.propose(key, get_value(params, key), f"kept: there is no {choice.gap}")
        return choice
    if choice.params.salt != params.split.salt:
        draft.propose("split.salt", choice.params.salt, "with the present one a set lacks an organ")
    before, after = params.split, choice.params
    is_kept = (before.salt, before.test_fraction) == (after.salt, after.test_fraction)
    kept = "kept" if is_kept else "another test set: verdicts before do not compare"
    draft.propose(
        "split.test_fraction",
        after.test_fraction,
        f"{choice.num_test} test patients of the rarest organ; {kept}",
    )
    num_val = count_patients(choice.table, "val")
    draft.propose("split.folds", after.folds, f"{num_val} patients validate")
    draft.propose("split.val_fold", after.val_fold, "lacks no organ, in training or validation")
    return choice


def _plan_slices(draft: Draft, fingerprint: Fingerprint) -> None:
    organs = [organ for case in fingerprint.measured for organ in case.organs.values()]
    window = rules.choose_window(organs)
    if window is None:
        present = get_value(draft.params, "slice.window_hu")
        draft.propose("slice.window_hu", present, "no organ was measured")
    else:
        draft.propose("slice.window_hu", [float(end) for end in window], "organs and around them")
    spacings = [case.spacing_mm[0] for case in fingerprint.cases]
    draft.propose(
        "slice.neighbour_mm",
        rules.choose_neighbour_mm(fingerprint.cases),
        f"slices every {min(spacings):.3g} to {max(spacings):.3g} mm, "
        f"median {np.median(spacings):.3g}",
    )


def _plan_recipes(draft: Draft, split: SplitChoice) -> None:
    num_patients = count_patients(split.table, "train")
    for name, recipe in draft.params.recipes.items():
        if recipe.cgm:
            keeps = rules.keeps_cgm(num_patients)
            reason = f"{num_patients} patients {'suffice' if keeps else 'are too few'}"
            draft.propose(f"recipes.{name}.cgm", keeps, f"{reason} for a slice classifier")


def _plan_margins(draft: Draft, split: SplitChoice) -> None:
    margin = resolved_margin(split.num_test, draft.params.register_)
    for key in ("register.max_organ_dice_loss", "register.champion_margin"):
        present = get_value(draft.params, key)
        if margin is None:
            draft.propose(key, present, f"{split.num_test} test patients can exclude no loss")
        else:
            draft.propose(
                key,
                max(present, margin),
                f"{split.num_test} test patients can exclude {margin:g} if networks are equal",
            )


def _stage_times(
    training: TrainingPlanner, split: SplitChoice, reading: Reading
) -> dict[str, float | None]:
    """Return the seconds of each stage."""
    cases = reading.fingerprint.cases
    num_voxels = float(np.mean([np.prod(case.shape_ZYX) for case in cases]))
    num_slices = float(np.mean([case.shape_ZYX[0] for case in cases]))
    num_cases = reading.fingerprint.num_cases
    read_s = reading.seconds_per_voxel * num_voxels
    stages: dict[str, float | None] = {"slice": read_s * num_cases, "split": 3.0}
    num_tested = int((split.table["fold"] == "test").sum())
    length = training.length
    for name, speed in training.speeds.items():
        seconds = None
        if length is not None:
            seconds = START_S + length.num_epochs * (
                length.slices_per_epoch * speed.training_s
                + training.num_val_slices * speed.validation_s
            )
        stages |= {f"train@{name}-{seed}": seconds for seed in range(training.num_seeds)}
    # An ensemble is scored in addition to its members, by what they predicted.
    num_scored = training.num_seeds + (training.num_seeds > 1)
    for name, speed in training.speeds.items():
        predict_s = training.num_seeds * num_slices * speed.validation_s
        case_s = predict_s + num_scored * SCORING_FACTOR * read_s
        stages[f"evaluate@{name}"] = EVALUATE_START_S + num_tested * case_s
    return {**stages, "register": 20.0}


def _impossible(split: SplitChoice, params: Params) -> Iterator[str]:
    """Yield what the patients are too few for, in sentences without their full stop."""
    wanted = params.register_.min_patients
    if split.gap is not None:
        yield (
            f"a training: there is no {split.gap}, and no other split has all that it needs: a "
            "patient each for training, validation and test, and one of every organ in training "
            "and in validation. Add scans, then plan again; this plan takes all for training"
        )
    if split.num_test < wanted:
        yield (
            f"a verdict: it needs {wanted} test patients of every organ (register.min_patients), "
            f"so about {math.ceil(wanted / FRACTIONS[-1])} patients or more"
        )


def _unknown(fingerprint: Fingerprint, machine: Machine) -> list[str]:
    """Return what a plan cannot know, in sentences without their full stop."""
    found = []
    measured, num_cases = len(fingerprint.measured), len(fingerprint.cases)
    if measured < num_cases:
        found.append(
            f"voxels of {measured} of {num_cases} scans were read: another one may be larger or "
            "have other HU"
        )
    if fingerprint.num_tested:
        found.append(f"scans of test patients: none of these {fingerprint.num_tested} was opened")
    found += [
        "contrast phase, and whether annotations are right, stand in no header",
        "which Dice these values reach: only training tells",
    ]
    if machine.is_here:
        found.append(
            "times hold on this machine at rest"
            if machine.load < machine.num_cores
            else f"{machine.load:.0f} programs ran on {machine.num_cores} cores before steps were "
            "measured, so times are too long: plan again on a machine at rest"
        )
    else:
        found.append(
            f"the time of a step on {machine.gpu}: run `fullscale plan` there for epochs and times"
        )
    return found
