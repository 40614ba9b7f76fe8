from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullscale.ingestion.names import name_case
from fullscale.scans.cohort import CASE_NAME

UID = "1.3.6.1.4.1.14519.5.2.1.6279.6001.1057566580315150620007448212"


@pytest.mark.parametrize("text", ["case_01", "s0000", "A-b_9", "a" * 64])
def test_name_case_keeps_what_is_safe(text):
    assert name_case(text) == text


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("patient 1", "patient_1"),
        ("patient 1", "patient.1"),
        ("张三01", "李四01"),
        ("Müller", "Möller"),
        ("患者", "病人"),
        (UID + "60", UID + "61"),
        ("a" * 64, "a" * 65),
        ("CT/1", "CT2/1"),
        ("-x", "x"),
    ],
)
def test_name_case_keeps_different_names_apart(first, second):
    assert name_case(first) != name_case(second)


@pytest.mark.parametrize(
    ("text", "readable"), [("Müller 3", "Muller_3"), ("患者4", "4"), ("患者", "case")]
)
def test_name_case_begins_with_what_can_be_read(text, readable):
    assert name_case(text).startswith(f"{readable}_")


def test_name_case_does_not_depend_on_how_a_system_stores_accents():
    composed = unicodedata.normalize("NFC", "Müller")
    assert name_case(composed) == name_case(unicodedata.normalize("NFD", "Müller"))


@given(st.lists(st.text(max_size=80), unique_by=lambda text: unicodedata.normalize("NFC", text)))
def test_name_case_gives_safe_names_and_one_for_each_text(texts):
    names = [name_case(text) for text in texts]
    assert all(CASE_NAME.fullmatch(name) for name in names)
    assert len(set(names)) == len(names)
