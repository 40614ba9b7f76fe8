import pytest
import yaml
from project import ROOT
from tiny import changed, published

from fullscale.params import load_params
from fullscale.runtime.errors import StageError


def load(tmp_path, content):
    path = tmp_path / "params.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return load_params(path)


def test_published_params_are_valid():
    params = load_params(ROOT / "params.yaml")
    assert params.networks == ("unet", "unet3plus")
    assert tuple(params.organs) == ("liver", "spleen")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"learning_rat": 0.1}}, r"train\.learning_rat: unknown key; remove it"),
        ({"trian": {}}, r"trian: unknown key"),
        (
            {"evaluate": {"ablate_gate": True}},
            r"evaluate\.ablate_gate: is now called evaluate\.ablate_slice_classifier; rename it",
        ),
        (
            {"train": {"seed": 0}},
            r"train\.seed: is now the list `seeds` beside `networks`: .* `seeds: \[0\]` there",
        ),
        ({"seeds": []}, r"seeds: .*at least 1 item"),
        ({"seeds": [0, 1, 0]}, r"seeds: names one twice"),
        ({"seeds": [0, -1]}, r"seeds\.1: .*greater than or equal to 0, found -1"),
        (
            {"split": {"rotate": True}, "register": {"deploy": "best"}},
            r"with split\.rotate the trainings validate on different patients",
        ),
        ({"register": {"deploy": "mean"}}, r"deploy: .*'ensemble' or 'best', found 'mean'"),
        ({"train": {"learning_rate": 0}}, r"train\.learning_rate: .*greater than 0, found 0"),
        ({"train": {"learning_rate": "fast"}}, r"train\.learning_rate: .*number.*found 'fast'"),
        ({"train": {"optimizer": "adam"}}, r"train\.optimizer: .*'adamw' or 'sgd', found 'adam'"),
        (
            {"train": {"batch_size": 0}},
            r"train\.batch_size: must be a whole number of at least 1, or auto, found 0",
        ),
        ({"train": {"batch_size": "all"}}, r"train\.batch_size: .*or auto, found 'all'"),
        ({"train": {"devices": 2}}, r"train: 2 devices on 1 nodes need strategy ddp, found 'auto'"),
        ({"train": {"schedule": "step"}}, r"train\.schedule: .*'constant', 'cosine' or 'poly'"),
        ({"train": {"ema_decay": 1}}, r"train\.ema_decay: .*less than 1, found 1"),
        ({"train": {"organ_free_share": -1}}, r"train\.organ_free_share: .*greater than or equal"),
        ({"train": {"organ_free_share": 1}}, r"train\.organ_free_share: .*less than 1, found 1"),
        ({"train": {"sampling": "patient"}}, r"train\.sampling: .*'case' or 'slice'"),
        ({"train": {"slices_per_epoch": 0}}, r"train\.slices_per_epoch: .*or auto, found 0"),
        ({"train": {"precision": "fp16"}}, r"train\.precision: .*'auto', 'bf16' or 'fp32'"),
        ({"slice": {"size_px": 16}}, r"slice\.size_px: .*greater than or equal to 32, found 16"),
        (
            {"slice": {"window_hu": [240, -160]}},
            r"window_hu must ascend, found \[240\.0, -160\.0\]",
        ),
        ({"split": {"test_fraction": 1}}, r"split\.test_fraction: .*less than 1, found 1"),
        ({"split": {"folds": 1}}, r"split\.folds: .*greater than or equal to 2"),
        ({"split": {"val_fold": 5}}, r"split: val_fold 5 is none of the 5 folds, which are 0 to 4"),
        (
            {"evaluate": {"min_false_positive_px": 10}},
            r"evaluate\.min_false_positive_px: is replaced by evaluate\.min_false_positive_mm2",
        ),
        (
            {"split": {"val_fraction": 0.2}},
            r"split\.val_fraction: is replaced by split\.folds.* and split\.val_fold",
        ),
        ({"split": {"seed": 0}}, r"split\.seed: has no use any more.*remove it"),
        ({"evaluate": {"threshold": 1.5}}, r"evaluate\.threshold: .*less than 1, found 1\.5"),
        ({"register": {"candidate": "unet"}}, r"register: candidate and baseline are both 'unet'"),
        ({"register": {"baseline": "fcn"}}, r"register\.baseline is 'fcn', which is not trained"),
        ({"register": {"model_name": "a/b"}}, r"register\.model_name: .*pattern"),
        ({"register": {"max_slice_fpr": 2}}, r"register\.max_slice_fpr: .*less than or equal to 1"),
        ({"register": {"max_organ_dice_loss": -0.1}}, r"max_organ_dice_loss: .*or equal to 0"),
        ({"register": {"min_cases": 6}}, r"register\.min_cases: is now called register\.min_pat"),
        ({"register": {"min_patients": 0}}, r"min_patients: .*greater than or equal to 1, found 0"),
        (
            {"register": {"min_organ_dice": 2}},
            r"min_organ_dice: must be a number from 0 to 1, or one for each organ by name, found 2",
        ),
        ({"register": {"min_organ_dice": {"liver": "x", "spleen": 0}}}, r"must be a number from 0"),
        (
            {"register": {"min_organ_dice": {"liver": 0.5}}},
            r"min_organ_dice names \['liver'\]; wanted one .* each of the organs \['liver', 'spl",
        ),
        ({"networks": ["unet", "unet3plus", "vnet"]}, r"networks names 'vnet', but recipes holds"),
        ({"networks": ["unet", "unet", "unet3plus"]}, r"networks names one twice"),
        ({"networks": []}, r"networks: .*at least 1 item"),
        (
            {"organs": {"spleen": ["liver"]}},
            r"label 'liver' is given to both organs\.liver and organs\.spleen",
        ),
        ({"organs": {"spleen": []}}, r"organs\.spleen names no label"),
        (
            {"organs": {"spleen": [0]}},
            r"organs\.spleen\.0: .*or its number, at least 1",
        ),
        ({"compute": {"backend": "dask"}}, r"compute: backend dask needs the address"),
    ],
)
def test_params_refuse_bad_value(tmp_path, changes, message):
    with pytest.raises(StageError, match=message):
        load(tmp_path, changed(changes))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rotation_deg", 181, "less than or equal to 180, found 181"),
        ("scale_fraction", 1, "less than 1, found 1"),
        ("shift_fraction", -0.1, r"greater than or equal to 0, found -0\.1"),
        ("elastic_fraction", 0.2, r"less than or equal to 0\.12, found 0\.2"),
        ("flip_probability", 1.5, r"less than or equal to 1, found 1\.5"),
        ("noise_hu", -1, "greater than or equal to 0, found -1"),
        ("blur_px", 6, "less than or equal to 5, found 6"),
        ("contrast_fraction", 1, "less than 1, found 1"),
        ("zoom", 1, "unknown key; remove it"),
    ],
)
def test_params_refuse_strength(tmp_path, key, value, message):
    augment = published()["train"]["augment"] | {key: value}
    with pytest.raises(StageError, match=rf"train\.augment\.{key}: .*{message}"):
        load(tmp_path, changed({"train": {"augment": augment}}))


def test_published_params_never_flip():
    assert load_params(ROOT / "params.yaml").train.augment.flip_probability == 0


@pytest.mark.parametrize("section", ["organs", "networks", "slice", "split", "train", "register"])
def test_params_name_missing_section(tmp_path, section):
    content = published()
    del content[section]
    with pytest.raises(StageError, match=rf"{section}: is missing"):
        load(tmp_path, content)


def test_params_name_every_fault_at_once(tmp_path):
    content = changed({"train": {"width": 0}, "split": {"test_fraction": 2}})
    with pytest.raises(StageError, match=r"split\.test_fraction.*; train\.width"):
        load(tmp_path, content)


def test_params_refuse_change(tmp_path):
    params = load(tmp_path, published())
    with pytest.raises(ValueError, match="frozen"):
        params.train.width = 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not valid YAML"),
        ("- a\n- b\n", "must hold a mapping of sections, found list"),
        ("", "must hold a mapping of sections, found NoneType"),
    ],
)
def test_params_refuse_other_files(tmp_path, text, message):
    with pytest.raises(StageError, match=message):
        load(tmp_path, text)


def test_params_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(StageError, match=r"params\.yaml is missing; run from the project's root"):
        load_params(tmp_path / "params.yaml")
