"""The metrics of a training, epoch by epoch, as CSV."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from fullscale.runtime.files import write_atomically

HISTORY_NAME = "history.csv"


def write_history(path: Path, rows: list[dict[str, float]]) -> None:
    """Write one row of metrics per epoch, with 6 significant digits."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.6g}" for key, value in row.items()})
    write_atomically(path, buffer.getvalue())


def read_history(path: Path) -> list[dict[str, float]]:
    """Read the rows that `write_history` wrote, values as numbers."""
    with path.open(encoding="utf-8", newline="") as stream:
        return [
            {_present_name(key): float(value) for key, value in row.items()}
            for row in csv.DictReader(stream)
        ]


def _present_name(key: str) -> str:
    """Rename the metric that older versions called val/gate_accuracy/ORGAN."""
    return key.replace("val/gate_accuracy/", "val/classifier_accuracy/")
