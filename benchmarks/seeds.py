"""Variation of the verdict: train and compare both networks with several training seeds.

    python -m benchmarks.seeds --seeds 5

Needs artifacts/slices and artifacts/split.csv, so run `dvc repro` first. Every parameter but
`train.seed` is that of params.yaml. Networks, scores and runs go to a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path

import pandas as pd

from fullscale.evaluation.promotion_gate import Trial, judge
from fullscale.evaluation.summary import evaluate_network, summarise
from fullscale.params import Params, load_params
from fullscale.prediction.network_files import load_trained
from fullscale.runtime.markdown import format_table
from fullscale.scans.cohort import read_cohort
from fullscale.scans.slice_store import SliceStore
from fullscale.tracking.run_record import RunDescription
from fullscale.tracking.runs import training_run
from fullscale.tracking.store import Store
from tasks.train import TrainingSession, train_network


def run_seed(params: Params, seed: int, folder: Path) -> list[dict[str, object]]:
    """Return one row for each network: test metrics, training time and verdict."""
    params = params.model_copy(update={"train": params.train.model_copy(update={"seed": seed})})
    split = pd.read_csv("artifacts/split.csv", dtype=str)
    test_cases = split.loc[split["fold"] == "test", "case"].tolist()
    cohort = read_cohort(Path("data"))
    store = Store(f"sqlite:///{folder / 'mlflow.db'}", (folder / "runs").as_uri())
    scores, rows = {}, []
    for name in params.networks:
        start = time.monotonic()
        run_description = RunDescription(store.uri, store.artifact_location, name, {}, {}, "seeds")
        with training_run(run_description, folder / f"{name}-tracking") as run:
            train_network(
                name,
                params,
                SliceStore(Path("artifacts/slices")),
                split,
                folder / name,
                TrainingSession(run),
            )
        train_s = time.monotonic() - start
        _, scores[name] = evaluate_network(
            load_trained(folder / name), cohort, test_cases, params.evaluate
        )
        metrics = summarise(scores[name], tuple(params.organs))
        rows.append({"seed": seed, "network": name, "train_s": train_s, **metrics})
    settings = params.register_
    trial = Trial(tuple(params.organs), "seeds")
    verdict = judge(scores[settings.candidate], scores[settings.baseline], None, trial, settings)
    gain = verdict.gain
    for row in rows:
        row |= {"verdict": verdict.status, "gain": gain.mean, "low": gain.low, "high": gain.high}
    return rows


def format_markdown(rows: list[dict[str, object]], organs: tuple[str, ...]) -> str:
    """Return the table of docs/method.md."""
    headings = ["seed", "network"]
    for organ in organs:
        headings += [f"Dice {organ}", f"slice FPR {organ}"]
    headings += ["Dice gain (interval)", "promotion gate"]
    table = []
    for row in rows:
        cells = [str(row["seed"]), str(row["network"])]
        for organ in organs:
            cells += [f"{row[f'test/dice/{organ}']:.4f}", f"{row[f'test/slice_fpr/{organ}']:.4f}"]
        cells += [
            f"{row['gain']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})",
            str(row["verdict"]),
        ]
        table.append(cells)
    lines = format_table(headings, table)
    verdicts = [row["verdict"] for row in rows[:: len({row["network"] for row in rows})]]
    lines.append(
        f"\nThe promotion gate passed in {verdicts.count('pass')} of {len(verdicts)} seeds."
    )
    return "\n".join(lines)


def main() -> None:
    """Print the table, and also write it as JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    params = load_params(Path("params.yaml"))
    rows = []
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            rows += run_seed(params, seed, Path(folder))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    print(format_markdown(rows, tuple(params.organs)))


if __name__ == "__main__":
    main()
