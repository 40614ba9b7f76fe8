"""Render report.html."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fullscale.reporting.sections import ReportSection
from fullscale.reporting.style import Picture
from fullscale.runtime.templates import open_templates

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


def render(
    sections: list[ReportSection], title: str, notes: list[str], status: str, headline: str
) -> str:
    """Return the page as HTML; all text is escaped.

    Args:
        sections: in order.
        title: of the page.
        notes: below the headline.
        status: sets the colour of the headline: pass, fail, undecided or none.
        headline: at the top: a word, ": " and a sentence.
    """
    word, _, reason = headline.partition(": ")
    return (
        open_templates("fullscale.reporting")
        .get_template(PAGE)
        .render(
            title=title, status=status, word=word, reason=reason, notes=notes, sections=sections
        )
    )
