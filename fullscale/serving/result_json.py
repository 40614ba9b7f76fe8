"""What is said of a segmented scan, as plain numbers and text: one form, wherever it was asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fullscale.prediction.segmentation import Model, Segmented
from fullscale.scans.volume import Volume
from fullscale.serving.input_checks import Doubt


def describe_result(
    name: str, scan: Volume, found: Segmented, doubts: Sequence[Doubt], model: Model
) -> dict[str, Any]:
    """The statistics of one scan, ready for JSON.

    Args:
        name: the scan's, as whoever asked knows it.
        scan: HU in canonical orientation.
        found: what was found in it.
        doubts: what speaks against trusting that.
        model: what found it.
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
        "warnings": [
            {"code": each.code, "found": each.found, "wanted": each.wanted} for each in doubts
        ],
        "organs": {organ: each.to_json() for organ, each in found.organs.items()},
    }
