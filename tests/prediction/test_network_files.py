import json
from pathlib import Path

import pytest
import torch
from random_network import random_trained

from fullscale.params import Params
from fullscale.prediction.network_files import (
    DESCRIPTION_NAME,
    WEIGHTS_NAME,
    TrainedOn,
    build,
    choose_deployed,
    choose_neighbour_mm,
    describe_network,
    digest_weights,
    find_packaged,
    load_trained,
    member_folders,
    package_files,
    save_trained,
)
from fullscale.runtime.errors import StageError
from fullscale.runtime.files import file_sha256
from fullscale.scans.slicing import Grid
from model.ensemble import list_members


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


# Ensembles


def save_members(folder, params, seeds, **changes):
    for seed in seeds:
        trained = random_trained(params, seed=seed)
        known = {"epoch": seed + 1, "val_dice": seed / 10, **changes}
        description = trained.description.model_copy(update=known)
        save_trained(folder / str(seed), trained.network, description)


def test_folder_of_networks_is_their_ensemble_in_the_order_of_their_seeds(tmp_path, tiny_params):
    save_members(tmp_path, tiny_params, (10, 2, 0))
    folders = [tmp_path / name for name in ("0", "2", "10")]
    assert member_folders(tmp_path) == folders
    trained = load_trained(tmp_path)
    assert trained.num_members == 3
    assert not trained.network.training
    for folder, member in zip(folders, list_members(trained.network), strict=True):
        alone = load_trained(folder)
        assert alone.num_members == 1
        wanted = alone.network.state_dict()
        assert all(torch.equal(value, wanted[key]) for key, value in member.state_dict().items())
    assert (trained.description.epoch, trained.description.val_dice) == (0, pytest.approx(0.4))
    assert trained.description.organs == alone.description.organs


def test_folder_of_one_seed_is_that_network(tmp_path, tiny_params):
    save_members(tmp_path, tiny_params, (4,))
    assert load_trained(tmp_path).description == load_trained(tmp_path / "4").description
    assert member_folders(tmp_path / "4") == [tmp_path / "4"]


def test_networks_of_different_recipes_are_no_ensemble(tmp_path, tiny_params):
    save_members(tmp_path, tiny_params, (0,))
    save_members(tmp_path, tiny_params, (1,), organs={"liver": (1,), "spleen": (7,)})
    with pytest.raises(StageError, match=r"0 and .*1 differ in organs, so they are no ensemble"):
        load_trained(tmp_path)


def test_member_without_its_weights_is_named(tmp_path, tiny_params):
    save_members(tmp_path, tiny_params, (0, 1))
    (tmp_path / "1" / WEIGHTS_NAME).unlink()
    with pytest.raises(StageError, match=r"no trained network in .*1: weights\.safetensors"):
        load_trained(tmp_path)


def test_digest_of_an_ensemble_depends_on_each_member_and_of_one_is_the_files(
    tmp_path, tiny_params
):
    save_members(tmp_path, tiny_params, (0, 1, 2))
    folders = member_folders(tmp_path)
    assert digest_weights(folders[:1]) == file_sha256(folders[0] / WEIGHTS_NAME)
    digests = [digest_weights(part) for part in (folders, folders[:2], folders[1:])]
    assert len(set(digests)) == 3
    (folders[2] / WEIGHTS_NAME).write_bytes((folders[1] / WEIGHTS_NAME).read_bytes())
    assert digest_weights(folders) != digests[0]


def test_what_is_deployed_is_all_or_the_best_in_validation(tmp_path, tiny_params):
    save_members(tmp_path, tiny_params, (0, 1, 2))
    folders = member_folders(tmp_path)
    assert choose_deployed(folders, "ensemble") == folders
    assert choose_deployed(folders, "best") == folders[2:]
    assert choose_deployed(folders[:2], "best") == folders[1:2]
    for deploy in ("ensemble", "best"):
        assert choose_deployed(folders[:1], deploy) == folders[:1]
    save_members(tmp_path, tiny_params, (0, 1, 2), val_dice=0.5)
    assert choose_deployed(folders, "best") == folders[:1]


@pytest.mark.parametrize("num_networks", [1, 12])
def test_packaged_networks_are_found_again_in_their_order(num_networks):
    folders = [Path(f"trained/{seed}") for seed in range(num_networks)]
    packaged = package_files(folders) | {"verdict": Path("gate.json")}
    assert find_packaged({name: str(path) for name, path in packaged.items()}) == folders
