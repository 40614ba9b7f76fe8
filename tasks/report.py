"""The result of a run as one HTML page that needs nothing else: no script, font or file."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from scans.errors import ScanError
from scans.files import file_sha256, write_atomically
from tasks.console import StageError
from tasks.params import Params, load_params
from tasks.provenance import read_provenance
from tasks.report_provenance import find_changes, provenance_section
from tasks.report_sections import (
    Section,
    calibration_section,
    gate_section,
    learning_section,
    overlay_section,
    score_section,
    surface_section,
)
from tasks.report_style import Picture, from_data_uri
from tasks.report_verdict import verdict_section, verdict_words
from tasks.results import Results, read_results
from tasks.trained import WEIGHTS_NAME

if TYPE_CHECKING:
    from tasks.tracking import Store

PAGE = "report.html"
NOT_ASKED = "they were not asked for"


@dataclass(frozen=True)
class Report:
    """A page that was written.

    Attributes:
        page: the HTML file.
        notes: what the reader must be told.
        pictures: what the page shows, by names such as "scores-1", in its order.
    """

    page: Path
    notes: tuple[str, ...]
    pictures: dict[str, Picture]


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


def _name_pictures(sections: list[Section]) -> dict[str, Picture]:
    named: dict[str, Picture] = {}
    for section in sections:
        shown = [*section.pictures, *(each for one in section.galleries for each in one.pictures)]
        named |= {f"{section.key}-{place}": each for place, each in enumerate(shown, start=1)}
    return named


def track_report(report: Report, params: Params, root: Path, store: Store) -> str | None:
    """Add page and pictures to the run that trained the candidate, under `report/`.

    Returns:
        The run's id; None where the store knows no such run.
    """
    from tasks.registry import add_files, find_training_run

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


def render(results: Results, sections: list[Section], title: str, notes: list[str]) -> str:
    """The page; all text is escaped.

    Args:
        results: for the verdict on top.
        sections: in order.
        title: of the page.
        notes: below the verdict.
    """
    environment = Environment(
        loader=PackageLoader("tasks", package_path=""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    word, _, reason = verdict_words(results).partition(": ")
    return environment.get_template(PAGE).render(
        title=title,
        status="none" if results.verdict is None else results.verdict["status"],
        word=word,
        reason=reason,
        notes=notes,
        sections=sections,
    )


def _overlays(root: Path, params: Params, results: Results) -> Section:
    from tasks.report_overlays import OUTLINES, draw_galleries

    names = ("truth", f"{results.baseline} (baseline)", f"{results.candidate} (candidate)")
    legend = tuple(zip(OUTLINES, names, strict=True))
    try:
        return overlay_section(draw_galleries(root, params, results), legend, None)
    except (StageError, ScanError) as error:
        return overlay_section((), (), str(error))
