"""Moves within the inbox, written down before the first, so that a killed run can be finished."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fullscale.ingestion.arrivals import Pair, case_of
from fullscale.ingestion.inbox import (
    ACCEPTED,
    IMAGE_ENDING,
    LABEL_ENDING,
    QUARANTINE,
    Inbox,
    InboxFile,
)
from fullscale.runtime.console import say
from fullscale.runtime.files import write_atomically
from fullscale.scans.cohort import CASE_NAME, safe_name

_PLAN = "moves.json"


def plan_moves(
    home: Path,
    inbox: Inbox,
    version: str,
    inside: Sequence[Pair],
    outside: Sequence[tuple[Pair, str]],
) -> None:
    """Write down where files of the inbox go.

    Args:
        home: folder of the plan.
        inbox: nothing is moved yet.
        version: MD5 of the data that hold the pairs of `inside`.
        inside: go to accepted/<version>/.
        outside: go to quarantine/<case>/, or <case>-2 and so on where that is taken, each with
            its reason in reason.txt beside it.
    """
    moves = [
        (file, f"{ACCEPTED}/{version[:8]}/{file.path}") for pair in inside for file in pair.files
    ]
    notes = {}
    taken = set[str]()
    for pair, why in outside:
        name = pair.name if CASE_NAME.fullmatch(pair.name) else safe_name(pair.name) or "unnamed"
        folder = _free_folder(inbox, name, taken)
        came = "\n".join(ascii(file.path) for file in pair.files)
        notes[f"{folder}/reason.txt"] = f"{why}\n\nArrived as\n{came}\n"
        moves += [(file, f"{folder}/{name}{_ending(file)}") for file in pair.files]
    plan = {
        "inbox": inbox.url,
        "notes": notes,
        "moves": [{"file": asdict(file), "target": target} for file, target in moves],
    }
    write_atomically(home / _PLAN, json.dumps(plan, indent=1) + "\n")


def is_interrupted(home: Path) -> bool:
    """Whether a run wrote down moves and did not make them all."""
    return (home / _PLAN).is_file()


def sort_away(home: Path) -> None:
    """Make the moves that are written down.

    A file that is not the one that was taken in any more stays in the inbox, as a new one.

    Raises:
        OSError: the inbox cannot be written; the plan stays, and the next run goes on with it.
    """
    plan = json.loads((home / _PLAN).read_text(encoding="utf-8"))
    inbox = Inbox(plan["inbox"])
    for path, text in plan["notes"].items():
        inbox.write(path, text)
    for move in plan["moves"]:
        file = InboxFile(**move["file"])
        found = inbox.find(file.path)
        if found == file:
            inbox.move(file.path, move["target"])
        elif found is not None:
            say(f"{file.path!a} was written again after it was read; it stays in the inbox")
    (home / _PLAN).unlink()


def _free_folder(inbox: Inbox, name: str, taken: set[str]) -> str:
    number = 1
    while True:
        folder = f"{QUARANTINE}/{name}" + (f"-{number}" if number > 1 else "")
        if folder not in taken and inbox.is_free(folder):
            taken.add(folder)
            return folder
        number += 1


def _ending(file: InboxFile) -> str:
    if case_of(file.path) is None:
        return ""
    return IMAGE_ENDING if file.path.startswith("imagesTr/") else LABEL_ENDING
