"""Stage slice: resample the annotated scans to memory-mapped slices."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fullscale.label_names import resolve_organs
from fullscale.params import Params
from fullscale.runtime.console import report_errors, track
from fullscale.runtime.errors import ScanError, StageError
from fullscale.scans.cohort import Case, Cohort, read_cohort
from fullscale.scans.parallel import Compute, map_cases
from fullscale.scans.slice_store import SliceStore
from fullscale.scans.slice_writer import SliceRecipe, clear_store, write_case, write_tables
from fullscale.versioning.provenance import warn_of_uncommitted_data
from fullscale.workspace import parse_command

logger = logging.getLogger(__name__)

CACHE_DIR = Path(".cache/slices")


@dataclass(frozen=True)
class SliceSummary:
    """The result of the stage.

    Attributes:
        num_cases: number of cases in the store.
        num_slices: number of slices in the store.
        num_sliced: number of cases sliced now; the others came from the cache.
        num_lost: number of voxels outside the slices, by case and organ, where there are any.
    """

    num_cases: int
    num_slices: int
    num_sliced: int
    num_lost: dict[str, dict[str, int]]


def slice_cohort(
    data_dir: Path, output_dir: Path, params: Params, cache_dir: Path | None = None
) -> SliceSummary:
    """Slice every case of a cohort into a slice store.

    A bad case does not end the run: the others are sliced first, and come from the cache when the
    stage runs again.

    Args:
        data_dir: folder of the cohort.
        output_dir: folder of the store; its tables are written only if every case was sliced.
        params: the sections organs, slice and compute are used.
        cache_dir: cache of slices; None uses no cache.

    Raises:
        ScanError: the cohort cannot be used.
        StageError: params name a label that the cohort does not have, or cases cannot be sliced;
            the message names all of them.
    """
    cohort = read_cohort(data_dir.resolve())
    _check_cases(cohort)
    recipe = SliceRecipe(
        organs=resolve_organs(params.organs, cohort.labels),
        size_px=params.slice.size_px,
        pixel_mm=params.slice.pixel_mm,
        window_hu=params.slice.window_hu,
        body_threshold_hu=params.slice.body_threshold_hu,
    )
    clear_store(output_dir, {case.name for case in cohort.cases}, cache_dir)
    work = partial(
        _slice_one,
        cohort=Cohort(cohort.root, cohort.name, cohort.labels, ()),  # small to send to workers
        root=output_dir.resolve(),
        recipe=recipe,
        cache_dir=None if cache_dir is None else cache_dir.resolve(),
    )
    compute = Compute(params.compute.backend, params.compute.address, params.compute.num_workers)
    results = map_cases(work, cohort.cases, compute)
    was_sliced = list(track(results, "slice", len(cohort.cases)))
    failed = [str(result) for result in was_sliced if isinstance(result, ScanError)]
    if failed:
        raise StageError(
            f"{len(failed)} of {len(cohort.cases)} cases cannot be sliced: " + " | ".join(failed)
        )
    training_only = {case.name for case in cohort.cases if case.training_only}
    write_tables(output_dir, [case.name for case in cohort.cases], recipe, training_only)
    store = SliceStore(output_dir)
    cases = store.cases
    lossy = cases.loc[cases["num_lost"] > 0, "case"]
    return SliceSummary(
        num_cases=len(cases),
        num_slices=int(cases["num_slices"].sum()),
        num_sliced=sum(result is True for result in was_sliced),
        num_lost={case: store.load(case).num_lost for case in lossy},
    )


def _slice_one(
    case: Case, *, cohort: Cohort, root: Path, recipe: SliceRecipe, cache_dir: Path | None
) -> bool | ScanError:
    """Slice one case in a worker; return `write_case`'s result, or the error with the case name."""
    annotated = cohort.annotated_organs(case, recipe.organs)
    try:
        return write_case(root, case, annotated, recipe, cache_dir)
    except ScanError as error:
        return ScanError(error.code, f"{case.name}: {error.found}", error.wanted, error.cure)


def _check_cases(cohort: Cohort) -> None:
    if not cohort.cases:
        raise StageError(
            f"{cohort.root.name}/cases.csv has no case; bring scans in with "
            "`fullscale ingest SOURCE`"
        )


@report_errors
def main() -> None:
    """Run the stage: data/ -> artifacts/slices."""
    workspace = parse_command("slice", sys.argv[1:])
    root, params = workspace.root, workspace.load_params()
    if warning := warn_of_uncommitted_data(root):
        logger.warning(warning)
    summary = slice_cohort(root / "data", workspace.slices, params, root / CACHE_DIR)
    print(
        f"slice: {summary.num_cases} cases, {summary.num_slices} slices; "
        f"{summary.num_sliced} cases sliced now, the others unchanged"
    )
    for case, num_lost in summary.num_lost.items():
        lost = ", ".join(f"{count} of {organ}" for organ, count in num_lost.items() if count)
        print(f"slice: {case}: voxels outside the slices: {lost}; enlarge slice.size_px")


if __name__ == "__main__":
    main()
