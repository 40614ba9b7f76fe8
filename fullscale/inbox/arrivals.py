"""Find the pairs in the inbox that are complete, and the reason why any other file is not used."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from fullscale.inbox.inbox import IMAGE_ENDING, LABEL_ENDING, TABLES, Inbox, InboxFile
from fullscale.runtime.errors import ScanError, StageError
from fullscale.scans.cohort import CASE_NAME, read_source_rows

LISTING_INTERVAL_S = 1.0


@dataclass(frozen=True)
class Pair:
    """The files of one case in the inbox.

    Attributes:
        name: name of the case as the file names give it; checked to be safe only if the pair is
            ready.
        files: image and label if the pair is ready, otherwise the files found.
        reason: why the pair waits or is unsafe; empty if it is ready.
    """

    name: str
    files: tuple[InboxFile, ...]
    reason: str = ""


@dataclass
class Arrivals:
    """The content of the inbox.

    Attributes:
        ready: complete pairs that have stopped changing.
        waiting: pairs and files that stay in the inbox for now.
        unsafe: pairs that can never be ingested: an unsafe name, a link or a device.
        tables: dataset.json and cases.csv, if present.
    """

    ready: list[Pair] = field(default_factory=list)
    waiting: list[Pair] = field(default_factory=list)
    unsafe: list[Pair] = field(default_factory=list)
    tables: list[InboxFile] = field(default_factory=list)


def list_arrivals(inbox: Inbox, settle_s: float, landing: Path) -> Arrivals:
    """List the inbox twice and classify its files.

    Args:
        inbox: only read.
        settle_s: a file counts as complete if it was not written for this long, in seconds.
        landing: local folder, emptied first; receives the inbox's tables if any pair is ready.

    Raises:
        StageError: the inbox is missing, or its cases.csv cannot be used.
    """
    shutil.rmtree(landing, ignore_errors=True)
    before = inbox.list_files()
    if not before:
        return Arrivals()
    # Two listings also find files whose clock or modification time cannot be trusted.
    time.sleep(min(settle_s, LISTING_INTERVAL_S))
    arrivals = classify_files(before, inbox.list_files(), time.time(), settle_s)
    if not arrivals.ready:
        return arrivals
    for table in arrivals.tables:
        if not table.is_plain:
            raise StageError(f"{table.path} in {inbox.url} is a link; put the file itself there")
        inbox.read(table.path, landing / table.path)
    try:
        rows = read_source_rows(landing)
    except ScanError as error:
        raise StageError(f"cases.csv in {inbox.url} cannot be used: {error}") from None
    if rows is None:
        return arrivals
    for pair in arrivals.ready:
        if (num_rows := len(rows.get(pair.name, ()))) != 1:
            reason = "has no row for it" if not num_rows else "has several rows for it that differ"
            reason = f"cases.csv {reason}, so its patient is not known"
            arrivals.waiting.append(Pair(pair.name, pair.files, reason))
    arrivals.ready = [pair for pair in arrivals.ready if len(rows.get(pair.name, ())) == 1]
    return arrivals


def classify_files(
    before: Mapping[str, InboxFile], now: Mapping[str, InboxFile], now_s: float, settle_s: float
) -> Arrivals:
    """Sort the files of two listings into ready, waiting and unsafe pairs.

    Args:
        before: files of the first listing, by path.
        now: files of the second listing; a file that differs from the first is still written.
        now_s: current time, in seconds since 1970.
        settle_s: a file counts as complete if it was not written for this long, in seconds.
    """
    arrivals = Arrivals()
    cases: dict[str, list[InboxFile]] = {}
    for path, file in now.items():
        name = parse_case_name(path)
        if path in TABLES:
            arrivals.tables.append(file)
        elif name is None and not is_unsafe_path(path) and file.is_plain:
            text = "neither imagesTr/<case>_0000.nii.gz nor labelsTr/<case>.nii.gz"
            arrivals.waiting.append(Pair(path, (file,), text))
        else:
            # The prefix keeps a path apart from a case of the same name.
            cases.setdefault(f"./{path}" if name is None else name, []).append(file)

    def changing(files: list[InboxFile]) -> list[str]:
        return [
            file.path
            for file in files
            if before.get(file.path) != file or now_s - file.modified_s < settle_s
        ]

    changing_tables = changing(arrivals.tables)
    for name, files in sorted(cases.items()):
        danger = _find_danger(name, files)
        if written := changing(files):
            reason = f"{_join_paths(written)} was written less than {settle_s:g} s ago"
            arrivals.waiting.append(Pair(name, tuple(files), reason))
        elif danger:
            arrivals.unsafe.append(Pair(name, tuple(files), danger))
        elif len(files) < 2:
            (file,) = files
            missing = "label" if file.path.startswith("imagesTr/") else "image"
            arrivals.waiting.append(Pair(name, (file,), f"its {missing} has not arrived"))
        elif changing_tables:
            reason = f"{_join_paths(changing_tables)} was written less than {settle_s:g} s ago"
            arrivals.waiting.append(Pair(name, tuple(files), reason))
        else:
            arrivals.ready.append(Pair(name, tuple(files)))
    return arrivals


def parse_case_name(path: str) -> str | None:
    """Return the case that a path is the image or label of; None for any other file."""
    folder, _, name = path.partition("/")
    if "/" in name or name.startswith("."):
        return None
    if folder == "imagesTr" and name.endswith(IMAGE_ENDING):
        return name.removesuffix(IMAGE_ENDING)
    if folder == "labelsTr" and name.endswith(LABEL_ENDING):
        return name.removesuffix(LABEL_ENDING)
    return None


def is_unsafe_path(path: str) -> bool:
    """Return True if a path leaves its folder or holds characters that hide its true name."""
    parts = PurePosixPath(path).parts
    return ".." in parts or "//" in path or "\\" in path or not path.isprintable()


def _find_danger(name: str, files: list[InboxFile]) -> str:
    """Return why the files can never be ingested; an empty text if they can."""
    if special := [file.path for file in files if not file.is_plain]:
        return f"{_join_paths(special)} is a link or a device; copy the file itself into the inbox"
    if not CASE_NAME.fullmatch(name):
        return (
            f"the case name {name!r} cannot be used as a file name; wanted letters, digits, '-' "
            "and '_', at most 64, starting with a letter or digit: rename the files of the case"
        )
    return ""


def _join_paths(paths: list[str]) -> str:
    return ", ".join(path if path.isprintable() else ascii(path) for path in paths)
