"""The statistics of a segmented scan as JSON, the same from the command and from the servers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fullscale.prediction.segmentation import Model, Segmented
from fullscale.scans.volume import Volume
from fullscale.serving.input_checks import InputWarning


def result_to_json(
    name: str, scan: Volume, found: Segmented, input_warnings: Sequence[InputWarning], model: Model
) -> dict[str, Any]:
    """Return the statistics of one scan as plain numbers and text.

    Args:
        name: name of the scan for the user, such as its file name.
        scan: HU in canonical orientation.
        found: its segmentation.
        input_warnings: from `fullscale.serving.input_checks.check_scan`.
        model: the model that was used.
    """
    geometry = scan.geometry
    return {
        "input": name,
        "shape": list(geometry.own_shape),
        "orientation": geometry.orientation,
        "spacing_zyx_mm": [round(step, 4) for step in geometry.spacing_mm],
        "model": {
            "name": model.name,
            "version": model.version,
            "weights_sha256": model.weights_sha256,
        },
        "threshold": model.threshold,
        "gate": model.gate,
        "refine": model.refine,
        "precision": found.precision,
        "warnings": [
            {"code": each.code, "found": each.found, "wanted": each.wanted}
            for each in input_warnings
        ],
        "organs": {organ: each.to_json() for organ, each in found.organs.items()},
    }
