"""Markdown tables, in GitHub's dialect."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def format_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table; cells are written as they are.

    Args:
        headings: one for each column.
        rows: one text for each column.
    """
    return [
        format_row(headings),
        f"|{'---|' * len(headings)}",
        *(format_row(cells) for cells in rows),
    ]


def format_row(cells: Sequence[str]) -> str:
    """Return the line of one row of a table."""
    return f"| {' | '.join(cells)} |"


def escape(text: str) -> str:
    """Return text with a backslash before each character that Markdown takes as markup."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", text)


def escape_pipes(markup: str) -> str:
    """Return Markdown with a backslash before each pipe, so that it fits one cell of a table."""
    return markup.replace("|", "\\|")
