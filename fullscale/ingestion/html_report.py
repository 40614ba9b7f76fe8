"""Render a validation report as one self-contained HTML file."""

from __future__ import annotations

from base64 import b64encode

from fullscale.ingestion.validate import COLOURS, HEADERS, ValidationReport
from fullscale.runtime.templates import open_templates
from fullscale.scans.checks import CHECKS

PAGE = "validation_report.html"


def render_html(report: ValidationReport) -> str:
    """Return a page with a summary, then thumbnail, facts and findings of every case.

    All text is escaped: folder, case and label names come from files that anybody may have made.

    Args:
        report: made with thumbnails; otherwise the page shows none.
    """
    environment = open_templates("fullscale.ingestion")
    environment.filters["base64"] = lambda content: b64encode(content).decode("ascii")
    counts = dict.fromkeys(("good", "warning", "refused"), 0)
    for row in report.rows:
        counts[row.verdict] += 1
    by_id = sorted(report.labels.items(), key=lambda item: item[1])
    return environment.get_template(PAGE).render(
        report=report,
        counts=counts,
        legend={name: _to_css(label_id) for name, label_id in by_id},
        headers=HEADERS,
        checks=CHECKS,
    )


def _to_css(label_id: int) -> str:
    """Return the colour of a label's outline in the thumbnails, as #rrggbb."""
    return "#" + "".join(f"{part:02x}" for part in COLOURS[(label_id - 1) % len(COLOURS)])
