import pytest
import yaml
from project import ROOT

from fullscale.planning.params_file import change_values, find_mine, write_params
from fullscale.runtime.errors import StageError

TEXT = (ROOT / "params.yaml").read_text()
OWN = """\
# Ours
seeds:      # three
  - 0
  - 1       # the second
networks: [a, b]

slice:
  size_px:   96   # mine, as the scanner's
  window_hu: [ -160,
               240 ]   # soft tissue
  pixel_mm: "4"
train: # MINE
  width: 8
  augment: {noise_hu: 10}

split:
  folds: 5
"""


def differing(before, after):
    return [
        (old, new)
        for old, new in zip(before.splitlines(), after.splitlines(), strict=True)
        if old != new
    ]


def test_changed_values_leave_every_other_byte():
    changed = change_values(TEXT, {"seeds": [0], "slice.size_px": 160, "train.width": 16})
    assert differing(TEXT, changed) == [
        (
            "seeds: [0, 1, 2]            # each network is trained once with each; from 3 on a "
            "verdict is on networks",
            "seeds: [0]                  # each network is trained once with each; from 3 on a "
            "verdict is on networks",
        ),
        ("  size_px: 96", "  size_px: 160"),
        (
            "  width: 8                  # channels of the first level; the paper's is 64",
            "  width: 16                 # channels of the first level; the paper's is 64",
        ),
    ]


def test_no_change_gives_the_same_file():
    assert change_values(TEXT, {}) == TEXT
    values = yaml.safe_load(TEXT)["train"]
    assert change_values(TEXT, {"train.num_epochs": values["num_epochs"]}) == TEXT


def test_null_and_numbers_are_written_as_yaml_has_them():
    changed = change_values(
        TEXT, {"compute.num_loader_workers": 7, "train.learning_rate": 0.00019, "seeds": [3]}
    )
    content = yaml.safe_load(changed)
    assert content["compute"]["num_loader_workers"] == 7
    assert content["train"]["learning_rate"] == 0.00019
    back = change_values(changed, {"compute.num_loader_workers": None})
    assert "num_loader_workers: null" in back


def test_values_over_several_lines_are_written_on_one():
    changed = change_values(OWN, {"seeds": [0, 1, 2], "slice.window_hu": [-100, 200]})
    assert "seeds: [0, 1, 2]" in changed
    assert "  window_hu: [-100, 200]   # soft tissue\n" in changed
    assert yaml.safe_load(changed)["networks"] == ["a", "b"]


def test_missing_key_is_added_below_its_section():
    changed = change_values(OWN, {"split.test_fraction": 0.2, "compute.num_loader_workers": 3})
    assert "split:\n  folds: 5\n  test_fraction: 0.2\n" in changed
    assert changed.endswith("compute:\n  num_loader_workers: 3\n")


def test_keys_marked_mine_are_found_with_all_below_them():
    assert find_mine(TEXT) == frozenset()
    assert find_mine(OWN) == {
        "slice.size_px", "train", "train.width", "train.augment", "train.augment.noise_hu"
    }  # fmt: skip


def test_the_word_mine_in_a_value_marks_nothing():
    assert find_mine("split:\n  salt: mine\n  folds: 5 # determined by hand\n") == frozenset()


def test_a_key_marked_mine_is_never_changed():
    with pytest.raises(StageError, match=r"slice\.size_px has the comment `# mine`"):
        change_values(OWN, {"slice.size_px": 64})
    changed = change_values(OWN, {"slice.pixel_mm": 3})
    assert "  size_px:   96   # mine, as the scanner's\n" in changed


def test_file_with_anchors_is_refused():
    text = "a: &x [0]\nb: *x\n"
    with pytest.raises(StageError, match="cannot be changed here, perhaps with anchors"):
        change_values(text, {"a": [1]})


def test_refused_values_leave_the_file_on_disk(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(TEXT)
    with pytest.raises(StageError, match=r"slice\.size_px.*less than or equal to 1024"):
        write_params(path, {"slice.size_px": 5000})
    assert path.read_text() == TEXT
    write_params(path, {"slice.size_px": 128})
    assert "size_px: 128" in path.read_text()
    assert [each.name for each in tmp_path.iterdir()] == ["params.yaml"]
