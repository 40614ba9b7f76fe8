"""The slice store: one folder per case, memory-mapped, and one table of all slices.

    <root>/store.json          organs in order, size_px, window_hu, version
    <root>/cases.csv           one row per case: patient, annotated organs, slices, lost voxels,
                               and training_only where some cases are
    <root>/index.csv           one row per slice: case, patient, z, pixels of each organ
    <root>/<case>/image.npy    int16 (Z, H, W), HU within the window
    <root>/<case>/label.npy    uint8 (Z, H, W), 0 background, then the organs from 1
    <root>/<case>/case.json    patient, annotated organs, grid, checksums, lost pixels

A pixel count is empty where the case does not annotate the organ. Needs pandas and numpy only.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy
from numpy.typing import NDArray

from fullscale.runtime.files import file_sha256, write_atomically
from fullscale.scans import geometry, slicing, volume
from fullscale.scans.checks import failure
from fullscale.scans.cohort import TRAINING_ONLY, Case, checksum, write_json
from fullscale.scans.geometry import check_aligned
from fullscale.scans.slicing import Grid, plan_grid, slice_image, slice_labels
from fullscale.scans.volume import read_image, read_labels

STORE_VERSION = 1
TABLES = ("store.json", "cases.csv", "index.csv")
_ARRAYS = ("image.npy", "label.npy")


@dataclass(frozen=True)
class SliceRecipe:
    """All that decides what slices of a scan look like.

    Attributes:
        organs: label ids of each organ, organs in order.
        size_px: pixels along each side of a slice.
        window_hu: lowest and highest HU kept.
        body_threshold_hu: what is denser may be body.
        body_margin_mm: kept around the body.
    """

    organs: Mapping[str, Sequence[int]]
    size_px: int
    window_hu: tuple[float, float]
    body_threshold_hu: float
    body_margin_mm: float


@dataclass(frozen=True, eq=False)
class SlicedCase:
    """The slices of one case.

    Attributes:
        name: of the case.
        patient: whose scan it is.
        annotated: organs that were drawn in it.
        image: int16 (Z, H, W), HU, memory-mapped.
        label: uint8 (Z, H, W), 0 background, then organs from 1, memory-mapped.
        grid: the way back to the scan.
        num_lost: organ voxels of the scan that lie outside the slices.
    """

    name: str
    patient: str
    annotated: tuple[str, ...]
    image: NDArray[np.int16]
    label: NDArray[np.uint8]
    grid: Grid
    num_lost: int


class SliceStore:
    """Reads a slice store.

    Args:
        root: its folder.

    Raises:
        ScanError: the store is missing, incomplete, or of another version.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        for name in TABLES:
            if not (self.root / name).is_file():
                raise failure("store_missing", f"no file {self.root / name}")
        description = json.loads((self.root / "store.json").read_text(encoding="utf-8"))
        if description.get("version") != STORE_VERSION:
            raise failure(
                "store_missing",
                f"{self.root} of version {description.get('version')}, not {STORE_VERSION}",
            )
        self.organs: tuple[str, ...] = tuple(description["organs"])
        self.size_px: int = int(description["size_px"])
        low, high = description["window_hu"]
        self.window_hu: tuple[float, float] = (float(low), float(high))

    @cached_property
    def index(self) -> pd.DataFrame:
        """One row per slice: case, patient, z, and pixels of each organ (NaN: not annotated)."""
        return pd.read_csv(
            self.root / "index.csv",
            dtype={"case": str, "patient": str, **dict.fromkeys(self.organs, float)},
            keep_default_na=False,
            na_values={organ: [""] for organ in self.organs},
        )

    @cached_property
    def cases(self) -> pd.DataFrame:
        """One row per case: case, patient, annotated (";"-separated), num_slices, num_lost.

        Where some cases are for training only there is also a column training_only, of bool.
        """
        return pd.read_csv(
            self.root / "cases.csv",
            dtype={"case": str, "patient": str, "annotated": str},
            keep_default_na=False,
        )

    def load(self, case: str) -> SlicedCase:
        """Open one case; pixels are read from disk when they are used.

        Raises:
            ScanError: the case is not in the store.
        """
        folder = self.root / case
        if case not in set(self.cases["case"]) or not (folder / "case.json").is_file():
            raise failure("store_missing", f"no case {case!r} in {self.root}")
        about = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        return SlicedCase(
            name=case,
            patient=about["patient"],
            annotated=tuple(about["annotated"]),
            image=np.load(folder / "image.npy", mmap_mode="r"),
            label=np.load(folder / "label.npy", mmap_mode="r"),
            grid=Grid.from_json(about["grid"]),
            num_lost=int(about["num_lost"]),
        )


def clear_store(root: Path, cases: Set[str], cache_dir: Path | None = None) -> None:
    """Make a store ready to be filled again.

    Its tables go until they are true again; so do cases that are not wanted any more, and what a
    run that was killed left half done.

    Args:
        root: of the store, made if it is not there.
        cases: names of the cases that may stay.
        cache_dir: as in `write_case`.
    """
    root.mkdir(parents=True, exist_ok=True)
    for name in TABLES:
        (root / name).unlink(missing_ok=True)
    for about in root.glob("*/case.json"):
        if about.parent.name not in cases:
            shutil.rmtree(about.parent)
    for leftover in (*root.glob(".*.part"), *(cache_dir.glob(".part-*") if cache_dir else ())):
        shutil.rmtree(leftover)


def write_case(
    root: Path,
    case: Case,
    annotated: Sequence[str],
    recipe: SliceRecipe,
    cache_dir: Path | None = None,
) -> bool:
    """Slice one case into the store; its folder appears complete or not at all.

    Args:
        root: of the store.
        case: whose scan and label map are read.
        annotated: organs drawn in it.
        recipe: what slices look like.
        cache_dir: slices made before, found by the content they were made from; None keeps none.

    Returns:
        True if the case was sliced, False if the slices were found in the cache.

    Raises:
        ScanError: the files cannot be used, are not those that were ingested, or hold no body.
    """
    for path, expected in ((case.image, case.image_sha256), (case.label, case.label_sha256)):
        if (found := checksum(path)) != expected:
            raise failure("checksum_differs", f"{path} with {found[:12]}, not {expected[:12]}")
    entry = None if cache_dir is None else cache_dir / slices_key(case, annotated, recipe)
    is_cached = entry is not None and _is_whole(entry)
    temporary = root / f".{case.name}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if entry is not None and is_cached:
        _link_files(entry, temporary)
    else:
        _slice_files(temporary, case, annotated, recipe)
        if entry is not None:
            _keep(temporary, entry)
    folder = root / case.name
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
    return not is_cached


def slices_key(case: Case, annotated: Sequence[str], recipe: SliceRecipe) -> str:
    """Checksum of all that decides the bytes of a case's slices."""
    parts = {
        "code": _code_sha256(),
        "case": case.name,
        "patient": case.patient,
        "annotated": list(annotated),
        "image": case.image_sha256,
        "label": case.label_sha256,
        "recipe": asdict(recipe),
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@cache
def _code_sha256() -> str:
    """Checksum of the code that makes slices, so that no slices of other code are reused."""
    digest = hashlib.sha256(f"{np.__version__} {scipy.__version__}".encode())
    for module in (geometry, slicing, volume):
        digest.update(Path(str(module.__file__)).read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()


def _slice_files(folder: Path, case: Case, annotated: Sequence[str], recipe: SliceRecipe) -> None:
    scan = read_image(case.image)
    grid = plan_grid(
        scan,
        recipe.size_px,
        body_threshold_hu=recipe.body_threshold_hu,
        body_margin_mm=recipe.body_margin_mm,
    )
    own_grid = scan.geometry
    np.save(folder / "image.npy", slice_image(scan, grid, recipe.window_hu), allow_pickle=False)
    del scan
    labels = read_labels(case.label)
    check_aligned(own_grid, labels.geometry, case.name)
    label_ZHW, num_lost = slice_labels(labels.values_ZYX, grid, recipe.organs)
    np.save(folder / "label.npy", label_ZHW, allow_pickle=False)
    about = {
        "case": case.name,
        "patient": case.patient,
        "annotated": list(annotated),
        "grid": grid.to_json(),
        "num_lost": num_lost,
        "image_sha256": case.image_sha256,
        "label_sha256": case.label_sha256,
        "slices_sha256": {name: file_sha256(folder / name) for name in _ARRAYS},
    }
    write_json(folder / "case.json", about)


def _is_whole(entry: Path) -> bool:
    """Whether a cache entry is there with the bytes it was written with."""
    try:
        about = json.loads((entry / "case.json").read_text(encoding="utf-8"))
        return all(file_sha256(entry / name) == about["slices_sha256"][name] for name in _ARRAYS)
    except (OSError, ValueError, KeyError):
        return False


def _keep(folder: Path, entry: Path) -> None:
    """Put finished files into the cache; the entry appears whole or not at all."""
    shutil.rmtree(entry, ignore_errors=True)
    entry.parent.mkdir(parents=True, exist_ok=True)
    (entry.parent / ".gitignore").write_text("*\n", encoding="utf-8")
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=".part-") as temporary:
        copy = Path(temporary) / "entry"
        copy.mkdir()
        _link_files(folder, copy)
        copy.replace(entry)


def _link_files(source: Path, target: Path) -> None:
    """The same files under a second name, or copies where the file system has no links."""
    for name in ("case.json", *_ARRAYS):
        try:
            (target / name).hardlink_to(source / name)
        except OSError:
            shutil.copyfile(source / name, target / name)


def write_tables(
    root: Path,
    cases: Sequence[str],
    recipe: SliceRecipe,
    training_only: Set[str] = frozenset(),
) -> pd.DataFrame:
    """Write index.csv, cases.csv and store.json over the cases that are there.

    Args:
        root: of the store.
        cases: names of its cases.
        recipe: what their slices look like.
        training_only: names of the cases that must stay out of the test set.

    Returns:
        The index.
    """
    rows, tables = [], []
    for case in sorted(cases):
        about = json.loads((root / case / "case.json").read_text(encoding="utf-8"))
        label_ZHW = np.load(root / case / "label.npy", mmap_mode="r")
        rows.append(
            {
                "case": case,
                "patient": about["patient"],
                "annotated": ";".join(about["annotated"]),
                "num_slices": len(label_ZHW),
                "num_lost": about["num_lost"],
            }
            | ({TRAINING_ONLY: case in training_only} if training_only else {})
        )
        tables.append(_slice_rows(about, label_ZHW, list(recipe.organs)))
    index = pd.concat(tables, ignore_index=True)
    for name, table in (("index.csv", index), ("cases.csv", pd.DataFrame(rows))):
        write_atomically(root / name, table.to_csv(index=False, lineterminator="\n"))
    write_json(
        root / "store.json",
        {
            "version": STORE_VERSION,
            "organs": list(recipe.organs),
            "size_px": recipe.size_px,
            "window_hu": list(recipe.window_hu),
        },
    )
    return index


def _slice_rows(
    about: Mapping[str, Any], label_ZHW: NDArray[np.uint8], organs: Sequence[str]
) -> pd.DataFrame:
    table = pd.DataFrame(
        {"case": about["case"], "patient": about["patient"], "z": range(len(label_ZHW))}
    )
    counts = np.stack(
        [np.bincount(pixels.ravel(), minlength=len(organs) + 1) for pixels in label_ZHW]
    )
    for number, organ in enumerate(organs, start=1):
        column = pd.Series(counts[:, number], dtype="Int64")
        table[organ] = column if organ in about["annotated"] else column.mask(column >= 0)
    return table
