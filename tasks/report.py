"""Write the result of a run as one self-contained HTML page, without scripts, fonts or links."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from fullscale.planning.fingerprint import NAME, read_fingerprint
from fullscale.planning.fingerprint_page import fingerprint_section
from fullscale.reporting.page import PAGE, Report, name_pictures, render
from fullscale.reporting.provenance_section import find_changes, provenance_section
from fullscale.reporting.sections import (
    ReportSection,
    calibration_section,
    classifier_section,
    learning_section,
    overlay_section,
    score_section,
    surface_section,
    verdict_section,
    verdict_words,
)
from fullscale.reporting.style import from_data_uri
from fullscale.runtime.errors import ScanError, StageError
from fullscale.runtime.files import write_atomically
from fullscale.versioning.provenance import read_provenance

if TYPE_CHECKING:
    from fullscale.params import Params
    from fullscale.reporting.results import Results
    from fullscale.tracking.store import Store
    from fullscale.workspace import Workspace


def write_report(results: Results, params: Params, output: Path, *, with_overlays: bool) -> Report:
    """Write the page of a pipeline's results.

    The same files and the same versions of code and libraries give the same bytes.

    Args:
        results: as `read_results` returns them.
        params: the parameters of the pipeline.
        output: the HTML file.
        with_overlays: segment and draw three test cases, which needs both trained networks and the
            scans. If these are missing, the page names the reason.

    Raises:
        StageError: the versions of code and data cannot be read.
    """
    provenance = read_provenance(results.workspace.root)
    notes = results.notes + find_changes(results, provenance)
    sections = [
        verdict_section(results, params),
        score_section(results, params),
        surface_section(results),
        _draw_overlays(results, params)
        if with_overlays
        else overlay_section((), (), "they were not requested"),
        classifier_section(results),
        learning_section(results),
        calibration_section(results),
        fingerprint_section(
            read_fingerprint(results.workspace.root / "reports" / NAME), provenance.data_version
        ),
        provenance_section(results, params, provenance),
    ]
    subject = results.workspace.profile or params.register_.model_name
    status = "none" if results.verdict is None else results.verdict["status"]
    title = f"{subject}: {results.candidate} against {results.baseline}"
    write_atomically(output, render(sections, title, notes, status, verdict_words(results)))
    return Report(output, tuple(notes), name_pictures(sections))


def track_report(report: Report, params: Params, workspace: Workspace, store: Store) -> str | None:
    """Add page and pictures to the run of what is registered of the candidate, under `report/`.

    Returns:
        The run's id; None if the store has no such run.
    """
    from fullscale.prediction.network_files import (
        WEIGHTS_NAME,
        choose_deployed,
        digest_weights,
    )
    from fullscale.tracking.registry import add_files, find_training_run

    trainings = workspace.trainings(params.register_.candidate, params.seeds)
    run_id = None
    if all((folder / WEIGHTS_NAME).is_file() for folder in trainings):
        digest = digest_weights(choose_deployed(trainings, params.register_.deploy))
        run_id = find_training_run(store, digest)
    if run_id is not None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / PAGE).write_bytes(report.page.read_bytes())
            for key, picture in report.pictures.items():
                suffix, content = from_data_uri(picture.uri)
                (folder / f"{key}.{suffix}").write_bytes(content)
            add_files(store, run_id, folder, "report")
    return run_id


def _draw_overlays(results: Results, params: Params) -> ReportSection:
    from fullscale.reporting.overlays import STYLES, draw_galleries

    names = ("truth", f"{results.baseline} (baseline)", f"{results.candidate} (candidate)")
    legend = tuple(zip(STYLES, names, strict=True))
    try:
        return overlay_section(draw_galleries(results, params), legend, None)
    except (StageError, ScanError) as error:
        return overlay_section((), (), str(error))
