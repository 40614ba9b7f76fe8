"""Generate the tables of docs/data.md from the tables that the code uses.

python -m fullscale.ingestion.reference_tables docs/data.md
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fullscale.ingestion.layouts import LAYOUTS
from fullscale.runtime.files import write_atomically
from fullscale.runtime.markdown import escape_pipes, format_table
from fullscale.scans.checks import CHECKS


def layouts_table() -> str:
    """Return a Markdown table with one row per layout."""
    rows = [
        (f"`{layout.name}`", layout.title, layout.files, layout.notes)
        for layout in LAYOUTS.values()
    ]
    return _table(("`--layout`", "what", "files", "labels and notes"), rows)


def checks_table() -> str:
    """Return a Markdown table with one row per check, the most severe first."""
    order = ("refused", "warning", "note")
    checks = sorted(CHECKS.values(), key=lambda check: order.index(check.severity))
    rows = [
        (
            f"`{check.code}`",
            check.severity + (", or `--accept`" if check.is_judgement else ""),
            *(check.title, check.wanted, check.cure),
        )
        for check in checks
    ]
    return _table(("code", "severity", "what is wrong", "wanted", "cure"), rows)


def fill_tables(text: str) -> str:
    """Return the text with the tables between its markers replaced.

    Raises:
        ValueError: a marker is missing.
    """
    for name, table in (("layouts", layouts_table()), ("checks", checks_table())):
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        if start not in text or end not in text:
            raise ValueError(f"the markers {start.strip()} and {end} are missing")
        before, rest = text.split(start, 1)
        text = before + start + table + end + rest.split(end, 1)[1]
    return text


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = format_table(heads, [[escape_pipes(cell) for cell in row] for row in rows])
    return "\n".join(lines) + "\n"


def main() -> None:
    """Update the tables of the file on the command line."""
    path = Path(sys.argv[1])
    write_atomically(path, fill_tables(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
