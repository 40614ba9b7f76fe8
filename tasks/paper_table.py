"""Stage paper_table: the values of the paper's tables, and those measured on this cohort."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fullscale.patient_split import cases_of, read_split
from fullscale.reporting.paper_rows import Setting, measure_claims, read_rows
from fullscale.reporting.paper_table import draw_table, tabulate_rows, write_markdown
from fullscale.runtime.console import report_errors
from fullscale.runtime.errors import StageError
from fullscale.runtime.files import save_picture, write_atomically
from fullscale.scans.cohort import Case, read_cohort
from fullscale.scans.volume import read_image
from fullscale.versioning.provenance import read_provenance
from fullscale.workspace import parse_command


def choose_timed(cases: Sequence[Case]) -> Case:
    """Return the case of median file size, whose scan is timed."""
    ordered = sorted(cases, key=lambda case: (case.image.stat().st_size, case.name))
    return ordered[len(ordered) // 2]


@report_errors
def main() -> None:
    """Run the stage: `python -m tasks.paper_table FOLDER --profile PIPELINE/PROFILE`."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    workspace = parse_command("paper_table", sys.argv[2:])
    if folder is None or not workspace.profile:
        raise StageError("usage: python -m tasks.paper_table FOLDER --profile paper/sample")
    params = workspace.load_params()
    cohort = read_cohort(workspace.data)
    names = set(cases_of(read_split(workspace.split), "test"))
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
    table = tabulate_rows(rows, setting)
    write_atomically(folder / "table.csv", table.to_csv(index=False, float_format="%.6g"))
    write_atomically(folder / "table.md", write_markdown(rows, claims, setting))
    save_picture(draw_table(rows, setting), folder / "table.png")
    done = sum(not row.reason for row in rows)
    print(f"table: {done} of {len(rows)} rows were run; see {folder}/table.md")


if __name__ == "__main__":
    main()
