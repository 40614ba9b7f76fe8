"""Make a plan: a value and a reason for each parameter, the time of each stage, what is unknown."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fullscale.label_names import resolve_organs
from fullscale.params import Params
from fullscale.planning import rules
from fullscale.planning.draft import Draft, Proposal, get_value
from fullscale.planning.fingerprint import Fingerprint, Progress, Reading, measure_cohort
from fullscale.planning.machine import Machine
from fullscale.planning.split_rules import SplitChoice, choose_split, resolved_margin
from fullscale.planning.training_planner import START_S, TrainingPlanner
from fullscale.runtime.errors import StageError
from fullscale.scans.cohort import Cohort

SCORING_FACTOR = 2.0
"""Time of scoring a scan by that of reading and measuring it: judged, not measured."""


@dataclass(frozen=True)
class Plan:
    """Parameters for a cohort, a machine and a time.

    Attributes:
        proposals: in the order of params.yaml.
        stages: seconds of each stage; None if unknown.
        unknown: what the plan cannot know.
        fingerprint: of the cohort.
        params: with the values of the plan.
    """

    proposals: tuple[Proposal, ...]
    stages: dict[str, float | None]
    unknown: tuple[str, ...]
    fingerprint: Fingerprint
    params: Params

    @property
    def changes(self) -> dict[str, Any]:
        """Key to value of all that params.yaml has otherwise."""
        return {each.key: each.value for each in self.proposals if each.is_change}


def make_plan(
    cohort: Cohort,
    data_version: str,
    params: Params,
    mine: Collection[str],
    machine: Machine,
    hours: float,
    progress: Progress | None = None,
) -> Plan:
    """Make a plan.

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
    by_id = params.model_copy(update={"organs": organs})
    draft = Draft(params, mine)
    split = _plan_split(draft, cohort, organs)
    tested = split.table.loc[split.table["fold"].isin(["test", "unused"]), "case"]
    reading = measure_cohort(
        cohort,
        organs,
        tested,
        data_version,
        body_threshold_hu=params.slice.body_threshold_hu,
        progress=progress,
    )
    if not reading.fingerprint.cases:
        raise StageError("every case is in the test set, so nothing is left to plan by; add scans")
    _plan_slices(draft, reading.fingerprint)
    training = TrainingPlanner(draft, by_id, cohort, split, reading.fingerprint, machine, hours)
    training.plan()
    _plan_margins(draft, split)
    order = list(_dotted(params.model_dump(mode="json", by_alias=True)))
    return Plan(
        tuple(sorted(draft.proposals, key=lambda each: order.index(each.key))),
        _stage_times(training, split, reading),
        tuple(_unknown(reading.fingerprint, machine)),
        reading.fingerprint,
        draft.planned(),
    )


def _dotted(content: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in content.items():
        keys.append(f"{prefix}{key}")
        keys += _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else []
    return keys


def _plan_split(draft: Draft, cohort: Cohort, organs: Mapping[str, tuple[int, ...]]) -> SplitChoice:
    params = draft.params
    cases = pd.DataFrame(
        {
            "case": [case.name for case in cohort.cases],
            "patient": [case.patient for case in cohort.cases],
            "annotated": [";".join(cohort.annotated_organs(c, organs)) for c in cohort.cases],
            "training_only": [case.training_only for case in cohort.cases],
        }
    )
    own = {key.removeprefix("split.") for key in draft.mine if key.startswith("split.")}
    wanted = params.register_.min_patients
    choice = choose_split(cases, list(organs), params.split, wanted, own)
    if choice.gap is not None:
        raise StageError(
            f"no split of these patients has all it needs: there is no {choice.gap}; try another "
            "split.salt, or add scans"
        )
    before, after = params.split.test_fraction, choice.params.test_fraction
    kept = "kept" if before == after else "another test set: verdicts before do not compare"
    few = f"; a verdict needs {wanted}" if choice.num_test < wanted else ""
    num_val = int(choice.table.loc[choice.table["fold"] == "val", "patient"].nunique())
    draft.propose(
        "split.test_fraction",
        after,
        f"{choice.num_test} test patients of the rarest organ{few}; {kept}",
    )
    draft.propose("split.folds", choice.params.folds, f"{num_val} patients validate")
    draft.propose(
        "split.val_fold", choice.params.val_fold, "lacks no organ, in training or validation"
    )
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
    # An ensemble is scored in addition to its members.
    num_scored = training.num_seeds + (training.num_seeds > 1)
    for name, speed in training.speeds.items():
        case_s = num_slices * speed.validation_s + SCORING_FACTOR * read_s
        stages[f"evaluate@{name}"] = num_scored * num_tested * case_s
    return {**stages, "register": 20.0}


def _unknown(fingerprint: Fingerprint, machine: Machine) -> list[str]:
    """Return what a plan cannot know, in sentences without their full stop."""
    found = []
    measured, num_cases = len(fingerprint.measured), len(fingerprint.cases)
    if measured < num_cases:
        found.append(
            f"voxels of {measured} of {num_cases} scans were read: another one may be larger or "
            "have other HU"
        )
    found += [
        f"the {fingerprint.num_tested} scans of test patients were not opened",
        "contrast phase, and whether annotations are right, stand in no header",
        "which Dice these values reach: only training tells",
    ]
    if machine.is_here:
        busy = os.getloadavg()[0]
        found.append(
            "times hold on this machine at rest"
            if busy < machine.num_cores
            else f"{busy:.0f} programs ran on {machine.num_cores} cores while steps were measured, "
            "so times are too long: plan again on a machine at rest"
        )
    else:
        found.append(
            f"the time of a step on {machine.gpu}: run `fullscale plan` there for epochs and times"
        )
    return found
