from typing import NamedTuple

import pytest

from fullscale.versioning.provenance import digest_test_set


class Annotated(NamedTuple):
    name: str
    patient: str
    label_sha256: str


FIRST, SECOND = Annotated("a", "p", "1" * 64), Annotated("b", "q", "2" * 64)


def test_digest_names_a_set_and_not_an_order():
    digest = digest_test_set([FIRST, SECOND])
    assert len(digest) == 16
    assert digest == digest_test_set([SECOND, FIRST])


@pytest.mark.parametrize(
    "cases",
    [
        [FIRST],
        [FIRST, SECOND, Annotated("c", "q", "3" * 64)],
        [FIRST, SECOND._replace(name="c")],
        [FIRST, SECOND._replace(patient="p")],
        [FIRST, SECOND._replace(label_sha256="3" * 64)],
        [FIRST._replace(name="ap", patient=""), SECOND],
    ],
)
def test_digest_changes_with_cases_patients_and_annotation(cases):
    assert digest_test_set(cases) != digest_test_set([FIRST, SECOND])
