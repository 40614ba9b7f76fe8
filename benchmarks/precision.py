"""Measure what bf16 does to the scores and to the time of segmentation.

    python -m benchmarks.precision [NETWORK]

Segments every test case in float32 and in bf16, in turns, and compares Dice of each organ. Needs
data/, artifacts/split.csv and a trained network, so run `make repro` first. On a processor without
bf16 instructions bf16 is emulated: Dice counts there, the time does not.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine
from fullscale.evaluation.case_scores import read_pair
from fullscale.label_names import resolve_organs
from fullscale.patient_split import cases_of, read_split
from fullscale.prediction.components import label_mask
from fullscale.prediction.network_files import load_members
from fullscale.prediction.predictor import Predictor
from fullscale.scans.cohort import read_cohort
from fullscale.workspace import open_workspace
from model.overlap import dice_score

PRECISIONS = ("fp32", "bf16")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", nargs="?", default="unet3plus")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    workspace = open_workspace(Path())
    params = workspace.load_params()
    cohort = read_cohort(workspace.data)
    organs = resolve_organs(params.organs, cohort.labels)
    tested = set(cases_of(read_split(workspace.split), "test"))
    trained = load_members(workspace.trainings(args.network, params.seeds))
    settings = params.evaluate
    predictors = [
        Predictor(
            trained, settings.threshold, settings.batch_size, device, precision, settings.gate
        )
        for precision in PRECISIONS
    ]
    rows, ratios = [], []
    for case in (case for case in cohort.cases if case.name in tested):
        scan, labels = read_pair(case)
        took_s, found = [], []
        for predictor in predictors:
            start = time.perf_counter()
            found.append(predictor.segment(scan).masks)
            took_s.append(time.perf_counter() - start)
        ratios.append(took_s[0] / took_s[1])
        for organ in cohort.annotated_organs(case, organs):
            truth = label_mask(labels.values_ZYX, organs[organ])
            scores = [
                dice_score(
                    int((truth & masks[organ]).sum()), int(masks[organ].sum()), int(truth.sum())
                )
                for masks in found
            ]
            rows.append((organ, *scores))
    by_case = pd.DataFrame(rows, columns=["organ", *PRECISIONS])
    console = Console(width=110)
    console.print(describe_machine(device))
    table = Table(title=f"{args.network}, {len(ratios)} test cases")
    for heading in ("organ", "Dice fp32", "Dice bf16", "difference of means", "largest of a case"):
        table.add_column(heading, justify="left" if heading == "organ" else "right")
    for organ, group in by_case.groupby("organ"):
        moved = group["bf16"] - group["fp32"]
        means = [f"{group[precision].mean():.5f}" for precision in PRECISIONS]
        table.add_row(str(organ), *means, f"{moved.mean():+.5f}", f"{moved.abs().max():.5f}")
    console.print(table)
    console.print(f"fp32 / bf16 seconds of a scan, median: {statistics.median(ratios[1:]):.2f}")


if __name__ == "__main__":
    main()
