"""Write a label map as a DICOM segmentation (SEG) that refers to its series.

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

from fullscale.runtime.errors import ScanError, shorten
from fullscale.runtime.files import write_atomically
from fullscale.scans.dicom import READ_ERRORS, SeriesOrder, read_header
from fullscale.scans.geometry import Array

SERIES_NUMBER = 1000
"""Series number of the segmentation; scanners use far lower ones."""

_KEYWORDS = {
    "liver": "Liver",
    "spleen": "Spleen",
    "pancreas": "Pancreas",
    "stomach": "Stomach",
    "gallbladder": "Gallbladder",
    "kidney": "Kidney",
    "aorta": "Aorta",
    "esophagus": "Esophagus",
    "duodenum": "Duodenum",
    "colon": "Colon",
    "lung": "Lung",
    "heart": "Heart",
}
"""pydicom's keyword of the SNOMED CT code, by a word of the organ name (kidney_left: Kidney)."""


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


def check_referable(order: SeriesOrder) -> None:
    """Check that a segmentation can refer to a series, before a scan is segmented for minutes.

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
        reason = shorten(error) or type(error).__name__
        raise ScanError(
            "no_segmentation",
            f"a series that no segmentation can refer to ({reason})",
            "headers with the identity of patient, study, frame of reference and slices",
            "export the series again, or leave --dicom-seg out",
        ) from error


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
            highdicom.seg.SegmentDescription(
                segment_number=number,
                segment_label=organ,
                segmented_property_category=codes.SCT.Organ,
                segmented_property_type=_code_of(organ),
                algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=algorithm,
            )
            for number, organ in enumerate(organs, start=1)
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


def _code_of(organ: str) -> Any:
    """Return the SNOMED CT code of an organ, or that of "organ" if it is not in `_KEYWORDS`."""
    from pydicom.sr.codedict import codes

    words = organ.lower().replace("-", "_").split("_")
    keyword = next((_KEYWORDS[word] for word in words if word in _KEYWORDS), "Organ")
    return getattr(codes.SCT, keyword)
