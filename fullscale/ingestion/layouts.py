"""One table of the supported layouts of annotated scans; docs/data.md is generated from it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from fullscale.formats.dicom_files import is_dicom
from fullscale.ingestion import dicom_layouts, dicom_seg_layout, nifti_layouts
from fullscale.ingestion.source import Source, SourceCase
from fullscale.ingestion.unread import ARCHIVES, SCAN_ENDINGS, find_unread, may_be_scan
from fullscale.runtime.errors import ScanError
from fullscale.scans.checks import failure
from fullscale.scans.cohort import IGNORE
from fullscale.scans.dicom import read_header


@dataclass(frozen=True)
class Layout:
    """One layout of annotated scans in a folder.

    Attributes:
        name: value of `--layout`.
        title: common name.
        files: paths of the files.
        notes: labels, and special rules.
        matches: returns True if a folder has this layout.
        read: lists the cases of a folder; opens no scan.
    """

    name: str
    title: str
    files: str
    notes: str
    matches: Callable[[Path], bool] = field(repr=False)
    read: Callable[[Path], Source] = field(repr=False)


_TABLE = (
    Layout(
        "msd",
        "Medical Segmentation Decathlon",
        "`dataset.json` whose `training` lists pairs of image and label",
        "Labels from `dataset.json`. Old nnU-Net folders have this layout, too. A `cases.csv` "
        "with case, patient, annotated is used if present.",
        nifti_layouts.matches_msd,
        nifti_layouts.read_msd,
    ),
    Layout(
        "nnunet",
        "nnU-Net raw",
        "`dataset.json`, `imagesTr/<case>_0000.nii.gz`, `labelsTr/<case>.nii.gz`",
        "Labels from `dataset.json`. A `cases.csv` with case, patient, annotated is used if "
        "present.",
        nifti_layouts.matches_nnunet,
        nifti_layouts.read_nnunet,
    ),
    Layout(
        "lits",
        "LiTS",
        "`volume-N.nii[.gz]` and `segmentation-N.nii[.gz]`, in any folders",
        "Labels liver = 1 and tumour = 2. A tumour is part of the liver: organs liver = [liver, "
        "tumour].",
        nifti_layouts.matches_lits,
        nifti_layouts.read_lits,
    ),
    Layout(
        "totalsegmentator",
        "TotalSegmentator",
        "`<case>/ct.nii.gz`, `<case>/segmentations/<organ>.nii.gz`",
        "A case annotates the organs it has a file for. If masks overlap, the smaller one wins.",
        nifti_layouts.matches_totalsegmentator,
        nifti_layouts.read_totalsegmentator,
    ),
    Layout(
        "ircadb",
        "3D-IRCADb",
        "`<case>/PATIENT_DICOM/*`, `<case>/MASKS_DICOM/<organ>/*`, unzipped; a mask has the file "
        "name of its slice",
        "A case annotates the organs it has a folder for; livertumor01, livertumor02 are one "
        "organ. If masks overlap, the smaller one wins. These patients are in LiTS, too.",
        dicom_layouts.matches_ircadb,
        dicom_layouts.read_ircadb,
    ),
    Layout(
        "chaos",
        "CHAOS CT",
        "`<case>/DICOM_anon/*.dcm`, `<case>/Ground/*.png`",
        "Annotates the liver. The n-th picture belongs to the n-th slice by file name.",
        dicom_layouts.matches_chaos,
        dicom_layouts.read_chaos,
    ),
    Layout(
        "dicom-seg",
        "DICOM with DICOM SEG or RTSTRUCT",
        "CT series, and segmentations or structure sets, in any folders",
        "A case is a CT series with the segmentations and structure sets that refer to it; it "
        "annotates their segments, and the regions that have a contour. A segment without a "
        "telling label is named by its code. A case is named after its top folder, which should "
        "not name a person; a patient after the first of their cases, never by an id of the "
        "header.",
        dicom_seg_layout.matches_dicom_seg,
        dicom_seg_layout.read_dicom_seg,
    ),
)

# The layouts that are found without a look into every folder.
_CASES_BELOW = ("msd", "nnunet", "totalsegmentator")

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in _TABLE}


def read_source(folder: Path, layout: str | None = None) -> Source:
    """List the cases of a folder of annotated scans; open no scan.

    Args:
        folder: the source; only read.
        layout: key of `LAYOUTS`; None detects the layout.

    Raises:
        ScanError: the folder is missing, its layout is unknown, or its tables cannot be used.
    """
    if not folder.is_dir():
        raise failure("source_missing", f"no folder {folder}")
    if layout is not None and layout not in LAYOUTS:
        raise failure("layout_unknown", f"the layout {layout!r}, not among {list(LAYOUTS)}")
    known = [LAYOUTS[layout]] if layout else LAYOUTS.values()
    # The warnings of the parsers quote header text, which may name the patient.
    with warnings.catch_warnings(action="ignore"):
        for candidate in known:
            if layout or candidate.matches(folder):
                source = _refuse_second_names(candidate.read(folder))
                if IGNORE in source.labels:
                    found = f"{folder} with a label {IGNORE!r}: voxels that nobody judged"
                    raise failure("segment_unnamed", found)
                told, unread = find_unread(folder, source)
                return replace(source, findings=(*source.findings, *told), unread=tuple(unread))
    raise _explain_unknown(folder)


def _explain_unknown(folder: Path) -> ScanError:
    """Return the error of a folder without a known layout, with what is usually wrong."""
    if (folder / "imagesTr").is_dir() and not (folder / "dataset.json").is_file():
        return failure("dataset_json_missing", f"{folder} with imagesTr, without dataset.json")
    for name in _CASES_BELOW:
        if _matches(LAYOUTS[name], folder.resolve().parent):
            return failure("folder_below", f"{folder}, a folder of a source of layout {name}")
    found = f"none of {', '.join(LAYOUTS)} in {folder}"
    inside = sorted(path for deep in ("*", "*/*") for path in folder.glob(deep) if path.is_dir())
    for path in inside:
        if layout := next((each.name for each in _TABLE if _matches(each, path)), None):
            return failure("folder_above", f"layout {layout} in {path}, a folder of {folder}")
        if (path / "imagesTr").is_dir():
            return failure("dataset_json_missing", f"{path} with imagesTr, without dataset.json")
    packed = [path for path in sorted(folder.rglob("*")) if path.name.lower().endswith(ARCHIVES)]
    if packed:
        names = ", ".join(str(path.relative_to(folder)) for path in packed[:5])
        more = f" and {len(packed) - 5} more" if len(packed) > 5 else ""
        return failure("still_packed", f"{names}{more} in {folder}")
    kinds = sorted({_kind(path) for path in folder.rglob("*") if path.is_file()} - {""})
    if not kinds:
        return failure("layout_unknown", f"{found}, and no scan")
    return failure("layout_unknown", f"{found}, but {', '.join(kinds)}")


def _matches(layout: Layout, folder: Path) -> bool:
    try:
        return layout.matches(folder)
    except ScanError:
        return False


def _kind(path: Path) -> str:
    """Return what a file is that could belong to a scan; an empty text for any other."""
    if not may_be_scan(path):
        return ""
    if not is_dicom(path):
        endings = [ending for ending in SCAN_ENDINGS if path.name.lower().endswith(ending)]
        return f"files *{max(endings, key=len)}" if endings else "linked folders"
    try:
        return f"DICOM files of modality {read_header(path).get('Modality', 'unknown')}"
    except ScanError:
        return "damaged DICOM files"


def _refuse_second_names(source: Source) -> Source:
    """Refuse every case whose name another case of the source has, apart from letter case."""
    cases: dict[str, SourceCase] = {}
    refused, files = list(source.refused), list[Path]()
    for case in source.cases:
        first = cases.setdefault(case.name.casefold(), case)
        if first is not case:
            found = f"{first.origin!r} and {case.origin!r}, both named {case.name}"
            refused.append((case.origin, failure("name_twice", found)))
            files += case.files
    return replace(
        source,
        cases=tuple(cases.values()),
        refused=tuple(refused),
        refused_files=(*source.refused_files, *files),
    )
