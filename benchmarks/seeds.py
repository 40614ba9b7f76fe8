"""How often the promotion gate passes trained networks, over groups of trainings with other seeds.

    python -m benchmarks.seeds

Needs many trainings of candidate and baseline, such as `seeds: [0, 1, ..., 19]` in params.yaml, and
`dvc repro evaluate@unet evaluate@unet3plus`. Groups of one training, of as many as the published
verdict has and of five are drawn from them, and the gate judges each pair of groups on the same
test patients.
A network against itself, in two groups without a common training, must not pass: what does, passes
by the luck of training. Failures, mean Dice and slice FPR are judged on the trainings, because the
ensemble of each group is not scored.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from fullscale.evaluation.paired import SEED
from fullscale.evaluation.promotion_gate import WANTED_SEEDS, Trial, judge
from fullscale.evaluation.score_files import read_scores
from fullscale.params import RegisterParams
from fullscale.runtime.markdown import format_table
from fullscale.workspace import open_workspace

SIZES = (1, WANTED_SEEDS, 5)
"""Trainings in a group; two groups need twice as many."""


def draw_groups(
    first: pd.DataFrame, second: pd.DataFrame, size: int, rng: np.random.Generator
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the scores of `size` trainings of each table, without a common seed."""
    seeds = rng.permutation(first[SEED].unique())
    return first[first[SEED].isin(seeds[:size])], second[second[SEED].isin(seeds[size : 2 * size])]


def measure(
    first: pd.DataFrame,
    second: pd.DataFrame,
    size: int,
    num_draws: int,
    params: RegisterParams,
) -> tuple[float, float, float]:
    """Return the share of pairs of groups that pass, and the gain's mean and standard deviation."""
    rng = np.random.default_rng(params.seed)
    trial = Trial(tuple(sorted(first["organ"].unique())), "groups of seeds")
    verdicts = [
        judge(*draw_groups(first, second, size, rng), None, trial, params) for _ in range(num_draws)
    ]
    gains = [verdict.gain.mean for verdict in verdicts]
    passed = [verdict.status == "pass" for verdict in verdicts]
    return float(np.mean(passed)), float(np.mean(gains)), float(np.std(gains, ddof=1))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=400, help="pairs of groups in a row")
    arguments = parser.parse_args()
    workspace = open_workspace(Path())
    params = workspace.load_params().register_
    candidate, baseline = params.candidate, params.baseline
    tables = {network: read_scores(workspace, network) for network in (candidate, baseline)}
    num_trainings = min(table[SEED].nunique() for table in tables.values())
    rows = []
    for first, second in (
        (candidate, baseline), (candidate, candidate), (baseline, baseline),
    ):  # fmt: skip
        for size in (size for size in SIZES if 2 * size <= num_trainings):
            share, gain, spread = measure(
                tables[first], tables[second], size, arguments.draws, params
            )
            rows.append(
                (f"{first} against {second}", str(size), f"{100 * share:.1f}", f"{gain:+.4f}",
                 f"{spread:.4f}")
            )  # fmt: skip
            print(*rows[-1], sep="\t", flush=True)
    print(f"{num_trainings} trainings of each network, "
          f"{tables[candidate]['patient'].nunique()} test patients")  # fmt: skip
    headings = ("networks", "trainings in a group", "pass, %", "mean gain", "its sd")
    print("\n".join(format_table(headings, rows)))


if __name__ == "__main__":
    main()
