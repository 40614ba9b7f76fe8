"""Propose parameters for a cohort and a machine, with a reason for each."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fullscale.runtime.console import report_errors, track

FILE_WIDTH = 120

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

    from fullscale.planning.planner import Plan
    from fullscale.workspace import Workspace


@report_errors
def command(
    hours: Annotated[
        float, typer.Option(min=0.01, help="Hours for all trainings of `dvc repro` together.")
    ] = 8.0,
    gpu: Annotated[
        str,
        typer.Option(
            help="auto: the GPU of this machine, if any. none: its CPU. Or a GPU elsewhere, such "
            "as a100; then epochs are not planned."
        ),
    ] = "auto",
    data: Annotated[Path, typer.Option(help="Folder of the cohort.")] = Path("data"),
    write: Annotated[
        bool,
        typer.Option(
            "--write",
            help="Change params.yaml. Comments, order and keys with the comment `# mine` stay.",
        ),
    ] = False,
) -> None:
    """Read parameters off the scans and this machine: values, reasons, times of the stages.

    Writes fingerprint.json and fingerprint.html to the folder of the reports.
    """
    from rich.console import Console

    from fullscale.planning.params_file import write_params
    from fullscale.workspace import open_workspace

    workspace = open_workspace(Path())
    found = plan(workspace, data, gpu, hours)
    # Files and pipes have no width; the table needs one in which the reasons fit.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else FILE_WIDTH)
    console.print(make_table(found))
    for line in describe(found):
        console.print(line, soft_wrap=True)
    if not write:
        console.print("params.yaml is as it was; `fullscale plan --write` changes it")
        return
    write_params(workspace.params_files[0], found.changes)
    console.print(
        f"params.yaml: {len(found.changes)} values changed; look at `git diff params.yaml`"
    )


def plan(workspace: Workspace, data: Path, gpu: str, hours: float) -> Plan:
    """Make a plan and write the fingerprint of the cohort.

    Args:
        workspace: its parameters are the ones to improve.
        data: the cohort.
        gpu: as `fullscale.planning.machine.find_machine` takes it.
        hours: of all trainings.

    Raises:
        ScanError: the cohort cannot be used.
        StageError: parameters or cohort leave nothing to plan, or time or memory are too small.
    """
    from fullscale.planning.fingerprint import NAME, write_fingerprint
    from fullscale.planning.fingerprint_page import write_page
    from fullscale.planning.machine import find_machine
    from fullscale.planning.params_file import find_mine
    from fullscale.planning.planner import plan_cohort
    from fullscale.runtime.cpu_kernels import fix_cpu_kernels
    from fullscale.runtime.startup import keep_freed_memory
    from fullscale.scans.cohort import read_cohort
    from fullscale.versioning.provenance import read_data_version

    keep_freed_memory()
    params = workspace.load_params()
    # Steps are measured with the arithmetic that stage train has.
    fix_cpu_kernels(params.train.cpu_kernels, params.train.num_threads)
    mine = find_mine(workspace.params_files[0].read_text(encoding="utf-8"))
    cohort = read_cohort(data)
    is_versioned = data.resolve() == workspace.data.resolve()
    data_version = "none"
    if is_versioned and workspace.data.with_suffix(".dvc").is_file():
        data_version = read_data_version(workspace.root)
    made = plan_cohort(cohort, data_version, params, mine, find_machine(gpu), hours, track)
    if is_versioned:
        write_fingerprint(workspace.reports / NAME, made.reading.fingerprint)
        write_page(workspace.reports, made.reading, cohort.name)
    return made


def make_table(plan: Plan) -> Table:
    """Return the table of parameters: value, value before, reason."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE)
    for heading in ("parameter", "now", "plan"):
        table.add_column(heading, no_wrap=True)
    table.add_column("reason")
    for each in plan.proposals:
        value = plain(each.value) if each.is_change else "as now"
        table.add_row(each.key, plain(each.before), value, each.reason)
    return table


def describe(plan: Plan) -> Iterator[str]:
    """Yield lines on the times of the stages and on what the plan cannot know."""
    for stage, seconds in plan.stages.items():
        yield f"{stage}: {'not known' if seconds is None else f'about {_duration(seconds)}'}"
    total = [seconds for seconds in plan.stages.values() if seconds is not None]
    if total and len(total) == len(plan.stages):
        yield f"all stages, one after the other: about {_duration(sum(total))}"
    yield from (f"not possible: {text}" for text in plan.impossible)
    yield from (f"not known: {text}" for text in plan.unknown)


def plain(value: object) -> str:
    """Return a parameter's value as the table shows it."""
    if isinstance(value, list):
        return f"[{', '.join(plain(each) for each in value)}]"
    if value is None:
        return "null"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
