"""Every check on scans in one table: stable code, severity, what is wanted, and the cure.

The code that checks, the reports and docs/data.md all read this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fullscale.runtime.errors import ScanError

MIN_SLICES = 8
HU_AIR, HU_DENSE = -500, 100
BODY_HU = -300

Severity = Literal["refused", "warning", "note"]


@dataclass(frozen=True)
class Check:
    """One thing that can be wrong with a scan.

    Attributes:
        code: stable name; never renamed once published.
        severity: "refused" keeps the pair out; "warning" lets it in and says so; "note" tells
            what was done.
        title: what is wrong, in a few words.
        wanted: what a usable scan has instead.
        cure: what the owner of the data can do.
    """

    code: str
    severity: Severity
    title: str
    wanted: str
    cure: str


_TABLE = (
    Check(
        "data_missing",
        "refused",
        "The folder of annotated scans is not there",
        "a folder data/ with dataset.json, cases.csv, imagesTr/ and labelsTr/",
        "run `dvc pull data.dvc`, or fill it with `fullscale ingest SOURCE`",
    ),
    Check(
        "not_a_cohort",
        "refused",
        "The folder of annotated scans has not the layout of a cohort",
        "dataset.json, cases.csv, imagesTr/ and labelsTr/ as `fullscale ingest` writes them",
        "fill the folder with `fullscale ingest SOURCE`, or restore it with `dvc checkout`",
    ),
    Check(
        "layout_unknown",
        "refused",
        "The source has no layout that is known",
        "one of the layouts in docs/data.md",
        "arrange the files in one of these layouts, or name it with --layout",
    ),
    Check(
        "dataset_json",
        "refused",
        "dataset.json or a table beside it cannot be used",
        "valid JSON with integer `labels` by name, as nnU-Net or the Decathlon define it",
        "correct the file",
    ),
    Check(
        "modality",
        "refused",
        "The source is not plain CT",
        "one channel, CT",
        "split other channels off, and ingest the CT alone",
    ),
    Check(
        "file_missing",
        "refused",
        "A file that the layout promises is not there",
        "an image and a label for every case",
        "add the missing file, or remove the case from the source",
    ),
    Check(
        "unreadable",
        "refused",
        "A file is truncated, fails its checksum or is no scan at all",
        "a complete file whose checksum is right",
        "copy or export the file again from where it came from",
    ),
    Check(
        "not_3d",
        "refused",
        "The array is not a volume",
        "three axes, each longer than one voxel",
        "export one three-dimensional volume per file",
    ),
    Check(
        "voxel_type",
        "refused",
        "The voxels are colours, complex numbers or values no HU can have",
        "one real number per voxel",
        "export the scan as int16 HU",
    ),
    Check(
        "not_finite",
        "refused",
        "The image has NaN or infinite voxels",
        "finite HU everywhere",
        "repair the conversion, or write -1024 where there is no measurement",
    ),
    Check(
        "affine",
        "refused",
        "The affine is singular, sheared or not finite",
        "three orthogonal axes in the header's affine",
        "resample a tilted acquisition onto a rectangular grid, or repair the header",
    ),
    Check(
        "spacing",
        "refused",
        "The voxel spacing is outside what CT has",
        "0.2 to 10 mm along each axis",
        "repair the header's spacing; it is in millimetres",
    ),
    Check(
        "shape_differs",
        "refused",
        "Image and label have different shapes",
        "the same number of voxels along each axis",
        "export the label on the grid of its image",
    ),
    Check(
        "spacing_differs",
        "refused",
        "Image and label have different spacing",
        "the same spacing, so that no voxel is more than 0.5 mm from its partner",
        "export the label on the grid of its image",
    ),
    Check(
        "direction_differs",
        "refused",
        "Image and label have different axis directions",
        "the same directions, so that no voxel is more than 0.5 mm from its partner",
        "export the label on the grid of its image; a flipped axis is the usual reason",
    ),
    Check(
        "origin_differs",
        "refused",
        "Image and label have different origins",
        "the same origin, so that no voxel is more than 0.5 mm from its partner",
        "export the label on the grid of its image",
    ),
    Check(
        "label_not_integer",
        "refused",
        "The label has values that are not whole numbers",
        "whole numbers from 0 to 255",
        "resample labels with nearest neighbour, never with interpolation",
    ),
    Check(
        "label_interpolated",
        "refused",
        "The label was resampled with interpolation",
        "ids with a border of their own, not of the ids between them and 0",
        "resample labels with nearest neighbour, never with interpolation",
    ),
    Check(
        "label_unknown",
        "refused",
        "The label has ids that dataset.json does not name",
        "only ids that dataset.json names",
        "name the ids in dataset.json, or remove them from the label",
    ),
    Check(
        "few_slices",
        "refused",
        "The scan has too few slices",
        "at least 8 axial slices",
        "export the whole scan, not a part of it",
    ),
    Check(
        "not_hu",
        "refused",
        "The values are not Hounsfield units",
        "air below -500 HU and bone or contrast above 100 HU",
        "export the scan without window, with rescale slope and intercept applied",
    ),
    Check(
        "label_mirrored",
        "refused",
        "The label fits the image only when mirrored",
        "labels that lie on even tissue",
        "flip the label along the axis that is named, and look at both before you trust them",
    ),
    Check(
        "label_full",
        "refused",
        "The label covers nearly the whole volume",
        "organs that fill less than 90 percent of the voxels",
        "check that 0 is the background, and that the label is not the image",
    ),
    Check(
        "content_twice",
        "refused",
        "The same scan is there under two names",
        "every scan once, so that none is both trained on and tested",
        "remove one of the two",
    ),
    Check(
        "slices_twice",
        "refused",
        "Several slices of a series are at one place",
        "one slice at each position",
        "export one reconstruction or phase per series",
    ),
    Check(
        "slices_missing",
        "refused",
        "Slices of a series are missing",
        "one slice at each step",
        "export the series again, completely",
    ),
    Check(
        "slices_uneven",
        "refused",
        "Slices of a series are unevenly spaced",
        "the same distance between all neighbours, to 0.1 mm",
        "export a reconstruction with even spacing",
    ),
    Check(
        "slices_differ",
        "refused",
        "Slices of a series have different sizes, spacing or directions",
        "one grid for the whole series",
        "export one reconstruction per series",
    ),
    Check(
        "gantry_tilt",
        "refused",
        "The gantry was tilted",
        "slices stacked along the normal of their plane",
        "resample the series onto a rectangular grid",
    ),
    Check(
        "label_empty",
        "warning",
        "The label is empty",
        "at least one voxel of an annotated organ",
        "check that the scan really shows none of the organs",
    ),
    Check(
        "label_not_annotated",
        "warning",
        "The label has an organ that the case is not said to annotate",
        "only organs that `annotated` names",
        "add the organ to `annotated` in cases.csv; until then it is ignored",
    ),
    Check(
        "liver_on_left",
        "warning",
        "The liver lies on the patient's left",
        "a liver on the patient's right",
        "check the left and right of the header; situs inversus is rare",
    ),
    Check(
        "patient_shared",
        "note",
        "One patient has several cases",
        "nothing else: they stay together when patients are split",
        "nothing to do if it is true; correct the column `patient` if not",
    ),
    Check(
        "private_text",
        "note",
        "Header fields with free text",
        "no text that may name a patient",
        "nothing to do: the text stays behind, only voxels and geometry go in",
    ),
    Check(
        "case_name",
        "refused",
        "The case's name cannot be used as a file name",
        "letters, digits, '-' and '_', at most 64, starting with a letter or digit",
        "rename the files of the case",
    ),
    Check(
        "case_exists",
        "refused",
        "Another scan of this name is already in the cohort",
        "a new name for new content",
        "rename the case, or ingest with --replace-changed if it shall take the old one's place",
    ),
    Check(
        "annotated_unknown",
        "refused",
        "A case is said to annotate an organ that has no label",
        "names that dataset.json has under `labels`",
        "correct the column `annotated` of cases.csv",
    ),
    Check(
        "no_body",
        "refused",
        "No body was found in the scan",
        "voxels of soft tissue above the body threshold",
        "check that the scan is in HU, or lower slice.body_threshold_hu",
    ),
    Check(
        "checksum_differs",
        "refused",
        "A file is not the one that was ingested",
        "the checksum that cases.csv gives",
        "restore it with `dvc checkout`, or ingest the new file with --replace-changed",
    ),
    Check(
        "case_unlisted",
        "warning",
        "Files of a case that cases.csv does not list",
        "a row in cases.csv for every scan",
        "bring the scan in with `fullscale ingest`, or remove its files",
    ),
    Check(
        "cluster",
        "refused",
        "The Dask cluster cannot be used",
        "a scheduler at compute.address and the package `distributed`",
        'start the cluster, correct compute.address, or `pip install "fullscale[dask]"`',
    ),
    Check(
        "store_missing",
        "refused",
        "The slice store is not there or not complete",
        "store.json, index.csv and one folder per case, as the slice stage writes them",
        "run the slice stage again: `dvc repro slice`",
    ),
)

CHECKS: dict[str, Check] = {check.code: check for check in _TABLE}


@dataclass(frozen=True)
class Finding:
    """What one check found in one case.

    Attributes:
        case: name of the case, or of the source.
        code: of the check.
        severity: of the check.
        found: what was found.
        wanted: from the table.
        cure: from the table.
    """

    case: str
    code: str
    severity: Severity
    found: str
    wanted: str
    cure: str

    def __str__(self) -> str:
        text = f"{self.code}: found {self.found}; wanted {self.wanted}; {self.cure}"
        return " ".join(text.split())

    @classmethod
    def of(cls, case: str, code: str, found: str) -> Finding:
        """A finding worded from the table."""
        check = CHECKS[code]
        return cls(case, code, check.severity, found, check.wanted, check.cure)

    @classmethod
    def of_error(cls, case: str, error: ScanError) -> Finding:
        """The finding that an error is about; it keeps the case out."""
        return cls(case, error.code, "refused", error.found, error.wanted, error.cure)


def failure(code: str, found: str) -> ScanError:
    """The error of one check, worded from the table.

    Args:
        code: a key of `CHECKS`.
        found: what was found, naming the file.
    """
    check = CHECKS[code]
    return ScanError(code, found, check.wanted, check.cure)
