"""How often the promotion gate passes a network, in simulated test sets of one organ.

    python -m benchmarks.gate --trials 4000

A patient's Dice is that of the patient plus noise of the network; a network may miss the organ.
"Interval" is the rule of an earlier version: a bootstrap-t interval of the mean gain above 0.
"Gain" is the sign-flip test of the gain alone, "gate" is all that the promotion gate asks of Dice.
"No loss" is the condition on each organ: the largest loss that params.yaml allows is excluded.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from fullscale.evaluation.paired import compare_differences, one_sided_level
from fullscale.evaluation.promotion_gate import Trial, judge
from fullscale.evaluation.statistics import Array, bootstrap_mean
from fullscale.params import RegisterParams, load_params
from fullscale.runtime.markdown import format_table

NUMS_PATIENTS = (8, 12, 20, 40, 60)
MEAN_DICE, PATIENT_SD, NETWORK_SD = 0.88, 0.04, 0.02
MISSED_DICE = 0.15
"""Mean Dice where a network misses the organ."""
NUM_CHECKED = 5
"""Trials of each row in which the whole gate judges tables of scores, as a check."""


@dataclass(frozen=True)
class Situation:
    """A candidate and a baseline.

    Attributes:
        title: in the table.
        gain: of the candidate's mean Dice, where neither network misses the organ.
        candidate_misses, baseline_misses: probability that a network misses the organ of a patient.
    """

    title: str
    gain: float
    candidate_misses: float
    baseline_misses: float


def balance(misses: float) -> float:
    """Return the gain elsewhere that makes up for organs that only the candidate misses."""
    return misses * (MEAN_DICE - MISSED_DICE) / (1 - misses)


SITUATIONS = (
    Situation("equal networks", 0, 0, 0),
    Situation("equal networks, both miss 5 %", 0, 0.05, 0.05),
    Situation("equal means, the candidate misses 5 %", balance(0.05), 0.05, 0),
    Situation("better by 0.02", 0.02, 0, 0),
    Situation("better by 0.02, both miss 5 %", 0.02, 0.05, 0.05),
    Situation("better by 0.02, the baseline misses 5 %", 0.02, 0, 0.05),
)


def draw(situation: Situation, num_patients: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return the patients' Dice of candidate and baseline, each (P,)."""
    patients_P = rng.normal(MEAN_DICE, PATIENT_SD, num_patients)
    drawn = []
    for gain, misses in (
        (situation.gain, situation.candidate_misses),
        (0.0, situation.baseline_misses),
    ):
        found_P = patients_P + gain + rng.normal(0, NETWORK_SD, num_patients)
        missed_P = rng.uniform(0, 2 * MISSED_DICE, num_patients)
        dice_P = np.where(rng.random(num_patients) < misses, missed_P, found_P)
        drawn.append(np.clip(dice_P, 0, 1))
    return drawn[0], drawn[1]


def passes_interval(candidate_P: Array, baseline_P: Array, params: RegisterParams) -> bool:
    """Return the earlier version's decision."""
    differences_P = candidate_P - baseline_P
    return bootstrap_mean(differences_P, np.ones_like(differences_P), params).low > 0


def bound_gain(candidate_P: Array, baseline_P: Array, params: RegisterParams) -> float:
    """Return the lower bound of the gain."""
    level = one_sided_level(params)
    return compare_differences(candidate_P - baseline_P, level, params.seed, 0).low


def has_new_failure(candidate_P: Array, baseline_P: Array, params: RegisterParams) -> bool:
    """Return whether the candidate fails in a patient in whom the baseline does not."""
    limit = params.failure_dice
    return bool(((candidate_P < limit) & (baseline_P >= limit)).any())


def judge_tables(candidate_P: Array, baseline_P: Array, params: RegisterParams) -> bool:
    """Return the promotion gate's decision on tables of scores."""
    names = [str(patient) for patient in range(len(candidate_P))]
    candidate, baseline = (
        pd.DataFrame(
            {
                "case": names,
                "patient": names,
                "organ": "organ",
                "dice": dice_P,
                "num_true_voxels": 1,
                "num_free_slices": 1,
                "num_false_positive_slices": 0,
            }
        )
        for dice_P in (candidate_P, baseline_P)
    )
    return judge(candidate, baseline, None, Trial(("organ",), "simulated"), params).status == "pass"


def measure(
    situation: Situation, num_patients: int, num_trials: int, params: RegisterParams
) -> Array:
    """Return the shares of trials that pass, (4,): interval, gain, gate, no loss."""
    rng = np.random.default_rng(num_patients)
    num_passed = np.zeros(4, dtype=int)
    for trial in range(num_trials):
        pair = draw(situation, num_patients, rng)
        low = bound_gain(*pair, params)
        # A gain that is shown is no loss, and the floor is far below: nothing else can fail.
        gate = low > 0 and not has_new_failure(*pair, params)
        if trial < NUM_CHECKED and gate != judge_tables(*pair, params):
            raise AssertionError(f"the promotion gate decides otherwise on {pair}")
        no_loss = low >= -params.max_organ_dice_loss
        num_passed += passes_interval(*pair, params), low > 0, gate, no_loss
    return num_passed / num_trials


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=4000, help="test sets of each row")
    parser.add_argument("--bootstrap", type=int, default=1000, help="samples of an interval")
    arguments = parser.parse_args()
    params = load_params(Path("params.yaml")).register_
    params = params.model_copy(update={"num_bootstrap": arguments.bootstrap})
    rows = []
    for situation in SITUATIONS:
        for num_patients in NUMS_PATIENTS:
            shares = measure(situation, num_patients, arguments.trials, params)
            rows.append(
                (situation.title, str(num_patients), *(f"{100 * share:.1f}" for share in shares))
            )
            print(*rows[-1], sep="\t", flush=True)
    headings = ("networks", "patients", "interval, %", "gain, %", "gate, %", "no loss, %")
    print("\n".join(format_table(headings, rows)))


if __name__ == "__main__":
    main()
