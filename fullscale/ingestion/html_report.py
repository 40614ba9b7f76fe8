"""A validation report as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from html import escape

from fullscale.ingestion.thumbnail import COLOURS
from fullscale.ingestion.validate import HEADERS, CaseRow, ValidationReport
from fullscale.scans.checks import CHECKS

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; color: #222;
  padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #ddd;
  vertical-align: top; }
th { position: sticky; top: 0; background: #fff; }
img { display: block; background: #000; }
.good { color: #17703c; } .warning { color: #8a5a00; } .refused { color: #b3261e; }
.note { color: #555; } code { background: #f2f2f2; padding: 0 .25rem; }
ul { margin: .2rem 0; padding-left: 1.1rem; } .swatch { font-weight: bold; }
"""


def render_html(report: ValidationReport) -> str:
    """One page: a summary, then a row with picture, facts and findings for every case.

    Args:
        report: made with thumbnails, or the page has none.
    """
    counts = dict.fromkeys(("good", "warning", "refused"), 0)
    for row in report.rows:
        counts[row.verdict] += 1
    summary = ", ".join(
        f'<span class="{verdict}">{count} {verdict}</span>' for verdict, count in counts.items()
    )
    heads = "".join(f"<th>{escape(head)}</th>" for head in ("", *HEADERS))
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f"<title>Scans in {escape(report.folder)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>Scans in {escape(report.folder)}</h1>",
            f"<p>Layout {escape(report.layout)}; {len(report.rows)} cases: {summary}.</p>",
            f"<p>Labels: {_legend(report)}.</p>",
            f"<table><thead><tr>{heads}</tr></thead><tbody>",
            *(_row(row) for row in report.rows),
            "</tbody></table></body></html>",
            "",
        ]
    )


def _legend(report: ValidationReport) -> str:
    parts = []
    for name, label_id in sorted(report.labels.items(), key=lambda item: item[1]):
        colour = "#" + "".join(f"{part:02x}" for part in COLOURS[(label_id - 1) % len(COLOURS)])
        parts.append(f'<span class="swatch" style="color:{colour}">{escape(name)}</span>')
    return ", ".join(parts)


def _row(row: CaseRow) -> str:
    cells = [_picture(row)]
    for head, text in zip(HEADERS, row.to_cells(), strict=True):
        style = f' class="{row.verdict}"' if head == "verdict" else ""
        cells.append(f"<td{style}>{escape(text)}</td>")
    body = f"<tr>{''.join(cells)}</tr>"
    if row.findings:
        items = "".join(
            f'<li><code>{escape(finding.code)}</code> <b class="{finding.severity}">'
            f"{escape(CHECKS[finding.code].title)}</b>. Found {escape(finding.found)}; wanted "
            f"{escape(finding.wanted)}; {escape(finding.cure)}.</li>"
            for finding in row.findings
        )
        body += f'<tr><td></td><td colspan="{len(HEADERS)}"><ul>{items}</ul></td></tr>'
    return body


def _picture(row: CaseRow) -> str:
    if row.thumbnail is None:
        return "<td></td>"
    content = base64.b64encode(row.thumbnail).decode("ascii")
    return f'<td><img alt="{escape(row.case)}" src="data:image/png;base64,{content}"></td>'
