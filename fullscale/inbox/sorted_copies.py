"""Old files in accepted/ and quarantine/ of an inbox whose cases are in the data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from fullscale.inbox.inbox import (
    ACCEPTED,
    IMAGE_ENDING,
    LABEL_ENDING,
    QUARANTINE,
    Inbox,
    InboxFile,
)


@dataclass(frozen=True)
class Copies:
    """Files of one folder that may be removed together.

    Attributes:
        folder: accepted/VERSION or quarantine/CASE.
        files: relative to the inbox.
        why: they are not needed.
    """

    folder: str
    files: tuple[InboxFile, ...]
    why: str


def find_copies(inbox: Inbox, cases: Collection[str], before_s: float) -> list[Copies]:
    """Return copies of scans that are in the data, by folder.

    A pair in accepted/ goes if its case is in the data. A folder in quarantine/ goes if, besides,
    the case was accepted after it had been refused.

    Args:
        inbox: only read.
        cases: names of the cases in the data.
        before_s: files that were moved later than this stay; seconds since 1970.
    """
    folders = defaultdict[str, list[InboxFile]](list)
    accepted_s = dict[str, float]()
    for file in inbox.list_sorted():
        top, folder, *_ = file.path.split("/")
        case = _case(file)
        if top == QUARANTINE:
            folders[f"{top}/{folder}"].append(file)
        elif case in cases and file.modified_s <= before_s:
            folders[f"{top}/{folder}"].append(file)
            accepted_s[case] = max(file.modified_s, accepted_s.get(case, 0.0))
    found = []
    for folder, files in sorted(folders.items()):
        if folder.startswith(f"{ACCEPTED}/"):
            found.append(Copies(folder, tuple(files), "originals of cases that are in data/"))
            continue
        refused_s = max(file.modified_s for file in files)
        names = {_case(file) for file in files} - {""}
        if names and all(refused_s < accepted_s.get(name, 0.0) for name in names):
            why = "refused, and accepted later: the case is in data/"
            found.append(Copies(folder, tuple(files), why))
    return found


def _case(file: InboxFile) -> str:
    """Return the case of a sorted file; "" for a note."""
    name = file.path.rpartition("/")[2]
    for ending in (IMAGE_ENDING, LABEL_ENDING):
        if name.endswith(ending):
            return name.removesuffix(ending)
    return ""
