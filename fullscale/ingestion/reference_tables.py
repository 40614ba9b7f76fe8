"""The tables of docs/data.md, made from the tables the code uses.

python -m fullscale.ingestion.reference_tables docs/data.md
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fullscale.ingestion.layouts import LAYOUTS
from fullscale.runtime.files import write_atomically
from fullscale.scans.checks import CHECKS


def layouts_table() -> str:
    """Every layout as a row of a Markdown table."""
    rows = [
        (f"`{layout.name}`", layout.title, layout.files, layout.notes)
        for layout in LAYOUTS.values()
    ]
    return _table(("`--layout`", "what", "files", "labels and notes"), rows)


def checks_table() -> str:
    """Every check as a row of a Markdown table, the gravest first."""
    order = ("refused", "warning", "note")
    checks = sorted(CHECKS.values(), key=lambda check: order.index(check.severity))
    rows = [
        (f"`{check.code}`", check.severity, check.title, check.wanted, check.cure)
        for check in checks
    ]
    return _table(("code", "severity", "what is wrong", "wanted", "cure"), rows)


def fill_tables(text: str) -> str:
    """The text with the tables between its markers made anew.

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
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "".join(
        "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |\n" for line in lines
    )


def main() -> None:
    """Make the tables of one file anew."""
    path = Path(sys.argv[1])
    write_atomically(path, fill_tables(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
