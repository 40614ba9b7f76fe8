from __future__ import annotations

import re
from pathlib import Path

import pytest

from fullscale.ingestion.layouts import LAYOUTS
from fullscale.ingestion.reference_tables import checks_table, fill_tables, layouts_table
from fullscale.scans.checks import CHECKS
from fullscale.scans.cohort import COLUMNS

PAGE = Path(__file__).parents[2] / "docs/data.md"


def test_page_is_made_from_the_tables_of_the_code():
    text = PAGE.read_text()
    assert fill_tables(text) == text, (
        "run: python -m fullscale.ingestion.reference_tables docs/data.md"
    )


def test_page_names_every_layout_check_and_column():
    text = PAGE.read_text()
    for name in (*LAYOUTS, *CHECKS):
        assert f"`{name}`" in text
    for column in COLUMNS:
        assert column in text


@pytest.mark.parametrize("table", [layouts_table, checks_table])
def test_tables_have_the_same_number_of_cells_in_each_row(table):
    lines = table().splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_fill_tables_without_markers_is_refused():
    with pytest.raises(ValueError, match="markers <!-- layouts -->"):
        fill_tables("# Scans")
