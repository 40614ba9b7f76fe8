"""Names of labels: which are equal, and which label ids an organ of params.yaml has."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from fullscale.runtime.errors import StageError

_SYNONYMS = {
    "hepatic": "liver",
    "hepar": "liver",
    "splenic": "spleen",
    "lien": "spleen",
    "pancreatic": "pancreas",
    "renal": "kidney",
    "kidneys": "kidney",
    "lungs": "lung",
    "pulmonary": "lung",
    "oesophagus": "esophagus",
    "tumor": "tumour",
    "tumors": "tumour",
    "tumours": "tumour",
    "lesion": "tumour",
    "lesions": "tumour",
    "cancer": "tumour",
    "metastasis": "tumour",
    "metastases": "tumour",
}
"""Words of label names that mean the same."""
_PARTS = frozenset({"tumour", "cyst", "cysts", "vessel", "vessels"})
"""What a part of an organ may be called without the organ's name."""
_JOINED = re.compile(
    r"^(left|right)?(liver|spleen|pancreas|kidney|lung)(tumou?rs?|lesions?|cancer|cysts?)?$"
)
_NUMBERED = re.compile(r"(label|class|organ|segment|structure|id)?_?\d+")
"""Names that say nothing, so that a number is as good."""


def label_key(text: str) -> str:
    """Return the form in which names of one label are equal, such as "Liver" and "liver ".

    Letter case, blanks, "-" and "_" make no difference.
    """
    return re.sub(r"[\s_-]+", "_", unicodedata.normalize("NFKC", text).casefold()).strip("_")


def label_name(text: str) -> str:
    """Return the name of a file or folder as that of a label.

    Blanks are single, and none are around the name; ";" separates names in cases.csv.
    """
    return " ".join(text.replace(";", " ").split())


def resolve_organs(
    organs: Mapping[str, Sequence[int | str]], labels: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """Return the label ids of each organ in a cohort.

    A label is named as in dataset.json, or by words that mean the same: "tumour" of the organ
    liver is also found as "livertumor" or "hepatic lesion". A number is taken only where the label
    of that id has the name of the organ or of a part of it, or where no label has a telling name.

    Args:
        organs: labels of each organ as in params.yaml: the organ itself first, then its parts.
        labels: label id by name, as dataset.json has them.

    Raises:
        StageError: a name or number is no label, fits several, or is a label of another name; or
            two organs share a label.
    """
    named = {name: value for name, value in labels.items() if value != 0}
    resolved: dict[str, tuple[int, ...]] = {}
    owner: dict[int, str] = {}
    for organ, wanted in organs.items():
        ids = (_find_id(organ, label, named, is_part=k > 0) for k, label in enumerate(wanted))
        resolved[organ] = tuple(dict.fromkeys(ids))
        for label_id in resolved[organ]:
            if (other := owner.setdefault(label_id, organ)) != organ:
                raise StageError(
                    f"label {_describe(named, [label_id])} is given to both organs.{other} and "
                    f"organs.{organ} in params.yaml; a voxel can be one organ only"
                )
    return resolved


def _find_id(organ: str, label: int | str, labels: Mapping[str, int], *, is_part: bool) -> int:
    """Return the id of one entry of an organ; `is_part` is False for the organ itself."""
    found = f"organs.{organ} in params.yaml names {label!r}"
    have = f"data/dataset.json has {_describe(labels, labels.values())}"
    if isinstance(label, str):
        fitting = _named_alike(organ, label, labels)
        if len(fitting) != 1:
            why = f"which may be {_describe(labels, fitting)}" if fitting else "and no label is it"
            raise StageError(f"{found}, {why}; {have}; write one of these names")
        return fitting[0]
    name = next((name for name, value in labels.items() if value == label), None)
    if name is None:
        raise StageError(f"{found}, and no label has this id; {have}; write one of these names")
    words = _words(name)
    fits = words == _words(organ) or (is_part and bool(words & (_PARTS | _words(organ))))
    if fits or all(_NUMBERED.fullmatch(label_key(each)) for each in labels):
        return label
    raise StageError(
        f"{found}, which is the label {name!r}; {have}; name the label instead of its number, "
        f"such as `{organ}: [{name}]`"
    )


def _named_alike(organ: str, label: str, labels: Mapping[str, int]) -> list[int]:
    """Return the ids of the labels that a name means: first by spelling, then by words."""
    same = [value for name, value in labels.items() if label_key(name) == label_key(label)]
    wanted = _words(label)
    for words in (wanted, wanted | _words(organ)):
        same = same or [value for name, value in labels.items() if _words(name) == words]
    return same


def _words(name: str) -> frozenset[str]:
    """Return the words of a label's name, in any order, one spelling for each meaning."""
    parts = [part for part in re.split(r"[^\w]+|_", label_key(name)) if part]
    split = (_JOINED.fullmatch(part) for part in parts)
    apart = (
        each
        for part, match in zip(parts, split, strict=True)
        for each in (match.groups() if match else (part,))
        if each
    )
    return frozenset(_SYNONYMS.get(part, part) for part in apart)


def _describe(labels: Mapping[str, int], ids: Iterable[int]) -> str:
    wanted = set(ids)
    chosen = (f"{name} {value}" for name, value in labels.items() if value in wanted)
    return ", ".join(chosen) or "no label"
