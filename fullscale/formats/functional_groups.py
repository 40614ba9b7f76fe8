"""Elements of one slice of a DICOM data set, with one slice or with several (multi-frame)."""

# pydicom has no type annotations for the elements of data sets.
# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pydicom

_GROUPS = {
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
}
"""Functional group of each element, DICOM PS3.3 C.7.6.16.2."""


def get_element(dataset: pydicom.Dataset, tag: str, frame: int | None) -> Any:
    """Return the value of an element for one slice; None if it is missing or empty.

    Args:
        dataset: with one slice, or with several.
        tag: keyword of the element, one of those in `_GROUPS`.
        frame: of a data set with several slices, counted from 0; None for one slice.
    """
    for place in _places(dataset, tag, frame):
        value = place.get(tag)
        if value is not None and value != "":
            return value
    return None


def get_number(dataset: pydicom.Dataset, tag: str, frame: int | None, *, default: float) -> float:
    """Return the number of an element for one slice; `default` if it is missing or empty."""
    value = get_element(dataset, tag, frame)
    return default if value is None else float(value)


def _places(dataset: pydicom.Dataset, tag: str, frame: int | None) -> Iterator[pydicom.Dataset]:
    """Yield the data sets that may hold an element, the most specific first."""
    if frame is not None:
        per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
        shared = dataset.get("SharedFunctionalGroupsSequence") or []
        for groups in (*per_frame[frame : frame + 1], *shared[:1]):
            yield from (groups.get(_GROUPS[tag]) or [])[:1]
    yield dataset
