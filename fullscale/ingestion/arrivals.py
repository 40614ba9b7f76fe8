"""Which pairs in the inbox are complete."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from fullscale.ingestion.inbox import IMAGE_ENDING, LABEL_ENDING, TABLES, InboxFile
from fullscale.scans.cohort import CASE_NAME


@dataclass(frozen=True)
class Pair:
    """What belongs to one case.

    Attributes:
        name: of the case, as its files say; safe where the pair is ready.
        files: image and label where the pair is ready.
        why: the reason where it waits or is hostile.
    """

    name: str
    files: tuple[InboxFile, ...]
    why: str = ""


@dataclass
class Arrivals:
    """What lies in the inbox.

    Attributes:
        ready: pairs that are complete and have stopped growing.
        waiting: what stays in the inbox for now.
        hostile: what can never go in, because of a name or because it is no plain file.
        tables: dataset.json and cases.csv, those that are there.
    """

    ready: list[Pair] = field(default_factory=list)
    waiting: list[Pair] = field(default_factory=list)
    hostile: list[Pair] = field(default_factory=list)
    tables: list[InboxFile] = field(default_factory=list)


def sort_files(
    before: Mapping[str, InboxFile], now: Mapping[str, InboxFile], now_s: float, settle_s: float
) -> Arrivals:
    """Tell pairs that are ready from what waits and from what is hostile.

    Args:
        before: the files of a first look.
        now: the files of a second look; one that differs from the first is being written.
        now_s: the time, in seconds since 1970.
        settle_s: for how long a file must not have been written.
    """
    arrivals = Arrivals()
    cases: dict[str, list[InboxFile]] = {}
    for path, file in now.items():
        name = case_of(path)
        if path in TABLES:
            arrivals.tables.append(file)
        elif name is None and not is_hostile(path) and file.is_plain:
            text = "neither imagesTr/<case>_0000.nii.gz nor labelsTr/<case>.nii.gz"
            arrivals.waiting.append(Pair(path, (file,), text))
        else:
            cases.setdefault(f"./{path}" if name is None else name, []).append(file)

    def growing(files: list[InboxFile]) -> list[str]:
        return [
            file.path
            for file in files
            if before.get(file.path) != file or now_s - file.modified_s < settle_s
        ]

    unsettled = growing(arrivals.tables)
    for name, files in sorted(cases.items()):
        trouble = _trouble(name, files)
        if written := growing(files):
            why = f"{_listed(written)} was written less than {settle_s:g} s ago"
            arrivals.waiting.append(Pair(name, tuple(files), why))
        elif trouble:
            arrivals.hostile.append(Pair(name, tuple(files), trouble))
        elif len(files) < 2:
            (file,) = files
            missing = "label" if file.path.startswith("imagesTr/") else "image"
            arrivals.waiting.append(Pair(name, (file,), f"its {missing} has not arrived"))
        elif unsettled:
            why = f"{_listed(unsettled)} was written less than {settle_s:g} s ago"
            arrivals.waiting.append(Pair(name, tuple(files), why))
        else:
            arrivals.ready.append(Pair(name, tuple(files)))
    return arrivals


def case_of(path: str) -> str | None:
    """The case whose image or label a path is, by its name alone; None for other files."""
    folder, _, name = path.partition("/")
    if "/" in name or name.startswith("."):
        return None
    if folder == "imagesTr" and name.endswith(IMAGE_ENDING):
        return name.removesuffix(IMAGE_ENDING)
    if folder == "labelsTr" and name.endswith(LABEL_ENDING):
        return name.removesuffix(LABEL_ENDING)
    return None


def is_hostile(path: str) -> bool:
    """Whether a path tries to leave its folder or hides characters from who reads it."""
    parts = PurePosixPath(path).parts
    return ".." in parts or "//" in path or "\\" in path or not path.isprintable()


def _trouble(name: str, files: list[InboxFile]) -> str:
    """Why files can never go in; empty where they may."""
    if strange := [file.path for file in files if not file.is_plain]:
        return f"{_listed(strange)} is a link or a device; copy the file itself into the inbox"
    if not CASE_NAME.fullmatch(name):
        return (
            f"the case name {name!a} cannot be used as a file name; wanted letters, digits, '-' "
            "and '_', at most 64, starting with a letter or digit: rename the files of the case"
        )
    return ""


def _listed(paths: list[str]) -> str:
    return ", ".join(path if path.isprintable() else ascii(path) for path in paths)
