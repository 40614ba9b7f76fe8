import json

import pytest
import torch

from fullscale.params import Params
from fullscale.prediction.network_files import (
    DESCRIPTION_NAME,
    WEIGHTS_NAME,
    TrainedOn,
    build,
    choose_neighbour_mm,
    describe_network,
    load_trained,
    save_trained,
)
from fullscale.runtime.errors import StageError
from fullscale.scans.slicing import Grid


@pytest.fixture
def saved(tiny_params, tmp_path):
    torch.manual_seed(0)
    description = describe_network("unet3plus", tiny_params).model_copy(
        update={"epoch": 3, "val_dice": 0.5}
    )
    network = build(description)
    save_trained(tmp_path, network, description)
    return tmp_path, network, description


def test_network_comes_back_as_it_was(saved):
    folder, network, description = saved
    trained = load_trained(folder)
    assert trained.description == description
    assert not trained.network.training
    x = torch.rand(1, 3, 32, 32)
    network.eval()
    with torch.no_grad():
        assert torch.equal(trained.network(x).logits[0], network(x).logits[0])


def test_description_keeps_the_order_of_organs(tiny_params, tmp_path):
    content = tiny_params.model_dump(by_alias=True) | {"organs": {"spleen": [2], "liver": [1, 3]}}
    description = describe_network("unet", Params.model_validate(content))
    save_trained(tmp_path, build(description), description)
    assert list(load_trained(tmp_path).description.organs) == ["spleen", "liver"]


def test_saving_again_replaces_and_leaves_nothing_else(saved):
    folder, network, description = saved
    save_trained(folder, network, description.model_copy(update={"epoch": 4}))
    assert load_trained(folder).description.epoch == 4
    assert {path.name for path in folder.iterdir()} == {WEIGHTS_NAME, DESCRIPTION_NAME}


@pytest.mark.parametrize("name", [WEIGHTS_NAME, DESCRIPTION_NAME])
def test_missing_file_says_what_to_do(saved, name):
    folder = saved[0]
    (folder / name).unlink()
    with pytest.raises(StageError, match=rf"{name} is missing; train it again with `dvc repro`"):
        load_trained(folder)


@pytest.mark.parametrize("name", [WEIGHTS_NAME, DESCRIPTION_NAME])
def test_truncated_file_is_called_damaged(saved, name):
    path = saved[0] / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(StageError, match="is damaged"):
        load_trained(saved[0])


def test_weights_of_another_network_are_refused(saved):
    path = saved[0] / DESCRIPTION_NAME
    content = json.loads(path.read_text()) | {"width": 8}
    path.write_text(json.dumps(content))
    with pytest.raises(StageError, match=r"is damaged: .*size mismatch"):
        load_trained(saved[0])


def test_network_of_the_older_geometry_is_refused_with_the_ways_on(saved):
    path = saved[0] / DESCRIPTION_NAME
    content = json.loads(path.read_text())
    content["slice"] = {
        "size_px": 32, "window_hu": [-160, 240], "body_threshold_hu": -300, "body_margin_mm": 10
    }  # fmt: skip
    path.write_text(json.dumps(content))
    with pytest.raises(StageError, match=r"a box around the body .*`mlflow models predict`"):
        load_trained(saved[0])


def test_unet_of_the_time_without_decoder_norms_loads_as_the_official_one(tiny_params, tmp_path):
    content = tiny_params.model_dump(by_alias=True)
    content["recipes"]["unet"]["architecture"] = "unet_official"
    description = describe_network("unet", Params.model_validate(content))
    network = build(description)
    save_trained(tmp_path, network, description.model_copy(update={"architecture": "unet"}))
    trained = load_trained(tmp_path)
    assert trained.description == description
    assert trained.network.state_dict().keys() == network.state_dict().keys()


def test_distance_of_neighbours_is_known_only_after_training(saved):
    unknown = saved[2].slice.model_copy(update={"neighbour_mm": "auto"})
    description = saved[2].model_copy(update={"slice": unknown})
    with pytest.raises(StageError, match=r"slice\.neighbour_mm auto, which only training decides"):
        _ = description.neighbour_mm


@pytest.mark.parametrize(("asked", "expected"), [("auto", 2.5), (4.0, 4.0)])
def test_automatic_distance_of_neighbours_is_the_median_spacing(asked, expected):
    grids = [
        Grid((9, 9, 9), (spacing_mm, 1.0, 1.0), 0, 0, 1.0, 32, (1.0, 1.0))
        for spacing_mm in (0.8, 2.5, 2.50001, 7.0, 1.0)
    ]
    assert choose_neighbour_mm(asked, grids) == expected


def test_pickle_is_never_loaded(saved):
    torch.save({"weight": torch.zeros(1)}, saved[0] / WEIGHTS_NAME)
    with pytest.raises(StageError, match="is damaged"):
        load_trained(saved[0])


def test_impossible_recipe_is_named(tiny_params):
    content = tiny_params.model_dump(by_alias=True)
    content["recipes"]["unet"] = {"architecture": "vnet", "loss_terms": ["iou"]}
    with pytest.raises(StageError, match=r"recipes\.unet: .*vnet"):
        build(describe_network("unet", Params.model_validate(content)))


def test_what_cases_were_like_is_their_lowest_and_highest():
    grids = [
        Grid((100, 512, 512), (2.5, 0.8, 0.8), 0, 0, 1.25, 320, (220.0, 330.0)),
        Grid((60, 400, 512), (5.0, 0.7, 0.9), 0, 0, 1.25, 320, (250.0, 310.0)),
    ]
    assert TrainedOn.of(grids) == TrainedOn(
        slice_spacing_mm=(2.5, 5.0),
        pixel_spacing_mm=(0.7, 0.9),
        height_mm=(250.0, 300.0),
        trunk_depth_mm=(220.0, 250.0),
        trunk_width_mm=(310.0, 330.0),
    )


def test_what_cases_were_like_comes_back(saved):
    folder, network, description = saved
    seen = TrainedOn.of([Grid((100, 512, 512), (2.5, 0.8, 0.8), 0, 0, 1.25, 320, (220.0, 330.0))])
    save_trained(folder, network, description.model_copy(update={"trained_on": seen}))
    assert load_trained(folder).description.trained_on == seen


def test_older_description_says_nothing_of_its_cases(saved):
    path = saved[0] / DESCRIPTION_NAME
    content = json.loads(path.read_text())
    del content["trained_on"]
    path.write_text(json.dumps(content))
    assert load_trained(saved[0]).description.trained_on is None
