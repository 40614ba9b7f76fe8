from __future__ import annotations

import pytest

from fullscale.label_names import label_key, resolve_organs
from fullscale.runtime.errors import StageError

IRCADB = {"background": 0, "artery": 1, "bone": 2, "leftkidney": 3, "liver": 4, "livertumor": 5}


@pytest.mark.parametrize("name", ["Liver", " liver ", "LIVER"])
def test_label_key_ignores_case_and_blanks(name):
    assert label_key(name) == "liver"


@pytest.mark.parametrize(
    ("wanted", "ids"),
    [
        (["liver"], (4,)),
        (["Liver", "tumour"], (4, 5)),
        (["hepatic", "hepatic lesion"], (4, 5)),
        (["liver", "liver_tumour"], (4, 5)),
        ([4, 5], (4, 5)),
        (["liver", 5], (4, 5)),
    ],
)
def test_labels_of_an_organ_are_found_by_name(wanted, ids):
    assert resolve_organs({"liver": wanted}, IRCADB) == {"liver": ids}


def test_a_number_of_another_organ_is_refused_with_what_is_there():
    with pytest.raises(StageError) as caught:
        resolve_organs({"liver": [1]}, IRCADB)
    text = str(caught.value)
    assert "'artery'" in text
    assert "liver 4, livertumor 5" in text


def test_a_number_of_a_part_that_is_another_organ_is_refused():
    with pytest.raises(StageError, match="'leftkidney'"):
        resolve_organs({"liver": [4, 3]}, IRCADB)


def test_numbers_are_taken_where_no_label_has_a_telling_name():
    labels = {"background": 0, "label_1": 1, "2": 2}
    assert resolve_organs({"liver": [1], "spleen": [2]}, labels) == {"liver": (1,), "spleen": (2,)}


def test_an_unknown_name_lists_what_is_there():
    with pytest.raises(StageError, match=r"no label is it.*artery 1, bone 2"):
        resolve_organs({"pancreas": ["pancreas"]}, IRCADB)


def test_a_name_that_fits_two_labels_is_refused():
    labels = {"liver": 1, "tumor": 2, "lesion": 3}
    with pytest.raises(StageError, match="may be tumor 2, lesion 3"):
        resolve_organs({"liver": ["liver", "tumour"]}, labels)


def test_the_words_of_a_name_may_be_in_any_order():
    labels = {"kidney_left": 1, "right kidney": 2}
    wanted = {"left": ["leftkidney"], "right": ["kidney_right"]}
    assert resolve_organs(wanted, labels) == {"left": (1,), "right": (2,)}


def test_two_organs_never_share_a_label():
    with pytest.raises(StageError, match=r"organs\.a and organs\.b"):
        resolve_organs({"a": ["liver"], "b": ["hepatic"]}, IRCADB)
