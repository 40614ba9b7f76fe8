"""Write a slice store; `slice_store` documents its files and reads it.

A case's folder is made under a temporary name and renamed when it is complete. The tables are
removed first and written last, so an interrupted run never leaves a store that looks complete.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy
from numpy.typing import NDArray

from fullscale.runtime.files import file_sha256, write_atomically, write_json
from fullscale.scans import geometry, slicing, trunk, volume
from fullscale.scans.checks import failure
from fullscale.scans.cohort import TRAINING_ONLY, Case, checksum
from fullscale.scans.geometry import check_aligned
from fullscale.scans.slice_store import STORE_VERSION, TABLES
from fullscale.scans.slicing import Grid, plan_grid, slice_image, slice_labels
from fullscale.scans.volume import read_image, read_labels

_ARRAYS = ("image.npy", "label.npy")


@dataclass(frozen=True)
class SliceRecipe:
    """All settings that determine the slices of a scan.

    Attributes:
        organs: label ids of each organ, organs in order.
        size_px: pixels along each side of a slice.
        pixel_mm: distance of neighbouring pixels in mm.
        window_hu: lowest and highest HU kept.
        body_threshold_hu: voxels above this value may belong to the body.
    """

    organs: Mapping[str, Sequence[int]]
    size_px: int
    pixel_mm: float
    window_hu: tuple[float, float]
    body_threshold_hu: float


def clear_store(root: Path, cases: Set[str], cache_dir: Path | None = None) -> None:
    """Prepare a store to be filled.

    Remove its tables, the cases not in `cases`, and temporary folders of an interrupted run.

    Args:
        root: folder of the store; created if it is missing.
        cases: names of the cases to keep.
        cache_dir: as in `write_case`.
    """
    root.mkdir(parents=True, exist_ok=True)
    for name in TABLES:
        (root / name).unlink(missing_ok=True)
    for path in root.glob("*/case.json"):
        if path.parent.name not in cases:
            shutil.rmtree(path.parent)
    for leftover in (*root.glob(".*.part"), *(cache_dir.glob(".part-*") if cache_dir else ())):
        shutil.rmtree(leftover)


def write_case(
    root: Path,
    case: Case,
    annotated: Sequence[str],
    recipe: SliceRecipe,
    cache_dir: Path | None = None,
) -> bool:
    """Slice one case into the store; its folder appears only when it is complete.

    Args:
        root: folder of the store.
        case: the scan and label map to read.
        annotated: organs annotated in the case.
        recipe: settings of the slices.
        cache_dir: cache of slices, keyed by `slices_key`; None uses no cache.

    Returns:
        True if the case was sliced, False if its slices came from the cache.

    Raises:
        ScanError: a file cannot be used or differs from its checksum, or the scan shows no trunk
            or one that is larger than a slice.
    """
    for path, expected in ((case.image, case.image_sha256), (case.label, case.label_sha256)):
        if (found := checksum(path)) != expected:
            raise failure("checksum_differs", f"{path} with {found[:12]}, not {expected[:12]}")
    entry = None if cache_dir is None else cache_dir / slices_key(case, annotated, recipe)
    is_cached = entry is not None and _is_intact(entry)
    temporary = root / f".{case.name}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if entry is not None and is_cached:
        _link_files(entry, temporary)
    else:
        _slice_files(temporary, case, annotated, recipe)
        if entry is not None:
            _add_to_cache(temporary, entry)
    folder = root / case.name
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
    return not is_cached


def slices_key(case: Case, annotated: Sequence[str], recipe: SliceRecipe) -> str:
    """Return the SHA-256 of everything that determines the bytes of a case's slices."""
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
    """Return the SHA-256 of the slicing code, so that other code never reuses its slices."""
    digest = hashlib.sha256(f"{np.__version__} {scipy.__version__}".encode())
    for module in (geometry, slicing, trunk, volume):
        digest.update(Path(str(module.__file__)).read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()


def _slice_files(folder: Path, case: Case, annotated: Sequence[str], recipe: SliceRecipe) -> None:
    scan = read_image(case.image)
    grid = plan_grid(
        scan,
        recipe.size_px,
        recipe.pixel_mm,
        body_threshold_hu=recipe.body_threshold_hu,
    )
    _check_trunk_fits(grid)
    own_grid = scan.geometry
    np.save(folder / "image.npy", slice_image(scan, grid, recipe.window_hu), allow_pickle=False)
    del scan  # frees memory before the label map is read
    labels = read_labels(case.label)
    check_aligned(own_grid, labels.geometry, case.name)
    label_ZHW, num_lost = slice_labels(labels.values_ZYX, grid, recipe.organs)
    np.save(folder / "label.npy", label_ZHW, allow_pickle=False)
    content = {
        "case": case.name,
        "patient": case.patient,
        "annotated": list(annotated),
        "grid": grid.to_json(),
        "num_lost": num_lost,
        "image_sha256": case.image_sha256,
        "label_sha256": case.label_sha256,
        "slices_sha256": {name: file_sha256(folder / name) for name in _ARRAYS},
    }
    write_json(folder / "case.json", content)


def _check_trunk_fits(grid: Grid) -> None:
    if max(grid.trunk_mm) > grid.side_mm:
        height_mm, width_mm = grid.trunk_mm
        raise failure(
            "trunk_too_large",
            f"a trunk of {height_mm:.0f} x {width_mm:.0f} mm, but slices of {grid.side_mm:.0f} mm "
            f"({grid.size_px} pixels of {grid.pixel_mm:g} mm)",
        )


def _is_intact(entry: Path) -> bool:
    """Return True if a cache entry exists and its arrays match their checksums."""
    try:
        content = json.loads((entry / "case.json").read_text(encoding="utf-8"))
        return all(file_sha256(entry / name) == content["slices_sha256"][name] for name in _ARRAYS)
    except (OSError, ValueError, KeyError):
        return False


def _add_to_cache(folder: Path, entry: Path) -> None:
    """Copy finished files into the cache; the entry appears only when it is complete."""
    shutil.rmtree(entry, ignore_errors=True)
    entry.parent.mkdir(parents=True, exist_ok=True)
    (entry.parent / ".gitignore").write_text("*\n", encoding="utf-8")
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=".part-") as temporary:
        copy = Path(temporary) / "entry"
        copy.mkdir()
        _link_files(folder, copy)
        copy.replace(entry)


def _link_files(source: Path, target: Path) -> None:
    """Hard-link the files of a case, or copy them if the file system has no hard links."""
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
    """Write index.csv, cases.csv and store.json for the given cases.

    Args:
        root: folder of the store, which holds the slices of `cases`.
        cases: names of the cases.
        recipe: settings of their slices.
        training_only: names of the cases to keep out of the test set.

    Returns:
        The index, one row per slice.
    """
    rows, tables = [], []
    for case in sorted(cases):
        content = json.loads((root / case / "case.json").read_text(encoding="utf-8"))
        label_ZHW = np.load(root / case / "label.npy", mmap_mode="r")
        rows.append(
            {
                "case": case,
                "patient": content["patient"],
                "annotated": ";".join(content["annotated"]),
                "num_slices": len(label_ZHW),
                "num_lost": sum(content["num_lost"].values()),
            }
            | ({TRAINING_ONLY: case in training_only} if training_only else {})
        )
        tables.append(_slice_rows(content, label_ZHW, list(recipe.organs)))
    index = pd.concat(tables, ignore_index=True)
    for name, table in (("index.csv", index), ("cases.csv", pd.DataFrame(rows))):
        write_atomically(root / name, table.to_csv(index=False, lineterminator="\n"))
    write_json(
        root / "store.json",
        {
            "version": STORE_VERSION,
            "organs": list(recipe.organs),
            "label_ids": {organ: list(ids) for organ, ids in recipe.organs.items()},
            "size_px": recipe.size_px,
            "window_hu": list(recipe.window_hu),
        },
    )
    return index


def _slice_rows(
    content: Mapping[str, Any], label_ZHW: NDArray[np.uint8], organs: Sequence[str]
) -> pd.DataFrame:
    """Return the rows of index.csv of one case; counts of unannotated organs are missing."""
    table = pd.DataFrame(
        {"case": content["case"], "patient": content["patient"], "z": range(len(label_ZHW))}
    )
    counts = np.stack([np.bincount(pixels.ravel(), minlength=256) for pixels in label_ZHW])
    for number, organ in enumerate(organs, start=1):
        column = pd.Series(counts[:, number], dtype="Int64")
        table[organ] = column if organ in content["annotated"] else column.mask(column >= 0)
    return table
