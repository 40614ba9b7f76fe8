"""Read a slice store: one folder per case, memory-mapped, and tables of all cases and slices.

    <root>/store.json          organs in order, their label ids, size_px, window_hu, version
    <root>/cases.csv           one row per case: patient, annotated organs, slices, lost voxels,
                               and training_only if any case has that flag
    <root>/index.csv           one row per slice: case, patient, z, pixels of each organ
    <root>/<case>/image.npy    int16 (Z, H, W), HU within the window
    <root>/<case>/label.npy    uint8 (Z, H, W), 0 background, then the organs from 1; 255 where
                               nobody judged
    <root>/<case>/case.json    patient, annotated organs, grid, checksums, lost voxels

A pixel count is empty if the case does not annotate the organ. `slice_writer` writes the store.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fullscale.scans.checks import failure

if TYPE_CHECKING:
    from fullscale.scans.slicing import Grid

STORE_VERSION = 3
TABLES = ("store.json", "cases.csv", "index.csv")


@dataclass(frozen=True, eq=False)
class SlicedCase:
    """The slices of one case.

    Attributes:
        name: name of the case.
        patient: identifier of the patient.
        annotated: organs annotated in this case.
        image: int16 (Z, H, W), HU, memory-mapped.
        label: uint8 (Z, H, W), 0 background, then organs from 1, `IGNORED_ID` where nobody judged;
            memory-mapped.
        grid: maps slices back to the scan.
        num_lost: for each organ, its voxels of the scan outside the slices.
    """

    name: str
    patient: str
    annotated: tuple[str, ...]
    image: NDArray[np.int16]
    label: NDArray[np.uint8]
    grid: Grid
    num_lost: dict[str, int]


class SliceStore:
    """A slice store on disk, read-only.

    Args:
        root: folder of the store.

    Raises:
        ScanError: the store is missing, incomplete, or of another version.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        for name in TABLES:
            if not (self.root / name).is_file():
                raise failure("store_missing", f"no file {self.root / name}")
        content = json.loads((self.root / "store.json").read_text(encoding="utf-8"))
        if content.get("version") != STORE_VERSION:
            raise failure(
                "store_missing",
                f"{self.root} of version {content.get('version')}, not {STORE_VERSION}",
            )
        self.organs: tuple[str, ...] = tuple(content["organs"])
        self.label_ids: dict[str, tuple[int, ...]] = {
            organ: tuple(ids) for organ, ids in content["label_ids"].items()
        }
        self.size_px: int = int(content["size_px"])
        low, high = content["window_hu"]
        self.window_hu: tuple[float, float] = (float(low), float(high))

    @cached_property
    def index(self) -> pd.DataFrame:
        """One row per slice: case, patient, z, and pixels of each organ (NaN: not annotated)."""
        # Names such as "NA" or "001" must stay text.
        return pd.read_csv(
            self.root / "index.csv",
            dtype={"case": str, "patient": str, **dict.fromkeys(self.organs, float)},
            keep_default_na=False,
            na_values={organ: [""] for organ in self.organs},
        )

    @cached_property
    def cases(self) -> pd.DataFrame:
        """One row per case: case, patient, annotated (";"-separated), num_slices, num_lost.

        The bool column training_only is there only if any case has that flag.
        """
        return pd.read_csv(
            self.root / "cases.csv",
            dtype={"case": str, "patient": str, "annotated": str},
            keep_default_na=False,
        )

    def load(self, case: str) -> SlicedCase:
        """Open one case; pixels are read from disk on first use.

        Raises:
            ScanError: the case is not in the store.
        """
        # Imported here because it needs SciPy and nibabel, and most readers want the tables only.
        from fullscale.scans.slicing import Grid

        folder = self.root / case
        if case not in set(self.cases["case"]) or not (folder / "case.json").is_file():
            raise failure("store_missing", f"no case {case!r} in {self.root}")
        content = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        return SlicedCase(
            name=case,
            patient=content["patient"],
            annotated=tuple(content["annotated"]),
            image=np.load(folder / "image.npy", mmap_mode="r"),
            label=np.load(folder / "label.npy", mmap_mode="r"),
            grid=Grid.from_json(content["grid"]),
            num_lost=dict(content["num_lost"]),
        )
