"""Stage slice: from the annotated scans to memory-mapped slices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scans.cohort import read_cohort
from scans.store import SliceRecipe, write_case, write_tables
from tasks.console import StageError, report_errors, track
from tasks.params import Params, load_params

DATA_DIR = Path("data")
OUTPUT_DIR = Path("artifacts/slices")


@dataclass(frozen=True)
class SliceSummary:
    """What the stage did: number of cases and slices, and organ voxels outside the slices."""

    num_cases: int
    num_slices: int
    num_lost: dict[str, int]


def slice_cohort(data_dir: Path, output_dir: Path, params: Params) -> SliceSummary:
    """Slice every case of a cohort into a slice store.

    Args:
        data_dir: the cohort.
        output_dir: the store.
        params: sections organs and slice.

    Raises:
        ScanError: the cohort, or a scan in it, cannot be used.
        StageError: params name a label that the cohort does not have.
    """
    cohort = read_cohort(data_dir)
    for organ, label_ids in params.organs.items():
        if unknown := set(label_ids) - set(cohort.labels.values()):
            raise StageError(
                f"organs.{organ} names label ids {sorted(unknown)}, but {data_dir}/dataset.json "
                f"has {cohort.labels}; correct organs in params.yaml"
            )
    recipe = SliceRecipe(
        organs=params.organs,
        size_px=params.slice.size_px,
        window_hu=params.slice.window_hu,
        body_threshold_hu=params.slice.body_threshold_hu,
        body_margin_mm=params.slice.body_margin_mm,
    )
    num_lost = {}
    for case in track(cohort.cases, "slice", len(cohort.cases)):
        annotated = cohort.annotated_organs(case, params.organs)
        about = write_case(output_dir, case, annotated, recipe)
        if about["num_lost"]:
            num_lost[case.name] = int(about["num_lost"])
    index = write_tables(output_dir, [case.name for case in cohort.cases], recipe)
    return SliceSummary(len(cohort.cases), len(index), num_lost)


@report_errors
def main() -> None:
    """Run the stage on data/ with params.yaml."""
    summary = slice_cohort(DATA_DIR, OUTPUT_DIR, load_params(Path("params.yaml")))
    print(f"slice: {summary.num_cases} cases, {summary.num_slices} slices")
    for case, count in summary.num_lost.items():
        print(f"slice: {case}: {count} organ voxels lie outside the slices")


if __name__ == "__main__":
    main()
