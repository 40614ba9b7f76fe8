"""What is to be segmented, and where everything goes that is written for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tasks.console import StageError
from tasks.inputs import NIFTI_SUFFIXES, ScanInput, find_inputs
from tasks.outputs import Targets

_SUFFIXES = {
    "OUT": NIFTI_SUFFIXES,
    "--preview": (".png",),
    "--statistics": (".json",),
    "--dicom-seg": (".dcm",),
}


@dataclass(frozen=True)
class Job:
    """One scan and what becomes of it."""

    source: ScanInput
    targets: Targets


def plan_jobs(
    source: Path,
    target: Path,
    *,
    probabilities: bool = False,
    preview: Path | None = None,
    statistics: Path | None = None,
    dicom_seg: Path | None = None,
) -> list[Job]:
    """Find the scans and name what is written for each.

    Args:
        source: a NIfTI file, a DICOM series' folder, or a folder of either.
        target: a .nii or .nii.gz file for a single scan, else a folder. So are the others: files
            for a single scan, else folders.
        probabilities: write them beside the label map.
        preview: of pictures.
        statistics: of JSON.
        dicom_seg: of DICOM segmentations; scans that are not DICOM have none.

    Raises:
        StageError: there is no scan, or a name does not suit.
    """
    inputs, is_single = find_inputs(source)
    if dicom_seg is not None and not any(each.is_dicom for each in inputs):
        raise StageError(
            f"--dicom-seg refers to a DICOM series, and {source} holds none; leave it out"
        )
    places = {
        "OUT": target,
        "--preview": preview,
        "--statistics": statistics,
        "--dicom-seg": dicom_seg,
    }
    named = {option: path for option, path in places.items() if path is not None}
    if is_single:
        _check_files(source, named)
        return [Job(inputs[0], Targets(target, probabilities, preview, statistics, dicom_seg))]
    _check_folders(source, named)

    def place(folder: Path | None, name: str) -> Path | None:
        return None if folder is None else folder / name

    return [
        Job(
            each,
            Targets(
                target / f"{each.name}.nii.gz",
                probabilities,
                place(preview, f"{each.name}.png"),
                place(statistics, f"{each.name}.json"),
                place(dicom_seg, f"{each.name}.dcm") if each.is_dicom else None,
            ),
        )
        for each in inputs
    ]


def _check_files(source: Path, named: dict[str, Path]) -> None:
    for option, path in named.items():
        if not path.name.lower().endswith(_SUFFIXES[option]) or path.is_dir():
            raise StageError(
                f"found {option} {path}; for a single scan wanted a file named "
                f"{' or '.join(_SUFFIXES[option])}"
            )
        if path.resolve() == source.resolve():
            raise StageError(f"IN and {option} are both {source}; name another file to write")


def _check_folders(source: Path, named: dict[str, Path]) -> None:
    for option, path in named.items():
        if path.is_file() or path.name.lower().endswith(_SUFFIXES[option]):
            raise StageError(
                f"found {option} {path}; for a folder of scans wanted a folder, which gets a file "
                "for each"
            )
        if path.resolve().is_relative_to(source.resolve()):
            raise StageError(
                f"{option} {path} lies in {source}, where another run would take what this one "
                "writes for scans; name a folder outside"
            )
