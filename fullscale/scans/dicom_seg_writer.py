"""Write a label map as a DICOM segmentation (SEG) or structure set (RTSTRUCT) of its series.

The file holds patient and study of the series, as the standard requires. Protect it like the scan.
"""

# pydicom and highdicom have no type annotations for the functions called here.
# mypy: allow-untyped-calls
from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fullscale.formats import rtstruct
from fullscale.formats.dicom_files import READ_ERRORS
from fullscale.formats.organ_codes import find_code, find_side, pick_colour
from fullscale.runtime.errors import ScanError, shorten
from fullscale.runtime.files import write_atomically
from fullscale.scans.dicom import SeriesOrder, read_header
from fullscale.scans.geometry import Array

SERIES_NUMBER = 1000
"""Series number of the segmentation; scanners use far lower ones."""


@dataclass(frozen=True)
class Maker:
    """The model that made a segmentation, for the header.

    Attributes:
        name: name of the model.
        version: version of the model.
        serial: unique identifier of the model, at most 64 characters.
        software_version: version of this program.
    """

    name: str
    version: str
    serial: str
    software_version: str


def write_segmentation(
    path: Path,
    label_ZYX: Array,
    order: SeriesOrder,
    organs: Mapping[str, int],
    maker: Maker,
) -> None:
    """Write a DICOM segmentation with one binary segment per organ, atomically.

    Args:
        path: target; missing parent folders are created.
        label_ZYX: uint8 label ids on the series' grid, canonical orientation.
        order: the sorted slices of the series.
        organs: label id by organ; segments are numbered from 1 in this order. An organ without
            voxels has a segment without frames; if all are empty, every segment has empty frames.
        maker: model named in the header.

    Raises:
        ScanError: the headers of the series lack what a reference needs.
    """
    number_of_id = np.zeros(256, dtype=np.uint8)
    for number, label_id in enumerate(organs.values(), start=1):
        number_of_id[label_id] = number
    own = order.geometry.to_own_grid(label_ZYX)
    segments_ZYX = np.ascontiguousarray(number_of_id[own].transpose(2, 1, 0))
    sources = [read_header(file) for file in dict.fromkeys(order.files)]
    if order.frames[0] is not None:  # highdicom wants the slices in the order of the frames
        segments_ZYX = segments_ZYX[np.argsort(np.array(order.frames))]
    buffer = io.BytesIO()
    _try_make(sources, segments_ZYX, list(organs), maker).save_as(buffer)
    write_atomically(path, buffer.getbuffer())


def write_structure_set(
    path: Path,
    label_ZYX: Array,
    order: SeriesOrder,
    organs: Mapping[str, int],
    maker: Maker,
) -> None:
    """Write a DICOM structure set with the contours of every organ, atomically.

    Arguments and errors are those of `write_segmentation`.
    """
    own = order.geometry.to_own_grid(label_ZYX)
    regions = [
        rtstruct.Region(organ, pick_colour(organ, number), own == label_id)
        for number, (organ, label_id) in enumerate(organs.items(), start=1)
    ]
    header = read_header(order.files[0])
    affine = order.geometry.own_affine_lps
    slices = rtstruct.Slices(header, order.instance_uids, order.frames, affine)
    try:
        made = rtstruct.make_structure_set(
            slices, regions, maker=maker.name, version=maker.software_version
        )
    except ValueError as error:
        raise _not_referable(shorten(error)) from error
    buffer = io.BytesIO()
    made.save_as(buffer, enforce_file_format=True)
    write_atomically(path, buffer.getbuffer())


def check_referable(order: SeriesOrder) -> None:
    """Check that a segmentation can refer to a series, before a scan is segmented for minutes.

    A structure set needs no more than a segmentation.

    Raises:
        ScanError: the headers of the series lack what a reference needs.
    """
    source = read_header(order.files[0])
    columns, rows, slices = order.geometry.own_shape
    num_slices = 1 if order.frames[0] is None else slices
    empty_ZYX = np.zeros((num_slices, rows, columns), dtype=np.uint8)
    _try_make([source], empty_ZYX, ["organ"], Maker("model", "1", "1", "1"))


def _try_make(sources: list[Any], segments_ZYX: Array, organs: list[str], maker: Maker) -> Any:
    try:
        # The warnings quote header text, which may name the patient.
        with warnings.catch_warnings(action="ignore"):
            return _make(sources, segments_ZYX, organs, maker)
    except READ_ERRORS as error:
        raise _not_referable(shorten(error) or type(error).__name__) from error


def _not_referable(reason: str) -> ScanError:
    return ScanError(
        "no_segmentation",
        f"a series that no segmentation can refer to ({reason})",
        "headers with the identity of patient, study, frame of reference and slices",
        "export the series again, or leave --dicom-seg and --rtstruct out",
    )


def _make(sources: list[Any], segments_ZYX: Array, organs: list[str], maker: Maker) -> Any:
    import highdicom
    from pydicom.sr.codedict import codes

    algorithm = highdicom.AlgorithmIdentificationSequence(
        maker.name, codes.DCM.ArtificialIntelligence, maker.version
    )
    return highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=segments_ZYX,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[
            _describe(number, organ, algorithm) for number, organ in enumerate(organs, start=1)
        ],
        series_instance_uid=highdicom.UID(),
        series_number=SERIES_NUMBER,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="Fullscale",
        manufacturer_model_name=maker.name,
        software_versions=maker.software_version,
        device_serial_number=maker.serial,
        # highdicom refuses a segmentation without any frame.
        omit_empty_frames=bool(segments_ZYX.any()),
        content_description="Organs found by a trained network",
        series_description="Organ segmentation",
    )


def _describe(number: int, organ: str, algorithm: Any) -> Any:
    import highdicom
    from pydicom.sr.codedict import codes

    described = highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=organ,
        segmented_property_category=codes.SCT.Organ,
        segmented_property_type=find_code(organ),
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
        display_color=highdicom.color.CIELabColor.from_rgb(*pick_colour(organ, number)),
    )
    if side := find_side(organ):
        kind = described.SegmentedPropertyTypeCodeSequence[0]
        kind.SegmentedPropertyTypeModifierCodeSequence = [highdicom.sr.CodedConcept.from_code(side)]
    return described
