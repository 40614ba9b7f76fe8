"""A minute of what tests/shared/soak.py does for hours."""

from __future__ import annotations

from pathlib import Path

import pytest
from soak import Soak

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def test_scans_that_land_while_processes_are_killed_all_end_where_they_belong(
    tmp_path: Path,
) -> None:
    summary = Soak(tmp_path, seed=1, log=tmp_path / "soak.log").run(35, kill_every_s=12)
    assert summary["cases landed"] >= 1
    assert sum(summary["retrainings published"].values()) >= 1
    killed = [number for what, number in summary.items() if what.startswith("killed: ")]
    assert sum(killed) >= 2
