"""Render report.html."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fullscale.reporting.sections import ReportSection, verdict_words
from fullscale.reporting.style import Picture
from fullscale.runtime.templates import open_templates

if TYPE_CHECKING:
    from fullscale.reporting.results import Results

PAGE = "report.html"


@dataclass(frozen=True)
class Report:
    """A page that was written.

    Attributes:
        page: the HTML file.
        notes: messages for the reader.
        pictures: the pictures of the page in its order, by names such as "scores-1".
    """

    page: Path
    notes: tuple[str, ...]
    pictures: dict[str, Picture]


def name_pictures(sections: list[ReportSection]) -> dict[str, Picture]:
    """Return all pictures of the sections by names such as "scores-1"."""
    named: dict[str, Picture] = {}
    for section in sections:
        shown = [*section.pictures, *(each for one in section.galleries for each in one.pictures)]
        named |= {f"{section.key}-{place}": each for place, each in enumerate(shown, start=1)}
    return named


def render(results: Results, sections: list[ReportSection], title: str, notes: list[str]) -> str:
    """Return the page as HTML; all text is escaped.

    Args:
        results: for the verdict at the top.
        sections: in order.
        title: of the page.
        notes: below the verdict.
    """
    word, _, reason = verdict_words(results).partition(": ")
    status = "none" if results.verdict is None else results.verdict["status"]
    return render_page(sections, title, (status, word, reason), notes)


def render_page(
    sections: list[ReportSection], title: str, top: tuple[str, str, str], notes: list[str]
) -> str:
    """Return a page of sections as HTML; all text is escaped.

    Args:
        sections: in order.
        title: of the page.
        top: class, large word and small text of the box at the top.
        notes: below the box.
    """
    status, word, reason = top
    return (
        open_templates("fullscale.reporting")
        .get_template(PAGE)
        .render(
            title=title, status=status, word=word, reason=reason, notes=notes, sections=sections
        )
    )
