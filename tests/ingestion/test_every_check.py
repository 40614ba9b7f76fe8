"""Each check with an input that causes it, and with the same input after its cure."""

from __future__ import annotations

import faulty_scans  # noqa: F401 its makers register themselves
import faulty_sources  # noqa: F401
import pytest
from check_makers import MAKERS, validated

from fullscale.runtime.errors import ScanError
from fullscale.scans.checks import CHECKS, Finding

NO_CURE_HERE = {"cluster"}  # tests/tasks/test_slice.py starts a scheduler


def see(look):
    """Return the findings, also if there is one that ends the work."""
    try:
        return look()
    except ScanError as error:
        return [Finding.from_error("", error)]


def is_refused(finding):
    return finding.severity == "refused"


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
@pytest.mark.parametrize("code", CHECKS)
def test_check_is_caused_by_its_input_and_cured_by_its_cure(code, tmp_path):
    maker, named = MAKERS[code]
    folder = tmp_path / "in"
    folder.mkdir()
    steps = maker(folder)
    look = next(steps) or validated(folder)
    found = [finding for finding in see(look) if finding.code == code]
    assert found
    assert named in "; ".join(finding.found for finding in found)
    check = CHECKS[code]
    assert {(f.severity, f.wanted) for f in found} == {(check.severity, check.wanted)}
    assert all(finding.cure.startswith(check.cure) for finding in found)
    if check.severity == "note" or code in NO_CURE_HERE:
        assert next(steps, None) is None
        assert code in NO_CURE_HERE or check.cure.startswith("nothing to do")
    else:
        left = see(next(steps, None) or look)
        assert not [finding for finding in left if code == finding.code or is_refused(finding)]


def test_each_check_has_a_maker():
    assert set(MAKERS) == set(CHECKS)
