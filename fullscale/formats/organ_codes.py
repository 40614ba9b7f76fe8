"""Codes (SNOMED CT) and colours of organs in DICOM segmentations and structure sets."""

# pydicom has no type annotations for its dictionary of codes.
# mypy: allow-untyped-calls
from __future__ import annotations

import colorsys
import re
from typing import Any

import pydicom

_OTHER_WORDS = {
    "urinary_bladder": "bladder",
    "small_bowel": "small_intestine",
    "thyroid_gland": "thyroid",
    "oesophagus": "esophagus",
    "postcava": "inferior_vena_cava",
}
"""Names of SNOMED CT by other names of the same organ."""
_SIDES = ("left", "right")
_SAYS_NOTHING = re.compile(r"(label|class|organ|segment|structure|roi|region|id)?[\s_-]*\d*", re.I)
_FILLING = r"\(.*?\)|\b(entire|structure of|structure)\b"
_GENERAL = frozenset(
    {
        "organ",
        "tissue",
        "anatomical structure",
        "structure",
        "physical object",
        "region of interest",
    }
)
"""Meanings of codes that name no organ."""
_COLOURS = {
    "liver": (170, 80, 60),
    "spleen": (130, 90, 170),
    "pancreas": (230, 190, 90),
    "kidney": (190, 110, 60),
    "stomach": (240, 150, 140),
    "gallbladder": (100, 160, 70),
    "aorta": (220, 60, 50),
    "inferior_vena_cava": (60, 110, 200),
    "lung": (150, 190, 220),
    "heart": (205, 90, 110),
    "bone": (235, 225, 190),
}
"""RGB, 0 to 255, as anatomical atlases draw the organs."""
_GOLDEN = 0.618  # of the circle of hues: neighbours in number are far apart


def find_code(organ: str) -> Any:
    """Return the SNOMED CT code of an organ by its name, or that of "organ" if it has none.

    The whole name counts, without "left" and "right": a tumour of the liver is no liver.
    """
    from pydicom.sr.codedict import codes

    keyword = "".join(word.capitalize() for word in _plain_name(organ).split("_"))
    return getattr(codes.SCT, keyword, codes.SCT.Organ) if keyword else codes.SCT.Organ


def find_side(organ: str) -> Any:
    """Return the SNOMED CT code of the side that a name has, such as kidney_left; else None."""
    from pydicom.sr.codedict import codes

    sides = [word for word in _words(organ) if word in _SIDES]
    return getattr(codes.SCT, sides[0].capitalize()) if len(sides) == 1 else None


def pick_colour(organ: str, number: int) -> tuple[int, int, int]:
    """Return the colour (RGB, 0 to 255) of an organ; of an unknown one a hue by its number."""
    if colour := _COLOURS.get(_plain_name(organ)):
        return colour
    red, green, blue = colorsys.hsv_to_rgb(number * _GOLDEN % 1, 0.6, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


def is_telling(label: str) -> bool:
    """Return False for a label such as "Segment_1", which numbers a segment and names no organ."""
    return not _SAYS_NOTHING.fullmatch(label.strip())


def name_segment(segment: pydicom.Dataset) -> str:
    """Return the name of a segment: its label, or the meaning of its code if the label is a number.

    Returns:
        An empty text if neither names an organ, as "Segment_1" of the code "tissue".
    """
    label = str(segment.get("SegmentLabel") or "").strip()
    if is_telling(label):
        return label
    for kind in segment.get("SegmentedPropertyTypeCodeSequence") or []:
        meaning = " ".join(re.sub(_FILLING, "", _meaning(kind)).split())
        if meaning and meaning not in _GENERAL:
            sides = [
                _meaning(each)
                for each in kind.get("SegmentedPropertyTypeModifierCodeSequence") or []
            ]
            return " ".join([meaning, *(side for side in sides if side in _SIDES)])
    return ""


def _meaning(code: pydicom.Dataset) -> str:
    return str(code.get("CodeMeaning") or "").lower()


def _words(organ: str) -> list[str]:
    return [word for word in re.split(r"[\W_]+", organ.lower()) if word]


def _plain_name(organ: str) -> str:
    name = "_".join(word for word in _words(organ) if word not in _SIDES)
    return _OTHER_WORDS.get(name, name)
