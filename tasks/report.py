"""The result of a run as one HTML page that needs nothing else: no script, font or file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from fullscale.params import Params, load_params
from fullscale.prediction.network_files import WEIGHTS_NAME
from fullscale.reporting.page import PAGE, Report, _name_pictures, render
from fullscale.reporting.provenance_section import find_changes, provenance_section
from fullscale.reporting.results import Results, read_results
from fullscale.reporting.sections import (
    Section,
    calibration_section,
    gate_section,
    learning_section,
    overlay_section,
    score_section,
    surface_section,
    verdict_section,
)
from fullscale.reporting.style import from_data_uri
from fullscale.runtime.errors import ScanError, StageError
from fullscale.runtime.files import file_sha256, write_atomically
from fullscale.versioning.provenance import read_provenance

if TYPE_CHECKING:
    from fullscale.tracking.store import Store

NOT_ASKED = "they were not asked for"


def write_report(root: Path, output: Path, *, with_overlays: bool) -> Report:
    """Write the page of the project at `root`.

    The same files and the same versions of code and libraries give the same bytes.

    Args:
        root: the project, after its stages ran.
        output: the HTML file.
        with_overlays: whether to segment and draw three test cases, which takes both trained
            networks and the scans. Where these are missing the page says so.

    Raises:
        StageError: params.yaml or a result is missing or damaged.
    """
    params = load_params(root / "params.yaml")
    results = read_results(root, params)
    provenance = read_provenance(root)
    notes = results.notes + find_changes(root, results, provenance)
    sections = [
        verdict_section(results, params),
        score_section(results, params),
        surface_section(results),
        _overlays(root, params, results) if with_overlays else overlay_section((), (), NOT_ASKED),
        gate_section(results),
        learning_section(results),
        calibration_section(results),
        provenance_section(root, results, params, provenance),
    ]
    title = f"{params.register_.model_name}: {results.candidate} against {results.baseline}"
    write_atomically(output, render(results, sections, title, notes))
    return Report(output, tuple(notes), _name_pictures(sections))


def track_report(report: Report, params: Params, root: Path, store: Store) -> str | None:
    """Add page and pictures to the run that trained the candidate, under `report/`.

    Returns:
        The run's id; None where the store knows no such run.
    """
    from fullscale.tracking.registry import add_files, find_training_run

    weights = root / "artifacts/train" / params.register_.candidate / WEIGHTS_NAME
    run_id = find_training_run(store, file_sha256(weights)) if weights.is_file() else None
    if run_id is not None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / PAGE).write_bytes(report.page.read_bytes())
            for key, picture in report.pictures.items():
                ending, content = from_data_uri(picture.uri)
                (folder / f"{key}.{ending}").write_bytes(content)
            add_files(store, run_id, folder, "report")
    return run_id


def _overlays(root: Path, params: Params, results: Results) -> Section:
    from fullscale.reporting.overlays import OUTLINES, draw_galleries

    names = ("truth", f"{results.baseline} (baseline)", f"{results.candidate} (candidate)")
    legend = tuple(zip(OUTLINES, names, strict=True))
    try:
        return overlay_section(draw_galleries(root, params, results), legend, None)
    except (StageError, ScanError) as error:
        return overlay_section((), (), str(error))
