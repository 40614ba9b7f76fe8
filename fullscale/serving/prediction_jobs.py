"""Plan a prediction: find the scans, and name the output files of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fullscale.runtime.errors import StageError
from fullscale.serving.scan_files import NIFTI_SUFFIXES, ScanFiles, find_scans, strip_suffix

_SUFFIXES = {
    "OUT": NIFTI_SUFFIXES,
    "--preview": (".png",),
    "--statistics": (".json",),
    "--dicom-seg": (".dcm",),
    "--rtstruct": (".dcm",),
}


@dataclass(frozen=True)
class OutputPaths:
    """The output files of one scan; an output whose path is None is not written.

    Attributes:
        label_map: .nii or .nii.gz.
        probabilities: True to write the organs' probabilities next to the label map.
        preview: .png.
        statistics: .json.
        dicom_seg: .dcm.
        rtstruct: .dcm.
    """

    label_map: Path
    probabilities: bool = False
    preview: Path | None = None
    statistics: Path | None = None
    dicom_seg: Path | None = None
    rtstruct: Path | None = None

    def probability(self, organ: str) -> Path:
        """Return the file of one organ's probabilities."""
        stem = strip_suffix(self.label_map.name)
        suffix = self.label_map.name[len(stem) :]
        return self.label_map.with_name(f"{stem}_{organ}_probability{suffix}")


@dataclass(frozen=True)
class PredictionJob:
    """One scan to segment, and its output files."""

    source: ScanFiles
    paths: OutputPaths


def plan_jobs(
    source: Path,
    target: Path,
    *,
    probabilities: bool = False,
    preview: Path | None = None,
    statistics: Path | None = None,
    dicom_seg: Path | None = None,
    rtstruct: Path | None = None,
) -> list[PredictionJob]:
    """Find the scans and name the output files of each.

    For a single scan, every output path is a file. For a folder of scans, every output path is a
    folder, and the files in it are named after the scans.

    Args:
        source: a NIfTI file, the folder of one DICOM series, or a folder of scans.
        target: label maps, .nii or .nii.gz.
        probabilities: True to write the organs' probabilities next to the label maps.
        preview: pictures.
        statistics: JSON files.
        dicom_seg: DICOM segmentations, of DICOM series only.
        rtstruct: DICOM structure sets, of DICOM series only.

    Raises:
        StageError: there is no scan, or an output path is unsuitable.
    """
    scans, is_single = find_scans(source)
    for option, path in (("--dicom-seg", dicom_seg), ("--rtstruct", rtstruct)):
        if path is not None and not any(each.is_dicom for each in scans):
            raise StageError(
                f"{option} refers to a DICOM series, and {source} holds none; leave it out"
            )
    outputs = {
        "OUT": target,
        "--preview": preview,
        "--statistics": statistics,
        "--dicom-seg": dicom_seg,
        "--rtstruct": rtstruct,
    }
    named = {option: path for option, path in outputs.items() if path is not None}
    if dicom_seg is not None and dicom_seg == rtstruct:
        raise StageError(f"--dicom-seg and --rtstruct are both {rtstruct}; name another for one")
    # A folder that holds one scan may also be meant as a folder of scans.
    if is_single and (source.is_file() or target.name.lower().endswith(NIFTI_SUFFIXES)):
        _check_files(source, named)
        paths = OutputPaths(target, probabilities, preview, statistics, dicom_seg, rtstruct)
        return [PredictionJob(scans[0], paths)]
    _check_folders(source, named)

    def place(folder: Path | None, name: str) -> Path | None:
        return None if folder is None else folder / name

    return [
        PredictionJob(
            each,
            OutputPaths(
                target / f"{each.name}.nii.gz",
                probabilities,
                place(preview, f"{each.name}.png"),
                place(statistics, f"{each.name}.json"),
                place(dicom_seg, f"{each.name}.dcm") if each.is_dicom else None,
                place(rtstruct, f"{each.name}.dcm") if each.is_dicom else None,
            ),
        )
        for each in scans
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
