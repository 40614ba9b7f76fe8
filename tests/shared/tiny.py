"""The smallest parameters, cohort and store that a test of a stage works with."""

from __future__ import annotations

import copy

import yaml
from project import ROOT

TINY = {
    "organs": {"liver": [1], "spleen": [2]},  # ids: a network is described without a cohort
    "seeds": [0],
    "slice": {"size_px": 32, "pixel_mm": 12, "neighbour_mm": 8},
    "train": {"width": 4, "num_epochs": 2, "batch_size": 8, "num_picture_slices": 2},
    "register": {
        "num_bootstrap": 200,
        "min_patients": 2,
        "min_dice_gain": 0,
        "confidence": 0.7,  # 15 %, one-sided: three test patients reach 12.5 %
    },
}
ANNOTATED = ["liver;spleen"] * 6 + ["liver", "spleen"]
CASES = "".join(f"case_{i:02d},patient_{i:02d},{names}\n" for i, names in enumerate(ANNOTATED))


def published() -> dict:
    """The content of the project's own params.yaml, as a fresh copy."""
    return yaml.safe_load((ROOT / "params.yaml").read_text())


def changed(changes: dict, base: dict | None = None) -> dict:
    """params.yaml with some keys changed, section by section."""
    content = published() if base is None else copy.deepcopy(base)
    for section, values in changes.items():
        if isinstance(values, dict) and isinstance(content.get(section), dict):
            content[section] = {**content[section], **values}
        else:
            content[section] = values
    return content
