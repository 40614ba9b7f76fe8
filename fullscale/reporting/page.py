"""Render report.html."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from fullscale.reporting.results import Results
from fullscale.reporting.sections import (
    Section,
    verdict_words,
)
from fullscale.reporting.style import Picture

if TYPE_CHECKING:
    pass

PAGE = "report.html"


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


def _name_pictures(sections: list[Section]) -> dict[str, Picture]:
    named: dict[str, Picture] = {}
    for section in sections:
        shown = [*section.pictures, *(each for one in section.galleries for each in one.pictures)]
        named |= {f"{section.key}-{place}": each for place, each in enumerate(shown, start=1)}
    return named


def render(results: Results, sections: list[Section], title: str, notes: list[str]) -> str:
    """The page; all text is escaped.

    Args:
        results: for the verdict on top.
        sections: in order.
        title: of the page.
        notes: below the verdict.
    """
    environment = Environment(
        loader=PackageLoader("fullscale.reporting", package_path=""),
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
