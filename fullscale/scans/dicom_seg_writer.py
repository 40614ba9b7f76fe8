"""A label map as a DICOM segmentation that refers to the series it was made from.

Patient and study are those of the series, as the standard wants: who may not see the patient's
name may not see this file either.
"""

# pydicom's data sets and highdicom carry no types for what is called here.
# mypy: allow-untyped-calls
from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fullscale.runtime.errors import ScanError
from fullscale.runtime.files import write_atomically
from fullscale.scans.dicom import READ_ERRORS, SeriesOrder, read_header
from fullscale.scans.geometry import Array

SERIES_NUMBER = 1000
"""Far above those of a scanner."""

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
"""Organ to pydicom's keyword of its SNOMED CT code; "kidney_left" is a kidney, too."""


@dataclass(frozen=True)
class Maker:
    """What made a segmentation, as its header says.

    Attributes:
        name: of the model.
        version: of the model.
        serial: what tells this model from all others, at most 64 characters.
        software_version: of this program.
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
    """Write a DICOM segmentation with one binary segment for each organ; whole or not at all.

    Args:
        path: missing parent folders are made.
        label_ZYX: uint8 label ids on the series' grid, canonical orientation.
        order: the series.
        organs: organ to its label id; segments are numbered from 1 in this order. An organ that
            was not found has a segment without frames, or, where none was, with empty ones.
        maker: what the header says of it.

    Raises:
        ScanError: the series cannot be referred to; the message says why.
    """
    number_of_id = np.zeros(256, dtype=np.uint8)
    for number, label_id in enumerate(organs.values(), start=1):
        number_of_id[label_id] = number
    own = order.geometry.to_own_grid(label_ZYX)
    segments_ZYX = np.ascontiguousarray(number_of_id[own].transpose(2, 1, 0))
    sources = [read_header(file) for file in order.files]
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings(action="ignore"):  # they quote what may be private
            _make(sources, segments_ZYX, list(organs), maker).save_as(buffer)
    except READ_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ScanError(
            "no_segmentation",
            f"a series that no segmentation can refer to ({reason})",
            "headers with the identity of patient, study, frame of reference and slices",
            "export the series again, or leave --dicom-seg out",
        ) from error
    write_atomically(path, buffer.getbuffer())


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
        omit_empty_frames=bool(segments_ZYX.any()),
        content_description="Organs found by a trained network",
        series_description="Organ segmentation",
    )


def _code_of(organ: str) -> Any:
    """The SNOMED CT code of an organ; of one that has none here, that of organs in general."""
    from pydicom.sr.codedict import codes

    words = organ.lower().replace("-", "_").split("_")
    keyword = next((_KEYWORDS[word] for word in words if word in _KEYWORDS), "Organ")
    return getattr(codes.SCT, keyword)
