"""DICOM structure sets (RTSTRUCT): closed contours in the planes of a CT series.

Coordinates are DICOM's LPS in millimetres. A voxel belongs to an organ if its centre lies inside a
contour, or on it: some programs draw through the centres of the outermost voxels, others along
their edges. Contours inside others are holes, as the even-odd rule has it.
"""

# pydicom has no type annotations for the elements of data sets.
# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid

PLANE_TOLERANCE = 0.25  # of the distance of slices, from a contour to the nearest slice
_ON_CONTOUR = 1e-3  # pixels; positions are written with few digits
# Above 0.5, so that programs that round contours to whole pixels round them inwards.
_LEVEL = 0.505
_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
_COPIED = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyID"),
    *("StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "FrameOfReferenceUID"),
    "PositionReferenceIndicator",
)
"""Elements of patient, study and frame of reference, which are those of the series."""
_NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPClassUID")

Array = NDArray[Any]


@dataclass(frozen=True)
class RegionName:
    """A region of interest: its name and number, and if it has a contour."""

    name: str
    number: int
    is_drawn: bool


def list_regions(structure_set: pydicom.Dataset) -> list[RegionName]:
    """Return the regions of a structure set in its order."""
    drawn = {
        int(each.ReferencedROINumber)
        for each in structure_set.get("ROIContourSequence") or []
        if each.get("ContourSequence")
    }
    return [
        RegionName(
            str(each.get("ROIName") or ""), int(each.ROINumber), int(each.ROINumber) in drawn
        )
        for each in structure_set.get("StructureSetROISequence") or []
    ]


def find_references(structure_set: pydicom.Dataset) -> tuple[str, str]:
    """Return the UIDs of series and frame of reference; empty where it does not name one alone."""
    frames = structure_set.get("ReferencedFrameOfReferenceSequence") or []
    series = [
        str(each.SeriesInstanceUID)
        for frame in frames
        for study in frame.get("RTReferencedStudySequence") or []
        for each in study.get("RTReferencedSeriesSequence") or []
    ]
    spaces = [str(frame.get("FrameOfReferenceUID") or "") for frame in frames]
    return (series[0] if len(set(series)) == 1 else "", spaces[0] if len(spaces) == 1 else "")


def read_region(
    structure_set: pydicom.Dataset, number: int, affine: Array, shape: tuple[int, int, int]
) -> NDArray[np.bool_]:
    """Return the voxels of one region as a mask (columns, rows, slices).

    Args:
        structure_set: the data set.
        number: ROINumber of the region.
        affine: 4 x 4, voxel (column, row, slice) to LPS millimetres.
        shape: number of columns, rows and slices.

    Raises:
        ValueError: a contour is not closed, crosses the slices, or lies between or outside them;
            or the region is drawn on some slices only, a fixed number apart.
    """
    mask = np.zeros(shape, dtype=bool, order="F")
    by_slice: dict[int, list[Array]] = {}
    for points_mm in _contours(structure_set, number):
        homogeneous = np.column_stack([points_mm, np.ones(len(points_mm))])
        points = (homogeneous @ np.linalg.inv(affine).T)[:, :3]
        k = round(float(np.median(points[:, 2])))
        if np.abs(points[:, 2] - k).max() > PLANE_TOLERANCE:
            raise ValueError(f"a contour at {points_mm[0].tolist()} mm in the plane of no slice")
        if not 0 <= k < shape[2]:
            raise ValueError(f"a contour at {points_mm[0].tolist()} mm outside the slices")
        by_slice.setdefault(k, []).append(points[:, :2])
    steps = np.diff(sorted(by_slice))
    if len(steps) > 1 and np.median(steps) > 1:
        raise ValueError(f"contours on every {round(float(np.median(steps)))}. slice only")
    for k, contours in by_slice.items():
        mask[..., k] = fill_contours(contours, shape[:2])
    return mask


def fill_contours(contours: Iterable[Array], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the pixels whose centre lies inside closed contours by the even-odd rule, or on one.

    Args:
        contours: points x 2, in columns and rows; whole numbers are centres of pixels.
        shape: number of columns and rows.

    Returns:
        A mask (columns, rows).
    """
    columns, rows = shape
    toggles = np.zeros((columns + 1, rows), dtype=np.int64)
    on_contour = np.zeros((columns, rows), dtype=bool)

    def mark(x: Array, y: Array) -> None:
        near_x, near_y = np.rint(x).astype(int), np.rint(y).astype(int)
        near = (np.abs(x - near_x) < _ON_CONTOUR) & (np.abs(y - near_y) < _ON_CONTOUR)
        near &= (near_x >= 0) & (near_x < columns) & (near_y >= 0) & (near_y < rows)
        on_contour[near_x[near], near_y[near]] = True

    for points in contours:
        x, y = _cross_lines(points, rows)
        np.add.at(toggles, (np.clip(np.ceil(x), 0, columns).astype(int), y), 1)
        mark(x, y)
        mark(*_cross_lines(points[:, ::-1], columns)[::-1])  # edges along a row
        mark(points[:, 0], points[:, 1])
    inside = np.cumsum(toggles[:-1], axis=0) % 2 == 1
    return np.asarray(inside | on_contour)


def _cross_lines(points: Array, count: int) -> tuple[Array, Array]:
    """Return where a closed contour crosses the lines y = 0, 1, ... count - 1, as x and y."""
    ends = np.roll(points, -1, axis=0)
    low, high = np.minimum(points[:, 1], ends[:, 1]), np.maximum(points[:, 1], ends[:, 1])
    # Half open, so that a point that two edges share is counted once.
    first, last = np.clip(np.ceil(low), 0, count), np.clip(np.ceil(high), 0, count)
    nums = (last - first).astype(int)
    edge = np.repeat(np.arange(len(points)), nums)
    y = first[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(nums) - nums, nums)
    start, slope = points[edge], ends[edge] - points[edge]
    x = start[:, 0] + (y - start[:, 1]) * slope[:, 0] / slope[:, 1]
    return x, y.astype(int)


def trace_contours(mask: NDArray[np.bool_]) -> list[Array]:
    """Return closed contours of a mask (columns, rows), halfway between its pixels and the others.

    `fill_contours` gives the mask back. Each contour has points x 2, in columns and rows.
    """
    import contourpy

    padded = np.pad(mask, 1).astype(np.float64)
    lines: Any = contourpy.contour_generator(z=padded.T).lines(_LEVEL)
    return [_drop_straight(np.asarray(line)[:-1]) - 1 for line in lines]


def _drop_straight(points: Array) -> Array:
    """Leave out points between two edges of one direction."""
    edges = np.roll(points, -1, axis=0) - points
    before = np.roll(edges, 1, axis=0)
    turns = edges[:, 0] * before[:, 1] - edges[:, 1] * before[:, 0]
    return np.asarray(points[np.abs(turns) > 1e-9])


@dataclass(frozen=True, eq=False)
class Region:
    """A region to write: its name, colour (RGB, 0 to 255) and voxels (columns, rows, slices)."""

    name: str
    colour: tuple[int, int, int]
    mask: NDArray[np.bool_]


@dataclass(frozen=True)
class Slices:
    """The slices that regions are drawn on.

    Attributes:
        header: of any slice; gives patient, study, series and frame of reference.
        instance_uids: SOPInstanceUID of each slice.
        frames: frame of each slice in a file of several, from 0; None in a file of one.
        affine: 4 x 4, voxel (column, row, slice) to LPS millimetres.
    """

    header: pydicom.Dataset
    instance_uids: Sequence[str]
    frames: Sequence[int | None]
    affine: Array


def make_structure_set(
    slices: Slices, regions: Sequence[Region], *, maker: str, version: str
) -> pydicom.Dataset:
    """Return a structure set of a series, ready to be saved.

    Args:
        slices: of the series.
        regions: numbered from 1 in this order; one without voxels has no contour.
        maker: name of the model that drew them.
        version: version of the program.

    Raises:
        ValueError: the header lacks what a reference needs.
    """
    header = slices.header
    if missing := [tag for tag in _NEEDED if not header.get(tag)]:
        raise ValueError(f"no {', '.join(missing)}")
    made = pydicom.Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.file_meta.MediaStorageSOPClassUID = RTStructureSetStorage
    made.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    made.SOPClassUID = RTStructureSetStorage
    made.SOPInstanceUID = made.file_meta.MediaStorageSOPInstanceUID
    made.SpecificCharacterSet = header.get("SpecificCharacterSet", "ISO_IR 192")
    for tag in _COPIED:
        setattr(made, tag, header.get(tag, ""))
    now = datetime.now()
    made.Modality, made.SeriesInstanceUID, made.SeriesNumber = "RTSTRUCT", generate_uid(), "1001"
    made.SeriesDescription, made.OperatorsName = "Organ contours", ""
    made.Manufacturer, made.ManufacturerModelName = "Fullscale", maker
    made.SoftwareVersions, made.InstanceNumber = version, "1"
    made.StructureSetLabel = "Organs"
    made.StructureSetDate, made.StructureSetTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    made.ApprovalStatus = "UNAPPROVED"
    made.ReferencedFrameOfReferenceSequence = [_reference(slices)]
    made.StructureSetROISequence, made.ROIContourSequence = [], []
    made.RTROIObservationsSequence = []
    for number, region in enumerate(regions, start=1):
        made.StructureSetROISequence.append(
            _item(
                ROINumber=number,
                ReferencedFrameOfReferenceUID=header.FrameOfReferenceUID,
                ROIName=region.name,
                ROIGenerationAlgorithm="AUTOMATIC",
            )
        )
        drawn = _item(ROIDisplayColor=list(region.colour), ReferencedROINumber=number)
        if contours := list(_draw(slices, region.mask)):
            drawn.ContourSequence = contours
        made.ROIContourSequence.append(drawn)
        made.RTROIObservationsSequence.append(
            _item(
                ObservationNumber=number,
                ReferencedROINumber=number,
                RTROIInterpretedType="ORGAN",
                ROIInterpreter="",
            )
        )
    return made


def _contours(structure_set: pydicom.Dataset, number: int) -> Iterator[Array]:
    """Yield the contours of a region, points x 3 in millimetres; points alone are none."""
    for region in structure_set.get("ROIContourSequence") or []:
        if int(region.ReferencedROINumber) != number:
            continue
        for contour in region.get("ContourSequence") or []:
            kind = str(contour.ContourGeometricType)
            numbers = np.array(contour.ContourData or [], dtype=np.float64).ravel()
            if len(numbers) % 3 or not np.isfinite(numbers).all():
                raise ValueError(f"a contour of {len(numbers)} numbers, not x, y, z of each point")
            points = numbers.reshape(-1, 3)
            if kind == "POINT":
                continue
            if kind not in _CLOSED or len(points) < 3:
                raise ValueError(f"a contour of type {kind} with {len(points)} points")
            yield points


def _draw(slices: Slices, mask: NDArray[np.bool_]) -> Iterator[pydicom.Dataset]:
    for k in np.flatnonzero(mask.any(axis=(0, 1))).tolist():
        for points in trace_contours(mask[..., k]):
            whole = np.column_stack([points, np.full(len(points), k), np.ones(len(points))])
            points_mm = (whole @ slices.affine.T)[:, :3]
            yield _item(
                ContourImageSequence=[_image(slices, k)],
                ContourGeometricType="CLOSED_PLANAR",
                NumberOfContourPoints=len(points),
                ContourData=[f"{value:.4f}" for value in points_mm.ravel()],
            )


def _reference(slices: Slices) -> pydicom.Dataset:
    header = slices.header
    series = _item(
        SeriesInstanceUID=header.SeriesInstanceUID,
        ContourImageSequence=[_image(slices, k) for k in range(len(slices.instance_uids))],
    )
    study = _item(
        # The retired class of studies, which the standard still asks for here.
        ReferencedSOPClassUID="1.2.840.10008.3.1.2.3.1",
        ReferencedSOPInstanceUID=header.StudyInstanceUID,
        RTReferencedSeriesSequence=[series],
    )
    return _item(FrameOfReferenceUID=header.FrameOfReferenceUID, RTReferencedStudySequence=[study])


def _image(slices: Slices, k: int) -> pydicom.Dataset:
    image = _item(
        ReferencedSOPClassUID=slices.header.SOPClassUID,
        ReferencedSOPInstanceUID=slices.instance_uids[k],
    )
    if (frame := slices.frames[k]) is not None:
        image.ReferencedFrameNumber = frame + 1
    return image


def _item(**elements: Any) -> pydicom.Dataset:
    item = pydicom.Dataset()
    for keyword, value in elements.items():
        setattr(item, keyword, value)
    return item
