"""Stage table: what the paper's tables say beside what the same rows measure on the cohort here."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pandas as pd

from scans.cohort import Case, read_cohort
from scans.files import write_atomically
from scans.volume import read_image
from tasks.comparison import Claim, Row, Setting, measure_claims, read_rows
from tasks.console import StageError, report_errors
from tasks.pictures import save_picture
from tasks.provenance import read_provenance
from tasks.report_format import number, p_value, with_interval
from tasks.table_picture import draw_table
from tasks.workspace import parse_command


def tabulate(rows: Sequence[Row], setting: Setting) -> pd.DataFrame:
    """A line for each row and organ; empty cells are what was not published or not measured."""
    return pd.DataFrame(
        {
            "network": row.network,
            "title": row.title,
            "encoder": row.encoder,
            "organ": organ,
            "published_dice": row.published[organ],
            "dice": row.measured("dice", organ),
            "dice_low": row.measured("dice_low", organ),
            "dice_high": row.measured("dice_high", organ),
            "num_cases": row.measured("num_cases", organ),
            "slice_fpr": row.measured("slice_fpr", organ),
            "voxel_fpr": row.measured("voxel_fpr", organ),
            "false_closings": row.measured("false_closings", organ),
            "closed_volume": row.measured("closed_volume", organ),
            "parameters": row.parameters or math.nan,
            "published_parameters_m": row.published_parameters_m,
            "gmac": row.gmac,
            "seconds_per_scan": row.seconds_per_scan,
            "cohort": setting.cohort,
            "on_lits": "measured" if setting.is_lits and not row.reason else "not run",
            "not_run_because": row.reason,
        }
        for row in rows
        for organ in setting.organs
    )


def write_markdown(rows: Sequence[Row], claims: Sequence[Claim], setting: Setting) -> str:
    """The tables for a reader: Dice of each organ, the paper's claims, what each network costs."""
    train, size_px = setting.params.train, setting.params.slice.size_px
    confidence = setting.params.register_.confidence
    dice_px = "Dice on LiTS" if setting.is_lits else "Dice here"
    lines = [
        "# The paper's rows",
        "",
        f"Cohort: {setting.cohort}, {setting.num_cases} test cases. Slices of {size_px} px, width "
        f"{train.width} (the paper: 320 px, 64), {train.num_epochs} epochs, {train.optimizer}, "
        f"seed {train.seed}. Commit {setting.provenance.git_commit}, data version "
        f"{setting.provenance.data_version}.",
        ""
        if setting.is_lits
        else "Not run on LiTS: figures here and published ones are of different scans, and not to "
        "be compared.",
    ]
    for organ in setting.organs:
        lines += ["", f"## {organ}", ""]
        lines += _grid(
            (
                "network", "encoder", "published Dice", f"{dice_px} ({confidence:.0%} interval)",
                "n", "slice FPR", "voxel FPR", "false closings", "Dice on LiTS",
            ),
            (_organ_cells(row, organ, setting) for row in rows),
        )  # fmt: skip
    lines += ["", "## What the paper says is better", ""]
    lines += _grid(
        (
            "what", "first", "second", f"gain in Dice ({confidence:.0%} interval)",
            "Wilcoxon p", "Holm p", "patients",
        ),
        (
            (
                claim.title, claim.better, claim.worse,
                with_interval(claim.gain.mean, claim.gain.low, claim.gain.high, 4, sign=True),
                p_value(claim.gain.p_value), p_value(claim.p_holm), str(claim.gain.num_patients),
            )
            for claim in claims
        ),
    )  # fmt: skip
    lines += ["", "## What they cost", ""]
    lines += _grid(
        (
            "network",
            "encoder",
            "parameters here (M)",
            "published (M)",
            "GMAC a slice",
            "seconds a scan",
        ),
        (_cost_cells(row) for row in rows),
    )
    lines += [
        "",
        f"Seconds: median of segmenting one scan of {setting.timed_slices} slices, on the machine "
        "that wrote this table; they differ from run to run. Published parameters are of width 64.",
    ]
    if absent := [row for row in rows if row.reason]:
        lines += ["", "## Not run", ""]
        lines += [f"- {row.title} ({row.encoder}): {row.reason}." for row in absent]
    return "\n".join(lines) + "\n"


def _organ_cells(row: Row, organ: str, setting: Setting) -> tuple[str, ...]:
    published = row.published[organ]
    named = (row.title, row.encoder, "none" if math.isnan(published) else f"{published:.4f}")
    if row.reason:
        return (*named, *["not run"] * 6)
    dice, low, high = (row.measured(f"dice{end}", organ) for end in ("", "_low", "_high"))
    closings = row.measured("false_closings", organ)
    return (
        *named,
        with_interval(dice, low, high, 4),
        number(row.measured("num_cases", organ), 0),
        number(row.measured("slice_fpr", organ), 4),
        number(row.measured("voxel_fpr", organ), 5),
        "no gate" if math.isnan(closings) else number(closings, 4),
        number(dice, 4) if setting.is_lits else "not run",
    )


def _cost_cells(row: Row) -> tuple[str, ...]:
    published_m = row.published_parameters_m
    published = "none" if math.isnan(published_m) else f"{published_m:.2f}"
    if row.reason:
        return (row.title, row.encoder, "not run", published, "not run", "not run")
    return (
        row.title,
        row.encoder,
        f"{row.parameters / 1e6:.2f}",
        published,
        f"{row.gmac:.2f}",
        f"{row.seconds_per_scan:.2f}",
    )


def _grid(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table in Markdown."""
    yield f"| {' | '.join(headings)} |"
    yield f"|{'---|' * len(headings)}"
    for cells in rows:
        yield f"| {' | '.join(cells)} |"


def choose_timed(cases: Sequence[Case]) -> Case:
    """The case of middle file size, so that the scan timed is neither the smallest nor largest."""
    ordered = sorted(cases, key=lambda case: (case.image.stat().st_size, case.name))
    return ordered[len(ordered) // 2]


@report_errors
def main() -> None:
    """Run the stage: `python -m tasks.table FOLDER --profile PIPELINE/PROFILE`."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    workspace = parse_command("table", sys.argv[2:])
    if folder is None or not workspace.profile:
        raise StageError("usage: python -m tasks.table FOLDER --profile paper/sample")
    params = workspace.load_params()
    cohort = read_cohort(workspace.root / "data")
    split = pd.read_csv(workspace.split, dtype=str)
    names = set(split.loc[split["fold"] == "test", "case"])
    tested = [case for case in cohort.cases if case.name in names]
    scan = read_image(choose_timed(tested).image)
    rows = read_rows(workspace, params, scan)
    setting = Setting(
        cohort=cohort.name,
        organs=tuple(params.organs),
        num_cases=len(tested),
        is_lits=all(case.source.startswith("lits:") for case in tested),
        params=params,
        timed_slices=len(scan.values_ZYX),
        provenance=read_provenance(workspace.root),
    )
    claims = measure_claims(workspace, params, rows)
    table = tabulate(rows, setting)
    write_atomically(folder / "table.csv", table.to_csv(index=False, float_format="%.6g"))
    write_atomically(folder / "table.md", write_markdown(rows, claims, setting))
    save_picture(draw_table(rows, setting), folder / "table.png")
    done = sum(not row.reason for row in rows)
    print(f"table: {done} of {len(rows)} rows were run; see {folder}/table.md")


if __name__ == "__main__":
    main()
