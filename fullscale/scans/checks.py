"""One table of all checks on scans: stable code, severity, title, requirement and cure.

The checks, the reports and docs/data.md all use this table.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from fullscale.runtime.errors import ScanError, StageError

MIN_SLICES = 8
HU_AIR, HU_DENSE = -500, 100  # every CT of the trunk holds air below and bone above these
BODY_HU = -300  # between lung (below -500 HU) and fat (about -100 HU)

Severity = Literal["refused", "warning", "note"]


@dataclass(frozen=True)
class Check:
    """One check on a scan.

    Attributes:
        code: stable name; never renamed once published.
        severity: "refused" keeps the case out, "warning" accepts it with a warning, "note" is
            information.
        title: the problem in a few words.
        wanted: the requirement on a usable scan.
        cure: the action that the owner of the data can take.
        is_judgement: the refusal rests on what scans usually look like; `--accept` turns it into
            a warning.
    """

    code: str
    severity: Severity
    title: str
    wanted: str
    cure: str
    is_judgement: bool = False


_TABLE = (
    Check(
        "data_missing",
        "refused",
        "The folder of annotated scans is missing",
        "a folder data/ with dataset.json, cases.csv, imagesTr/ and labelsTr/",
        "run `dvc pull data.dvc`, or fill it with `fullscale ingest SOURCE`",
    ),
    Check(
        "not_a_cohort",
        "refused",
        "The folder of annotated scans does not have the layout of a cohort",
        "dataset.json, cases.csv, imagesTr/ and labelsTr/ as `fullscale ingest` writes them",
        "fill the folder with `fullscale ingest SOURCE`, or restore it with `dvc checkout`",
    ),
    Check(
        "cohort_incomplete",
        "refused",
        "The cohort does not hold what was written to it",
        "every case of the source in the cohort, or refused with a reason",
        "run the command again, and let no other program write to the folder",
    ),
    Check(
        "source_missing",
        "refused",
        "The source is no folder",
        "a folder of annotated scans",
        "correct the path; unzip an archive first",
    ),
    Check(
        "layout_unknown",
        "refused",
        "The layout of the source is unknown",
        "one of the layouts in docs/data.md",
        "arrange the files in one of these layouts: one label map for each scan as nnunet, one "
        "mask for each organ as totalsegmentator, DICOM series with DICOM SEG or RTSTRUCT",
    ),
    Check(
        "dataset_json_missing",
        "refused",
        "dataset.json is missing",
        "a dataset.json that names the labels, beside imagesTr and labelsTr",
        "write dataset.json; docs/own-data.md shows one",
    ),
    Check(
        "folder_above",
        "refused",
        "The source is a folder of sources",
        "the folder of one source",
        "name that folder itself",
    ),
    Check(
        "folder_below",
        "refused",
        "The source is a part of a source",
        "the folder of one source",
        "name the folder above it",
    ),
    Check(
        "still_packed",
        "refused",
        "Parts of the source are still packed",
        "the files of a layout, unpacked",
        "unpack the named archives where they are, or name one that holds the whole source",
    ),
    Check(
        "dataset_json",
        "refused",
        "dataset.json cannot be used",
        "valid JSON with integer `labels` by name, as nnU-Net or the Decathlon define it",
        "correct the file",
    ),
    Check(
        "cases_csv",
        "refused",
        "cases.csv cannot be used",
        "a table in UTF-8 with commas, and the columns that docs/data.md names",
        "save the table as CSV with commas in UTF-8, or correct the named cell",
    ),
    Check(
        "label_regions",
        "refused",
        "dataset.json has regions that give no single id",
        "one id for each region in `regions_class_order`, as nnU-Net writes them",
        "name each id once, and join the labels of an organ under organs in params.yaml",
    ),
    Check(
        "labels_too_many",
        "refused",
        "There are more labels than a label map can hold",
        "at most 254 labels in the whole cohort, with ids from 1 to 254",
        "leave out labels that are not trained, or begin another cohort",
    ),
    Check(
        "modality",
        "refused",
        "The source is not plain CT",
        "CT alone, in one channel",
        'if the scan is CT in HU, name its channel "CT"; remove other channels and modalities',
    ),
    Check(
        "file_missing",
        "refused",
        "A file that the layout requires is missing",
        "an image and a label for every case",
        "add the missing file, or remove the case from the source",
    ),
    Check(
        "path_outside",
        "refused",
        "dataset.json names a file outside its folder",
        "paths below the folder of dataset.json",
        "correct the path in dataset.json, or copy the file into the folder",
    ),
    Check(
        "file_twice",
        "refused",
        "Two files could be the same part of a case",
        "one image and one label for every case, and one mask for every organ",
        "compare the files, and move one of them out of the source",
    ),
    Check(
        "unreadable",
        "refused",
        "A file is truncated, fails its checksum or is not a scan",
        "a complete file with a correct checksum",
        "copy or export the file again from its origin",
    ),
    Check(
        "compressed",
        "refused",
        "The pixels are compressed in a way that cannot be read",
        "a DICOM file that is uncompressed, or compressed losslessly by a common method",
        "export the series uncompressed, or decompress it, for example with gdcmconv --raw; if its "
        "other slices are read, copy the file again from its origin",
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
        "The voxels are colours, complex numbers or values outside the range of HU",
        "one real number per voxel",
        "export the scan as int16 HU",
    ),
    Check(
        "not_finite",
        "refused",
        "The image has NaN or infinite voxels",
        "finite HU everywhere",
        "repair the conversion, or write -1024 outside the field of view",
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
        "The voxel spacing is outside the range of CT",
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
        "label_range",
        "refused",
        "The label has values outside the range of ids",
        "ids from 0 to 255",
        "number the labels anew from 1, in the label maps and in dataset.json",
    ),
    Check(
        "segment_unnamed",
        "refused",
        "A segment has no name",
        "a label for each segment that names an organ, or a code of the organ",
        "name the segments in the program that drew them",
    ),
    Check(
        "contour",
        "refused",
        "Contours of a structure set give no voxels",
        "closed contours in the planes of the slices, on every slice that shows the organ",
        "draw or interpolate the organ on every slice of this series, or export it as DICOM SEG",
    ),
    Check(
        "label_interpolated",
        "refused",
        "The label was resampled with interpolation",
        "sharp borders between ids, without a seam of intermediate ids",
        "resample labels with nearest neighbour, never with interpolation",
        is_judgement=True,
    ),
    Check(
        "mask_values",
        "refused",
        "The mask of one organ has several values",
        "0 and one other value, because each mask is one organ",
        "export one mask for each organ, or a label map with a dataset.json that names its ids",
    ),
    Check(
        "label_twice",
        "refused",
        "Several segmentations draw the same organ",
        "one segmentation of an organ for every scan, as of one reader",
        "choose one of them, and move the others out of the source",
    ),
    Check(
        "label_joined",
        "warning",
        "Several segments of one segmentation have the same label",
        "one segment for each organ, or several for its parts, such as lesions",
        "nothing to do if correct; otherwise give the segments different labels",
    ),
    Check(
        "label_region",
        "warning",
        "A region of nnU-Net is several labels here",
        "one label for each id",
        "list all of them for the organ under organs in params.yaml",
    ),
    Check(
        "label_overlap",
        "note",
        "Masks overlap, and the smaller one has the voxels",
        "one organ for each voxel",
        "nothing to do for parts that params.yaml names with their organ, such as `liver: [liver, "
        "livertumor]`; without them the organ lacks these voxels",
    ),
    Check(
        "region_empty",
        "note",
        "A region of a structure set has no contour",
        "contours of every organ that was looked for",
        "nothing to do: the case does not annotate it",
    ),
    Check(
        "label_spelling",
        "note",
        "A label is spelled differently in the cohort",
        "one spelling of a label, so that it is one organ",
        "nothing to do if both are the same organ; otherwise rename the label in the source",
    ),
    Check(
        "label_unknown",
        "refused",
        "The label has ids that are not in dataset.json",
        "only ids that are in dataset.json",
        "add the ids to dataset.json, or remove them from the label",
    ),
    Check(
        "label_ignored",
        "note",
        "The label has voxels that nobody judged, nnU-Net's `ignore`",
        "every voxel judged for the organs that the case annotates",
        "nothing to do: these voxels count neither in the loss nor in scores; an organ that was "
        "not drawn at all is left out of the column `annotated` of cases.csv instead",
    ),
    Check(
        "few_slices",
        "refused",
        "The scan has too few slices",
        "at least 8 axial slices",
        "export the whole scan, not a part of it",
        is_judgement=True,
    ),
    Check(
        "not_hu",
        "refused",
        "The values are not Hounsfield units",
        "air below -500 HU and bone or contrast above 100 HU",
        "export the scan without window, with rescale slope and intercept applied",
        is_judgement=True,
    ),
    Check(
        "no_air",
        "warning",
        "The scan holds no air",
        "air around the body, which tells that the values are HU",
        "nothing to do for a box cut out of a scan in HU; otherwise export the scan without window",
    ),
    Check(
        "slices_repeated",
        "warning",
        "Slices are copies of their neighbours",
        "slices that differ, at least by their noise",
        "export the scan with the slices that were reconstructed; copies make a false spacing",
    ),
    Check(
        "orientation_missing",
        "warning",
        "The header does not say where head, front and right are",
        "a NIfTI header with an sform or a qform whose code is not 0",
        "convert the scan again from its origin, or check left and right by eye: the axes are only "
        "assumed",
    ),
    Check(
        "forms_differ",
        "warning",
        "Two fields of one header contradict each other",
        "an sform and a qform that say the same",
        "find out which of them is right, for example by the lesion's side, and write it to both",
    ),
    Check(
        "label_mirrored",
        "refused",
        "The label fits the image only when mirrored",
        "labels on homogeneous tissue",
        "flip the label along the named axis, then compare image and label by eye",
        is_judgement=True,
    ),
    Check(
        "label_full",
        "refused",
        "The label covers nearly the whole volume",
        "organs that fill less than 90 percent of the voxels",
        "check that 0 is the background, and that the label is not the image",
        is_judgement=True,
    ),
    Check(
        "content_twice",
        "refused",
        "The same scan exists under two names",
        "every scan once, so that no scan is in both training and test set",
        "remove one of the two",
    ),
    Check(
        "content_alike",
        "warning",
        "Slices of the scan are those of another case",
        "every scan once, also where it was cut, or its header turned",
        "remove one of the two; until then both are of one patient, whatever the source says, so "
        "that they are never split between training and test",
    ),
    Check(
        "slices_twice",
        "refused",
        "Several slices of a series have the same position",
        "one slice at each position",
        "export one reconstruction or phase per series",
    ),
    Check(
        "slices_mixed",
        "refused",
        "Slices of several acquisitions or reconstructions alternate in one series",
        "one acquisition and one reconstruction per series",
        "export each acquisition or reconstruction as a series of its own, and choose one",
    ),
    Check(
        "slices_missing",
        "refused",
        "Slices of a series are missing",
        "one slice at every position",
        "export the series again, completely",
    ),
    Check(
        "series_split",
        "refused",
        "The slices of one series lie in several folders",
        "all slices of a series in one folder",
        "move the slices of the series into one folder",
    ),
    Check(
        "slices_uneven",
        "refused",
        "Slices of a series are unevenly spaced",
        "equal distances between neighbouring slices, within 0.1 mm",
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
        "train on scans without tilt; fullscale resamples tilted slices onto an upright grid",
        is_judgement=True,
    ),
    Check(
        "label_empty",
        "warning",
        "The label is empty",
        "at least one voxel of an annotated organ",
        "check that the scan shows none of the organs",
    ),
    Check(
        "label_not_annotated",
        "warning",
        "The label has an organ that the case does not list as annotated",
        "only organs that the column `annotated` lists",
        "add the organ to `annotated` in cases.csv; until then it is ignored",
    ),
    Check(
        "axis",
        "warning",
        "The header seems to name an axis wrongly",
        "lungs at the head, a spine at the back, and a body cut from head to foot only",
        "correct the axes in the header's affine, then compare scan and label by eye",
    ),
    Check(
        "liver_on_left",
        "warning",
        "The liver seems to lie on the patient's left, or the spleen on the right",
        "a liver on the patient's right and a spleen on the left",
        "check the left and right of the header; situs inversus is rare",
    ),
    Check(
        "patient_shared",
        "note",
        "One patient has several cases",
        "nothing: cases of one patient are never split between training and test",
        "nothing to do if correct; otherwise correct the column `patient`",
    ),
    Check(
        "private_text",
        "note",
        "The header has fields with free text",
        "no text that may name a patient",
        "nothing to do: the text is dropped, only voxels and geometry are kept",
    ),
    Check(
        "case_name",
        "refused",
        "The case's name cannot be used as a file name",
        "letters, digits, '-' and '_', at most 64, starting with a letter or digit",
        "rename the files of the case",
    ),
    Check(
        "file_unused",
        "warning",
        "Files that may be parts of a scan were not read",
        "every part of a scan under a name and in a folder of the layout",
        "rename, unzip or convert what is missing in a case, and move the rest out of the source",
    ),
    Check(
        "file_ignored",
        "note",
        "Files without an annotated scan were not read",
        "scans, labels, dataset.json and cases.csv",
        "nothing to do if no scan is among them",
    ),
    Check(
        "row_twice",
        "refused",
        "A case has several rows in cases.csv that differ",
        "one row for every case",
        "remove the wrong rows from cases.csv",
    ),
    Check(
        "row_missing",
        "warning",
        "A case has no row in cases.csv, or one without a patient",
        "a row with case, patient and annotated for every case",
        "complete cases.csv; until then the case counts as a separate patient, and without a row "
        "with every label drawn",
    ),
    Check(
        "row_unused",
        "warning",
        "A row of cases.csv names no case of the source",
        "names as in imagesTr and labelsTr, without ending",
        "correct the name in cases.csv, or remove the row",
    ),
    Check(
        "name_twice",
        "refused",
        "Two cases of the source have one name",
        "a name of its own for every case",
        "rename the files or the folder of one of the two",
    ),
    Check(
        "case_renamed",
        "note",
        "The case has another name in the cohort than in the source",
        "letters, digits, '-' and '_', at most 64; the digits at the end keep similar names apart",
        "nothing to do: the name stays the same when the source is ingested again",
    ),
    Check(
        "case_exists",
        "refused",
        "Another scan of this name is already in the cohort",
        "a new name for new content",
        "rename the case, or ingest with --replace-changed to replace the old scan",
    ),
    Check(
        "annotated_unknown",
        "refused",
        "A case lists an annotated organ that has no label",
        "names under `labels` in dataset.json",
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
        "trunk_too_large",
        "refused",
        "The trunk is larger than a slice",
        "slices that cover the trunk of every patient",
        "enlarge slice.size_px or slice.pixel_mm",
    ),
    Check(
        "checksum_differs",
        "refused",
        "A file differs from the ingested one",
        "the checksum in cases.csv",
        "restore it with `dvc checkout`, or ingest the new file with --replace-changed",
    ),
    Check(
        "case_unlisted",
        "warning",
        "The files of a case have no row in cases.csv",
        "a row in cases.csv for every scan",
        "add the scan with `fullscale ingest`, or remove its files",
    ),
    Check(
        "cluster",
        "refused",
        "The Dask cluster cannot be used",
        "a scheduler at compute.address and the package `distributed`",
        "start the cluster, correct compute.address, or `pip install --constraint "
        "constraints.txt --editable '.[dask]'`",
    ),
    Check(
        "store_missing",
        "refused",
        "The slice store is missing or incomplete",
        "store.json, index.csv and one folder per case, as the slice stage writes them",
        "run the slice stage again: `dvc repro slice`",
    ),
)

CHECKS: dict[str, Check] = {check.code: check for check in _TABLE}


@dataclass(frozen=True)
class Finding:
    """The result of one failed check on one case.

    Attributes:
        case: name of the case, or of the source.
        code: code of the check.
        severity: severity of the check.
        found: the values found.
        wanted: the requirement, from the table.
        cure: the action to take, from the table.
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

    def accept(self, codes: Container[str]) -> Finding:
        """Return the finding as a warning if it is a refusal of judgement with one of the codes."""
        if self.code in codes and CHECKS[self.code].is_judgement and self.severity == "refused":
            return replace(self, severity="warning")
        return self

    def refuse_warning(self) -> Finding:
        """Return the finding with the severity "refused" in place of "warning"."""
        return replace(self, severity="refused") if self.severity == "warning" else self

    @classmethod
    def from_check(cls, case: str, code: str, found: str) -> Finding:
        """Return a finding with requirement and cure of the check `code`."""
        check = CHECKS[code]
        cure = check.cure
        if check.is_judgement:
            cure += f"; if the scan is right, --accept {code}"
        return cls(case, code, check.severity, found, check.wanted, cure)

    @classmethod
    def from_error(cls, case: str, error: ScanError) -> Finding:
        """Return the finding of an error; its severity is "refused"."""
        return cls(case, error.code, "refused", error.found, error.wanted, error.cure)


def failure(code: str, found: str) -> ScanError:
    """Return the error of one check, with requirement and cure from the table.

    Args:
        code: key of `CHECKS`.
        found: the file and the values found.
    """
    check = CHECKS[code]
    return ScanError(code, found, check.wanted, check.cure)


def check_accepted(codes: Iterable[str]) -> tuple[str, ...]:
    """Return the codes of `--accept`, each once and in order.

    Raises:
        StageError: a code is no refusal of judgement.
    """
    known = sorted(check.code for check in _TABLE if check.is_judgement)
    if wrong := sorted(set(codes) - set(known)):
        raise StageError(f"--accept {', '.join(wrong)}; it can be {', '.join(known)}")
    return tuple(sorted(set(codes)))
