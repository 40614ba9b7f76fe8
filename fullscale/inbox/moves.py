"""Move files within the inbox from a plan on disk, so that a killed run can be finished."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fullscale.inbox.arrivals import Pair, parse_case_name
from fullscale.inbox.inbox import (
    ACCEPTED,
    IMAGE_ENDING,
    LABEL_ENDING,
    QUARANTINE,
    Inbox,
    InboxFile,
)
from fullscale.ingestion.names import safe_name
from fullscale.runtime.files import write_json
from fullscale.scans.cohort import CASE_NAME

logger = logging.getLogger(__name__)

_PLAN = "moves.json"


def plan_moves(
    work_dir: Path,
    inbox: Inbox,
    version: str,
    accepted: Sequence[Pair],
    quarantined: Sequence[tuple[Pair, str]],
) -> None:
    """Write the plan of moves; move nothing yet.

    Args:
        work_dir: folder of the plan.
        inbox: the inbox that holds the pairs.
        version: MD5 of the data that hold the accepted pairs.
        accepted: pairs to move to accepted/<first 8 digits of version>/.
        quarantined: pairs and reasons. A pair moves to quarantine/<case>/, or to <case>-2, -3, ...
            if that exists, with its reason in reason.txt.
    """
    moves = [
        (file, f"{ACCEPTED}/{version[:8]}/{file.path}") for pair in accepted for file in pair.files
    ]
    notes = {}
    taken = set[str]()
    for pair, reason in quarantined:
        name = pair.name if CASE_NAME.fullmatch(pair.name) else safe_name(pair.name) or "unnamed"
        folder = _free_folder(inbox, name, taken)
        paths = "\n".join(repr(file.path) for file in pair.files)
        notes[f"{folder}/reason.txt"] = f"{reason}\n\nArrived as\n{paths}\n"
        moves += [(file, f"{folder}/{name}{_file_ending(file)}") for file in pair.files]
    plan = {
        "inbox": inbox.url,
        "notes": notes,
        "moves": [{"file": asdict(file), "target": target} for file, target in moves],
    }
    write_json(work_dir / _PLAN, plan)


def has_planned_moves(work_dir: Path) -> bool:
    """Return True if a run planned moves and did not finish them."""
    return (work_dir / _PLAN).is_file()


def make_moves(work_dir: Path) -> None:
    """Make the planned moves, then remove the plan; moves that were made already are skipped.

    A file that was written again after it was ingested stays in the inbox as a new file.

    Raises:
        OSError: the inbox cannot be written. The plan stays, and the next run continues it.
    """
    plan = json.loads((work_dir / _PLAN).read_text(encoding="utf-8"))
    inbox = Inbox(plan["inbox"])
    for path, text in plan["notes"].items():
        inbox.write(path, text)
    for move in plan["moves"]:
        file = InboxFile(**move["file"])
        found = inbox.find(file.path)
        if found == file:
            inbox.move(file.path, move["target"])
        elif found is not None:
            logger.warning(
                f"{file.path!r} was written again after it was read; it stays in the inbox"
            )
    (work_dir / _PLAN).unlink()


def _free_folder(inbox: Inbox, name: str, taken: set[str]) -> str:
    """Return a quarantine folder that neither exists nor is in `taken`, and add it there."""
    number = 1
    while True:
        folder = f"{QUARANTINE}/{name}" + (f"-{number}" if number > 1 else "")
        if folder not in taken and inbox.is_free(folder):
            taken.add(folder)
            return folder
        number += 1


def _file_ending(file: InboxFile) -> str:
    if parse_case_name(file.path) is None:
        return ""
    return IMAGE_ENDING if file.path.startswith("imagesTr/") else LABEL_ENDING
