"""Score a trained network on scans of the same phantoms with arms, tables, fields and thin slices.

    python -m benchmarks.geometry [--network artifacts/train/unet3plus] [--patients 6]

A network should see an organ alike in every scan. The patients are drawn with a seed of their own,
so no scan of the sample shows one of them. Means over patients; a false closing is a slice of the
organ that the slice classifier (CGM) closes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks.machine import describe_machine
from fullscale.evaluation.metrics import score_classifier, score_overlap
from fullscale.phantom.patient import Options, simulate_patient
from fullscale.phantom.sample import ORGANS
from fullscale.prediction.network_files import load_members, member_folders
from fullscale.prediction.predictor import Predictor
from fullscale.runtime.console import track
from fullscale.scans.geometry import Geometry
from fullscale.scans.volume import Volume

SEED = 20_000
SCANS: dict[str, Options] = {
    "arms up": {},
    "arms beside the trunk": {"arms": "beside"},
    "arms that touch": {"arms": "touching"},
    "large padded field, arms": {"arms": "beside", "padded": True},
    "cushion": {"cushion": True},
    "thick table": {"thick_table": True},
    "slices of 7 mm": {"slice_mm": 7.0},
    "slices of 1.75 mm": {"slice_mm": 1.75},
    "slices of 0.88 mm": {"slice_mm": 0.88},
}
GROUPS = (tuple(SCANS)[:6], tuple(SCANS)[6:])
"""Scans that should be scored alike."""
GOAL = 0.02
MIN_FALSE_POSITIVE_MM2 = 90


def simulate(patient: int, options: Options) -> tuple[Volume, np.ndarray]:
    """Return a scan and its label map, (Z, Y, X), canonical orientation."""
    hu_ZYX, label_ZYX, acquisition = simulate_patient(SEED, patient, **options)
    z, y, x = acquisition.spacing_mm
    geometry = Geometry(hu_ZYX.shape[::-1], np.diag([-x, -y, z, 1.0]))
    return Volume(hu_ZYX, geometry), label_ZYX


def score_scan(
    predictor: Predictor, scan: Volume, label_ZYX: np.ndarray
) -> Iterator[dict[str, Any]]:
    """Yield a row for each organ of a network."""
    found = predictor.predict(predictor.slice_scan(scan))
    labels_ZYX = predictor.label_map(found)
    for organ in found.organs:
        true_ZYX = label_ZYX == ORGANS[organ]
        overlap = score_overlap(
            labels_ZYX == predictor.description.organs[organ][0],
            true_ZYX,
            scan.spacing_mm,
            MIN_FALSE_POSITIVE_MM2,
        )
        row: dict[str, Any] = {"organ": organ, "Dice": overlap.dice, "slice FPR": overlap.slice_fpr}
        present_Z = found.organ_probability(organ)
        if present_Z is not None:
            scores = score_classifier(present_Z > 0.5, true_ZYX)
            row["false closings"] = 1 - scores.classifier_sensitivity
        yield row


def main() -> None:
    """Score every kind of scan, and print the table as JSON lines and as text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", type=Path, default=Path("artifacts/train/unet3plus"))
    parser.add_argument("--patients", type=int, default=6)
    parser.add_argument("--kinds", nargs="*", choices=tuple(SCANS), default=tuple(SCANS))
    arguments = parser.parse_args()
    trained = load_members(member_folders(arguments.network))
    predictor = Predictor(trained, 0.5, 16, torch.device("cpu"))
    work = [(kind, patient) for patient in range(arguments.patients) for kind in arguments.kinds]
    rows = []
    for kind, patient in track(work, "scans", len(work)):
        scan, label_ZYX = simulate(patient, SCANS[kind])
        found = score_scan(predictor, scan, label_ZYX)
        rows.extend({"scan": kind, "patient": patient} | row for row in found)
    columns = [name for name in rows[0] if name not in ("scan", "patient", "organ")]
    table = pd.DataFrame(rows).pivot_table(columns, "scan", "organ", sort=False)
    print(table.to_string(float_format="{:.3f}".format))
    for group in GROUPS:
        scanned = [kind for kind in group if kind in table.index]
        for organ, scores in table["Dice"].loc[scanned].items() if scanned else ():
            spread = float(scores.max() - scores.min())
            verdict = "kept" if spread <= GOAL else "not kept"
            print(f"{organ}: {scanned[0]} to {scanned[-1]}: Dice {spread:.3f} apart, {verdict}")
    settings = trained.description.slice.model_dump()
    print(json.dumps({"network": str(arguments.network), "slice": settings}))
    print(json.dumps({"patients": arguments.patients, **describe_machine(torch.device("cpu"))}))


if __name__ == "__main__":
    main()
