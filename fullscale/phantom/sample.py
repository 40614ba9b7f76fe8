"""Write synthetic abdominal CT with exact labels of liver and spleen, in the nnU-Net raw layout.

`trunk`, `arms`, `neighbours` and `organs` draw an analytic body, `scanner` simulates its scan,
`patient` does both for one patient; this module chooses the patients and writes the cohort.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from fullscale.phantom.organs import LIVER, SPLEEN
from fullscale.phantom.patient import Options, simulate_patient
from fullscale.phantom.scanner import Acquisition

ORGANS = {"liver": LIVER, "spleen": SPLEEN}
PREFIX = "phantom"
CASES_PER_BLOCK = 13
"""Cases come in blocks: twelve patients, then a second scan of one of them."""
RESCANNED, LIVER_ONLY, SPLEEN_ONLY = 5, 3, 8
"""Positions in a block: the patient scanned twice, and those with only one organ annotated."""
OPTIONS: dict[int, Options] = {
    6: {"arms": "beside"},
    7: {"cushion": True},
    9: {"arms": "touching"},
    10: {"arms": "beside", "padded": True, "thick_table": True},
    11: {"slice_mm": 2.5},
}
"""Positions in a block of the scans that differ in more than chance draws."""


@dataclass(frozen=True)
class Case:
    """One scan of the sample.

    Attributes:
        name: name of the case.
        patient: number of the patient, from 0.
        repeat: number of earlier scans of this patient.
        annotated: organs with a label.
        options: how the patient lies and is scanned.
    """

    name: str
    patient: int
    repeat: int
    annotated: tuple[str, ...]
    options: Options


def case_at(index: int, prefix: str = PREFIX) -> Case:
    """Return the case at `index` (from 0); it does not depend on the number of cases."""
    block, place = divmod(index, CASES_PER_BLOCK)
    is_repeat = place == CASES_PER_BLOCK - 1
    organs = {LIVER_ONLY: ("liver",), SPLEEN_ONLY: ("spleen",)}.get(place, tuple(ORGANS))
    patient = block * (CASES_PER_BLOCK - 1) + (RESCANNED if is_repeat else place)
    options = OPTIONS.get(place, Options())
    return Case(f"{prefix}_{index + 1:03d}", patient, int(is_repeat), organs, options)


def write_sample(
    folder: Path,
    num_cases: int,
    seed: int,
    *,
    full_size: bool = False,
    prefix: str = PREFIX,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Write a synthetic cohort in the nnU-Net raw layout; the folder appears only when complete.

    Args:
        folder: target; must be missing or empty.
        num_cases: number of scans, at least 1. 52 scans show 48 patients.
        seed: equal seeds give equal bytes. Case i does not depend on `num_cases`.
        full_size: 512 x 512 pixels of 0.7 to 0.9 mm and about 300 slices, for benchmarks.
        prefix: beginning of the names of cases and patients, so that samples of several seeds go
            into one cohort.
        progress: called with (cases done, num_cases) after every case.

    Returns:
        The case names in order.

    Raises:
        ValueError: `num_cases` below 1, `seed` below 0, or a prefix that is no file name.
        FileExistsError: `folder` is a file, or holds something.
    """
    _check_request(folder, num_cases, seed, prefix)
    folder = folder.absolute()
    draft = folder.with_name(f".{folder.name}.partial")
    if draft.exists():
        shutil.rmtree(draft)
    for name in ("imagesTr", "labelsTr"):
        (draft / name).mkdir(parents=True)
    cases = [case_at(index, prefix) for index in range(num_cases)]
    for done, case in enumerate(cases, start=1):
        _write_case(draft, case, seed, full_size)
        if progress is not None:
            progress(done, num_cases)
    _write_tables(draft, cases, prefix)
    draft.replace(folder)
    return [case.name for case in cases]


def _check_request(folder: Path, num_cases: int, seed: int, prefix: str) -> None:
    if num_cases < 1:
        raise ValueError(f"num_cases is {num_cases}, expected 1 or more: ask for at least one case")
    if seed < 0:
        raise ValueError(f"seed is {seed}, expected 0 or more: choose a non-negative whole number")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", prefix):
        raise ValueError(
            f"prefix is {prefix!r}, expected letters, digits, '-' and '_' after a letter or digit: "
            "choose another one"
        )
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, expected a new or empty folder: name another")
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} is not empty, expected a new or empty folder: "
            "name another folder, or move its content away first"
        )


def _write_case(folder: Path, case: Case, seed: int, full_size: bool) -> None:
    # A cohort for benchmarks shows the usual scan only: its size is what is measured.
    options = Options() if full_size else case.options
    image, label, scan = simulate_patient(
        seed, case.patient, repeat=case.repeat, full_size=full_size, **options
    )
    for organ, organ_id in ORGANS.items():
        if organ not in case.annotated:
            label[label == organ_id] = 0
    save_volume(folder / "imagesTr" / f"{case.name}_0000.nii.gz", image, scan)
    save_volume(folder / "labelsTr" / f"{case.name}.nii.gz", label, scan)


def save_volume(path: Path, volume: npt.NDArray[Any], scan: Acquisition) -> None:
    """Write a (Z, Y, X) LPS volume as .nii.gz in the voxel order of `scan.orientation`.

    Equal input gives equal bytes: the compressed file holds neither time nor name.
    """
    data = np.transpose(volume, (2, 1, 0))
    spacing = np.array(scan.spacing_mm[::-1])
    start = np.array(scan.origin_mm[::-1]) + np.array(scan.table_mm[::-1])
    for axis, (code, canonical) in enumerate(zip(scan.orientation, "LPS", strict=True)):
        if code != canonical:
            data = np.flip(data, axis)
            start[axis] += spacing[axis] * (data.shape[axis] - 1)
            spacing[axis] *= -1
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = np.diag(spacing), start
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    image: Any = nib.Nifti1Image(data, affine)  # type: ignore[no-untyped-call]
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    with path.open("wb") as raw:
        with gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=9, mtime=0) as packed:
            image.to_stream(packed)
        raw.flush()
        os.fsync(raw.fileno())


def _write_tables(folder: Path, cases: list[Case], prefix: str) -> None:
    patient = "patient" if prefix == PREFIX else f"{prefix}_patient"
    description = {
        "name": "Fullscale phantom abdomen",
        "description": "Synthetic abdominal CT with true labels of liver and spleen",
        "labels": {"background": 0, **ORGANS},
        "channel_names": {"0": "CT"},
        "file_ending": ".nii.gz",
        "numTraining": len(cases),
        "licence": "Apache-2.0",
        "reference": "Drawn by `fullscale sample`; shows no person",
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    with (folder / "cases.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["case", "patient", "annotated"])
        for case in cases:
            table.writerow(
                [case.name, f"{patient}_{case.patient + 1:03d}", ";".join(case.annotated)]
            )
