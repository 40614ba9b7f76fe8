from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from bodies import make_body, save_nifti
from literal_networks import FORWARD, random_state
from typer.testing import CliRunner

from fullscale.params import SliceParams
from fullscale.prediction.network_files import load_trained
from fullscale.runtime.errors import StageError
from fullscale.serving.model_lookup import find_model
from fullscale.workspace import open_workspace
from model.official import OFFICIAL
from tasks.cli import app
from tasks.commands.import_checkpoint import import_checkpoint, parse_organs
from tasks.export import export
from tasks.register import ensure_run

CGM = "unet3plus_ds_cgm"
SLICING = SliceParams(
    size_px=32, pixel_mm=12, neighbour_mm=7, window_hu=(-160, 240), body_threshold_hu=-300
)


def write_checkpoint(path, name=CGM, *, under=None, **sizes):
    state = random_state(name, **{"width": 4, **sizes})
    torch.save({under: state, "epoch": 7} if under else state, path)
    return state


def run_import(tmp_path, name=CGM, organs=("liver=1",)):
    return import_checkpoint(tmp_path / "theirs.pt", tmp_path / "ours", name, organs, SLICING)


@pytest.mark.parametrize("name", OFFICIAL)
def test_imported_network_computes_what_the_checkpoint_did(name, tmp_path):
    state = write_checkpoint(tmp_path / "theirs.pt", name, num_organs=2)
    run_import(tmp_path, name, ("liver=1,5", "spleen=2"))
    trained = load_trained(tmp_path / "ours")
    assert trained.description.organs == {"liver": (1, 5), "spleen": (2,)}
    assert trained.description.name == "ours"
    assert trained.description.slice == SLICING
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected, _ = FORWARD[name](state, image, False)
    with torch.no_grad():
        found = trained.network(image).logits[0]
    torch.testing.assert_close(found, expected[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("under", ["state_dict", "model"])
def test_state_within_a_larger_checkpoint_is_found(under, tmp_path):
    write_checkpoint(tmp_path / "theirs.pt", under=under)
    assert run_import(tmp_path).width == 4


@pytest.mark.slow
def test_command_writes_a_folder_that_predict_and_export_take(tmp_path):
    write_checkpoint(tmp_path / "theirs.pt", "unet")
    folder, scan, label_map = tmp_path / "ours", tmp_path / "scan.nii.gz", tmp_path / "out.nii.gz"
    save_nifti(scan, make_body()[0], (8.0, 7.0, 7.0))
    commands = (
        ["import-checkpoint", tmp_path / "theirs.pt", folder, "--architecture", "unet",
         "--organ", "liver=1", "--size-px", 32, "--pixel-mm", 12,
         "--neighbour-mm", 7, "--window-hu", -160, 240],
        ["predict", scan, label_map, "--model", folder, "--device", "cpu"],
    )  # fmt: skip
    outputs = [CliRunner().invoke(app, [str(each) for each in command]) for command in commands]
    assert [output.exit_code for output in outputs] == [0, 0], outputs
    assert f"use it with --model {folder}" in outputs[0].output
    assert label_map.is_file()
    written = export(tmp_path / "ours.onnx", find_model(str(folder), tmp_path))
    assert written.parity.difference < 1e-3


@pytest.mark.slow
def test_registry_takes_an_imported_network(tmp_path, empty_store):
    write_checkpoint(tmp_path / "theirs.pt")
    workspace = open_workspace(tmp_path)
    folder = workspace.trained("ours", 0)
    import_checkpoint(tmp_path / "theirs.pt", folder, CGM, ["liver=1"], SLICING)
    run_id = ensure_run("ours", 0, workspace, empty_store, "0" * 32)
    assert ensure_run("ours", 0, workspace, empty_store, "0" * 32) == run_id


def test_help_names_every_architecture():
    text = CliRunner().invoke(app, ["import-checkpoint", "--help"], terminal_width=200).output
    assert all(name in text for name in OFFICIAL)


def test_missing_and_surplus_entries_are_named(tmp_path):
    state = write_checkpoint(tmp_path / "theirs.pt")
    del state["conv3.conv1.0.bias"]
    torch.save({**state, "extra.weight": torch.zeros(1)}, tmp_path / "theirs.pt")
    with pytest.raises(StageError, match=r"lacks encoder\.levels\.2\.0\.conv\.bias; .*extra\.wei"):
        run_import(tmp_path)
    assert not (tmp_path / "ours").exists()


def test_other_architecture_is_told(tmp_path):
    write_checkpoint(tmp_path / "theirs.pt", "unet3plus_ds")
    for name in ("unet", "unet3plus", CGM):
        with pytest.raises(StageError, match="it looks like unet3plus_ds; choose --architecture"):
            run_import(tmp_path, name)


def test_unknown_architecture_is_refused(tmp_path):
    write_checkpoint(tmp_path / "theirs.pt")
    with pytest.raises(StageError, match="unknown official network 'unet4': use one of unet, "):
        run_import(tmp_path, "unet4")


def test_other_number_of_organs_is_refused(tmp_path):
    write_checkpoint(tmp_path / "theirs.pt", num_organs=2)
    with pytest.raises(StageError, match=r"segments 2 organs, but --organ names 1 \(liver\)"):
        run_import(tmp_path)


def test_other_input_channels_are_refused(tmp_path):
    write_checkpoint(tmp_path / "theirs.pt", in_channels=1)
    with pytest.raises(StageError, match="takes 1 input channels, expected 3"):
        run_import(tmp_path)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = write_checkpoint(tmp_path / "theirs.pt")
    state["outconv1.bias"][0] = np.nan
    torch.save(state, tmp_path / "theirs.pt")
    with pytest.raises(StageError, match="not finite"):
        run_import(tmp_path)


class Payload:
    def __reduce__(self):
        return (open, ("executed", "w"))


def test_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = random_state(CGM, width=4)
    torch.save({"state_dict": state, "optimizer": Payload()}, tmp_path / "theirs.pt")
    with pytest.raises(StageError, match="tensors only, and is not loaded"):
        run_import(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read|tensors only"),
        (b"PK\x03\x04 cut off", "cannot be read"),
        (json.dumps({"a": 1}).encode(), "tensors only"),
    ],
)
def test_other_files_are_refused(content, message, tmp_path):
    (tmp_path / "theirs.pt").write_bytes(content)
    with pytest.raises(StageError, match=message):
        run_import(tmp_path)


def test_missing_file_is_told(tmp_path):
    with pytest.raises(StageError, match=r"theirs\.pt does not exist"):
        run_import(tmp_path)


@pytest.mark.parametrize("content", [{"epoch": 3}, [torch.zeros(2)], torch.zeros(2)])
def test_file_without_a_state_dict_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "theirs.pt")
    with pytest.raises(StageError, match="holds no state dict"):
        run_import(tmp_path)


def test_existing_network_is_not_overwritten(tmp_path):
    write_checkpoint(tmp_path / "theirs.pt")
    run_import(tmp_path)
    with pytest.raises(
        StageError, match=r"already holds a weights\.safetensors; name a new folder"
    ):
        run_import(tmp_path)


@pytest.mark.parametrize("text", ["liver", "liver=", "=1", "liver=0", "liver=256", "liver=1,", ""])
def test_malformed_organ_is_refused(text):
    with pytest.raises(StageError, match="wanted NAME=ID or NAME=ID,ID"):
        parse_organs([text])


@pytest.mark.parametrize("texts", [["liver=1", "liver=2"], ["liver=1", "spleen=1"], ["liver=1,1"]])
def test_repeated_organ_or_label_is_refused(texts):
    with pytest.raises(StageError, match="repeats a name or a label id"):
        parse_organs(texts)
