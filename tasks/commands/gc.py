"""Remove what a project does not need any more: worktrees, DVC's cache, versions, copies."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fullscale.runtime.console import report_errors
from fullscale.runtime.errors import ScanError, StageError
from fullscale.runtime.files import file_stats

if TYPE_CHECKING:
    from fullscale.inbox.inbox import Inbox, InboxFile

MIB = 2**20
DAY_S = 24 * 60 * 60
KEPT_VERSIONS = 10
KEPT_DAYS = 30


@dataclass(frozen=True)
class Garbage:
    """Something that can be removed.

    Attributes:
        what: its kind and name.
        why: it is not needed.
        num_bytes: its size.
        remove: removes it; interrupted, it leaves the rest for the next call.
    """

    what: str
    why: str
    num_bytes: int
    remove: Callable[[], None]


@report_errors
def command(
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; else it is only listed.")] = False,
    keep_versions: Annotated[
        int, typer.Option(min=1, help="Newest registered versions that stay in any case.")
    ] = KEPT_VERSIONS,
    keep_days: Annotated[
        int, typer.Option(min=0, help="Days that sorted files stay in the inbox in any case.")
    ] = KEPT_DAYS,
) -> None:
    """List what is not needed any more, with its size; `--yes` removes it."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Column, Table

    console = Console()
    with ExitStack() as stack:
        found, notes = find_garbage(Path().resolve(), keep_versions, keep_days, stack)
        headings = (Column("what", overflow="fold"), "why", Column("MiB", justify="right"))
        table = Table(*headings, box=SIMPLE)
        for each in found:
            table.add_row(each.what, each.why, f"{each.num_bytes / MIB:.1f}")
        if found:
            console.print(table)
        for note in notes:
            typer.echo(f"gc: {note}")
        total = f"{sum(each.num_bytes for each in found) / MIB:.1f} MiB"
        if not yes:
            typer.echo(f"gc: {total} can be removed; `fullscale gc --yes` does it")
            return
        for each in found:
            each.remove()
            typer.echo(f"gc: removed {each.what}")
        typer.echo(f"gc: {total} removed")


def find_garbage(
    root: Path, num_kept: int, keep_days: int, stack: ExitStack
) -> tuple[list[Garbage], list[str]]:
    """Return what can be removed, and why something is left out.

    Args:
        root: the project.
        num_kept: newest registered versions that stay in any case.
        keep_days: how long sorted files stay in the inbox in any case.
        stack: keeps flows and the inbox still until it is closed.
    """
    parts = (
        partial(_find_in_cache, root, stack),
        partial(_find_versions, root, num_kept),
        partial(_find_copies, root, time.time() - keep_days * DAY_S, stack),
    )
    found, notes = list[Garbage](), list[str]()
    for part in parts:
        try:
            for each in part():
                found.append(each) if isinstance(each, Garbage) else notes.append(each)
        except (ScanError, StageError) as error:
            notes.append(f"left out: {error}")
    return found, notes


def _find_in_cache(root: Path, stack: ExitStack) -> Iterator[Garbage | str]:
    from fullscale.versioning.unused_objects import list_unused_objects, remove_unused_objects
    from fullscale.versioning.worktree import (
        describe_unfinished,
        hold_checkouts,
        remove_checkout,
    )

    checkouts = stack.enter_context(hold_checkouts(root))
    kept = []
    for folder in checkouts:
        if unfinished := describe_unfinished(folder) or _describe_unsent(folder):
            kept.append(folder)
            yield f"worktree {folder.name} stays: it has {unfinished}"
            continue
        why = "nothing is unfinished in it; the next run makes it again"
        remove = partial(remove_checkout, root, folder)
        yield Garbage(f"worktree {folder.name}", why, _own_bytes(folder), remove)
    if objects := list_unused_objects(root, checkouts):
        yield Garbage(
            f"{len(objects)} objects in DVC's cache",
            "no branch, tag, experiment or folder of the project uses them",
            sum(path.stat().st_size for path in objects),
            partial(remove_unused_objects, root, kept),
        )


def _own_bytes(folder: Path) -> int:
    """Return what removing a worktree frees: its hard links to DVC's cache free nothing."""
    return sum(each.st_size for each in file_stats(folder) if each.st_nlink == 1)


def _describe_unsent(folder: Path) -> str:
    """Return what of a worktree's trainings MLflow does not have yet."""
    from fullscale.tracking.run_record import list_records

    places = {path.parent.parent for path in (folder / ".cache").rglob("run.json")}
    if all(record.is_sent() for place in places for record in list_records(place)):
        return ""
    return "values that MLflow does not have yet"


def _find_versions(root: Path, num_kept: int) -> Iterator[Garbage]:
    from fullscale.params import load_params
    from fullscale.tracking.retired import find_retired, remove_retired
    from fullscale.tracking.store import default_store, has_store

    if not has_store(root):
        return
    store = default_store(root)
    model_name = load_params(root / "params.yaml").register_.model_name
    for each in find_retired(store, model_name, num_kept):
        yield Garbage(
            f"{each.name} version {each.version}",
            f"no alias, never champion, not among the newest {num_kept}, nothing added by hand",
            each.num_bytes,
            partial(remove_retired, store, each),
        )


def _find_copies(root: Path, before_s: float, stack: ExitStack) -> Iterator[Garbage | str]:
    from fullscale.inbox.inbox import LOCK, WORK_DIR, Inbox, inbox_url
    from fullscale.inbox.moves import has_planned_moves
    from fullscale.inbox.sorted_copies import find_copies
    from fullscale.runtime.locks import acquire_lock
    from fullscale.scans.cohort import read_cohort

    stack.enter_context(acquire_lock(root / LOCK, wait=False))
    if has_planned_moves(root / WORK_DIR):
        yield "the inbox is left out: files are still to be moved, which its next run does"
        return
    inbox = Inbox(inbox_url(root, os.environ))
    cases = {case.name for case in read_cohort(root / "data").cases}
    for each in find_copies(inbox, cases, before_s):
        size = sum(file.size for file in each.files)
        yield Garbage(f"inbox {each.folder}", each.why, size, partial(_remove, inbox, each.files))


def _remove(inbox: Inbox, files: Sequence[InboxFile]) -> None:
    for file in files:
        inbox.remove(file)
