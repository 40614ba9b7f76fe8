"""Scans are put into the inbox while processes are killed, and a model stands in the registry.

A minute of what tests/shared/soak.py does for hours.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from project import Project, copy_project
from soak import Soak

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def test_scans_that_land_while_processes_are_killed_become_a_challenger(
    quick_template: Project, tmp_path: Path
) -> None:
    project = copy_project(quick_template, tmp_path)
    soak = Soak(tmp_path, seed=1, log=tmp_path / "soak.log", project=project)
    summary = soak.run(25, kill_every_s=10, kinds=("good", "truncated", "no label map"))
    assert summary["cases landed"] == 1
    assert (summary["files accepted"], summary["files quarantined"]) == (2, 4)
    assert summary["retrainings published"]["pass"] >= 1
    assert summary["versions registered"] >= 1  # one of which is the challenger, as soak verifies
    killed = [number for what, number in summary.items() if what.startswith("killed: ")]
    assert sum(killed) >= 2
