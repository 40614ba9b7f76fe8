"""ONNX files: their content, and that they compute the same as prediction."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from bodies import make_body, save_nifti
from project import ROOT
from random_network import random_trained
from torch import nn
from typer.testing import CliRunner

from fullscale.prediction.network_files import (
    Trained,
    TrainedOn,
    build,
    describe_network,
    save_trained,
)
from fullscale.prediction.predictor import Predictor
from fullscale.prediction.segmentation import Model
from fullscale.runtime.errors import StageError
from fullscale.scans.geometry import Geometry
from fullscale.scans.volume import Volume, read_image
from fullscale.serving.onnx_check import compare_outputs, compute_reference, make_slices
from fullscale.serving.onnx_graph import OPSET, serialise, to_onnx
from model.blocks import initialise
from model.encoders import PlainEncoder
from model.ensemble import Ensemble
from model.inference import adjacent_slices, predict_slices, prepare
from model.networks import NETWORKS
from model.unet import UNet
from model.unet3plus import UNet3Plus
from tasks.cli import app
from tasks.export import TOLERANCE, export

pytestmark = pytest.mark.slow

SHA256 = "0123456789abcdef" * 4
TRAINED_ON = TrainedOn(
    slice_spacing_mm=(1, 5), pixel_spacing_mm=(0.6, 0.9), height_mm=(200, 400),
    trunk_depth_mm=(200, 300), trunk_width_mm=(300, 450),
)  # fmt: skip
THRESHOLD = 0.5
ODD_SIZE_PX = 50
"""Not a multiple of any network's pooling, so every network pads it."""


def settle(network):
    """Set batch norms to the statistics of a batch: random maps then neither grow nor vanish."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.rand(4, 3, ODD_SIZE_PX, ODD_SIZE_PX))
    return network.eval()


def random_model(params, size_px=32, **changes):
    """A UNet with random weights, or another network by `changes` of the description."""
    torch.manual_seed(0)
    content = describe_network("unet", params)
    description = content.model_copy(
        update={"slice": content.slice.model_copy(update={"size_px": size_px}), **changes}
    )
    trained = Trained(settle(build(description)), description)
    return Model("organs", None, SHA256, THRESHOLD, trained)


def shallow_trained(params, seed=0):
    """A UNet 3+ with slice classifier (CGM) and random weights, of two levels instead of five.

    Its conversion takes a tenth of the time. All five are in `test_every_architecture_...`.
    """
    torch.manual_seed(seed)
    encoder = PlainEncoder(3, width=4)
    encoder.levels, encoder.channels, encoder.strides = (
        each[:2] for each in (encoder.levels, encoder.channels, encoder.strides)
    )
    network = UNet3Plus(encoder, num_organs=2, width=4, deep_supervision=True, cgm=True)
    initialise(network)
    description = describe_network("unet3plus", params)
    return Trained(settle(network), description.model_copy(update={"trained_on": TRAINED_ON}))


@pytest.fixture(scope="module")
def classified(tiny_params):
    """UNet 3+ whose slice classifier (CGM) finds no liver and a spleen in every slice."""
    trained = shallow_trained(tiny_params)
    bias_K2 = trained.network.classifier.conv.bias.data.unflatten(0, (-1, 2))
    bias_K2[:, 1] = torch.tensor([-100.0, 100.0])
    return Model("organs", "3", SHA256, THRESHOLD, trained)


@pytest.fixture(scope="module")
def file(classified, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "organs.onnx"
    export(path, classified)
    return path


@pytest.fixture(scope="module")
def plain_file(tiny_params, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "plain.onnx"
    export(path, random_model(tiny_params))
    return path


def shapes(values):
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in values
    }


def test_file_is_valid_and_takes_any_number_of_slices(file, plain_file):
    for path, outputs in (
        (file, {"probability": ["batch", 2, 32, 32], "organ_probability": ["batch", 2]}),
        (plain_file, {"probability": ["batch", 2, 32, 32]}),
    ):
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        assert [(each.domain, each.version) for each in model.opset_import] == [("", OPSET)]
        assert shapes(model.graph.input) == {"slices": ["batch", 3, 32, 32]}
        assert shapes(model.graph.output) == outputs


def test_file_of_an_ensemble_computes_what_prediction_computes_or_is_not_written(
    tiny_params, tmp_path, monkeypatch
):
    members = []
    for seed in range(2):
        trained = shallow_trained(tiny_params, seed)
        bias_K2 = trained.network.classifier.conv.bias.data.unflatten(0, (-1, 2))
        # The second closes the liver in every slice, both close the spleen.
        bias_K2[:, 1] = torch.tensor([100.0 if seed == 0 else -100.0, -100.0])
        members.append(trained.network)
    together = Trained(Ensemble(members).eval(), trained.description)
    model = Model("organs", "3", SHA256, THRESHOLD, together)
    converted = []

    def convert(*arguments):
        graph = to_onnx(*arguments)
        converted.append(serialise(graph))
        return graph

    monkeypatch.setattr("tasks.export.to_onnx", convert)
    result = export(tmp_path / "organs.onnx", model)
    assert result.parity.difference < 1e-5
    session = onnxruntime.InferenceSession(
        tmp_path / "organs.onnx", providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    assert names == ["probability", "organ_probability"]
    image_ZHW = make_slices(32)
    x_BCHW = adjacent_slices(image_ZHW, torch.arange(len(image_ZHW)), 3)
    probability_BKHW, organ_BK = session.run(names, {"slices": x_BCHW.numpy()})
    alone = [predict_slices(prepare(each), image_ZHW).probabilities for each in members]
    mean_BKHW = torch.stack(alone).mean(dim=0).transpose(0, 1).numpy()
    np.testing.assert_allclose(probability_BKHW, mean_BKHW, atol=1e-5)
    assert 0 < probability_BKHW[:, 0].max() < 0.51  # half at most
    assert not probability_BKHW[:, 1].any()
    assert (organ_BK > 0.5).tolist() == [[True, False]] * len(image_ZHW)

    # A wrong weight of the member that closes every slice shows in none of the file's outputs.
    wrong = tamper(converted[0], "members.1.heads.0.weight", 0)
    monkeypatch.setattr("tasks.export.to_onnx", lambda *_: onnx_ir.from_proto(wrong))
    (tmp_path / "organs.onnx").write_bytes(b"an older one")
    with pytest.raises(StageError, match="is not written: ONNX Runtime's probabilities differ"):
        export(tmp_path / "organs.onnx", model)
    assert (tmp_path / "organs.onnx").read_bytes() == b"an older one"
    assert [path.name for path in tmp_path.iterdir()] == ["organs.onnx"]


def test_model_with_a_crf_is_refused(tiny_params, tmp_path):
    model = replace(random_model(tiny_params), refine="crf")
    with pytest.raises(StageError, match="a model with refine crf cannot be one ONNX file"):
        export(tmp_path / "organs.onnx", model)


def test_ensemble_with_gate_slab_is_refused(tiny_params, tmp_path):
    networks = [random_trained(tiny_params, seed=seed).network for seed in range(2)]
    together = Trained(Ensemble(networks).eval(), random_trained(tiny_params).description)
    model = replace(random_model(tiny_params), trained=together, gate="slab")
    with pytest.raises(StageError, match="ensemble with gate slab cannot be one ONNX file"):
        export(tmp_path / "organs.onnx", model)


def test_file_says_how_a_slice_is_prepared(file, classified):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    meta = session.get_modelmeta()
    facts = {key: json.loads(value) for key, value in meta.custom_metadata_map.items()}
    assert facts == {
        "model_name": "organs",
        "model_version": "3",
        "weights_sha256": SHA256,
        "organs": [{"name": "liver", "label_ids": [1]}, {"name": "spleen", "label_ids": [2]}],
        "size_px": 32,
        "pixel_mm": 12,
        "neighbour_mm": 8,
        "window_hu": [-160, 240],
        "body_threshold_hu": -300,
        "num_adjacent_slices": 3,
        "threshold": THRESHOLD,
        "gate": "hard",
        "refine": "none",
        "trained_on": json.loads(TRAINED_ON.model_dump_json()),
    }
    for key in ("size_px", "pixel_mm", "neighbour_mm", "body_threshold_hu", "window_hu"):
        assert key in meta.description


def test_file_holds_no_paths_of_this_machine(file):
    content = file.read_bytes()
    for private in (str(ROOT), sys.prefix, ".py", "pkg.torch"):
        assert private.encode() not in content


def test_same_model_gives_the_same_bytes(tiny_params, plain_file, tmp_path):
    export(tmp_path / "again.onnx", random_model(tiny_params))
    assert (tmp_path / "again.onnx").read_bytes() == plain_file.read_bytes()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_batches_of_any_size_give_what_prediction_gives(file, classified, batch_size):
    torch.manual_seed(1)
    image_ZHW = torch.rand(7, 32, 32)
    wanted = compute_reference(prepare(classified.trained.network), image_ZHW)
    assert not wanted["probability"][:, 0].any()
    assert 0.01 < (wanted["probability"][:, 1] >= THRESHOLD).mean() < 0.99
    found = compare_outputs(
        image_ZHW, wanted, file.read_bytes(), batch_size=batch_size, threshold=THRESHOLD
    )
    assert found.difference < 1e-5
    assert (found.num_different, found.num_pixels) == (0, 7 * 2 * 32 * 32)


def test_organ_that_the_classifier_finds_absent_is_exactly_zero(file):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    x_BCHW = np.random.default_rng(0).random((2, 3, 32, 32), dtype=np.float32)
    probability, organ_probability = session.run(None, {"slices": x_BCHW})
    assert not probability[:, 0].any()
    assert (probability[:, 1] > 0).all()
    assert (organ_probability[:, 0] < 0.5).all()
    assert (organ_probability[:, 1] > 0.5).all()


def tamper(content, name, channel):
    """The ONNX model with the sign of one channel's weights changed."""
    model = onnx.load_from_string(content)
    (weight,) = (each for each in model.graph.initializer if each.name == name)
    values = onnx.numpy_helper.to_array(weight).copy()
    values[channel] *= -1
    weight.CopyFrom(onnx.numpy_helper.from_array(values, name))
    return model


def test_comparison_sees_a_changed_weight_of_an_open_and_of_a_closed_organ(file, classified):
    image_ZHW = make_slices(32)
    wanted = compute_reference(prepare(classified.trained.network), image_ZHW)

    def difference(model):
        content = model.SerializeToString()
        return compare_outputs(
            image_ZHW, wanted, content, batch_size=5, threshold=THRESHOLD
        ).difference

    of_open = tamper(file.read_bytes(), "members.0.heads.0.weight", 1)
    assert difference(of_open) > 1e-2
    of_closed = tamper(file.read_bytes(), "members.0.heads.0.weight", 0)
    assert difference(of_closed) < 1e-5
    shape = ["batch", 2, 32, 32]
    logits = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, shape)
    of_closed.graph.output.append(logits)
    assert difference(of_closed) > 1e-2


def test_output_that_is_not_a_number_is_a_difference(plain_file, tiny_params):
    model = onnx.load(plain_file)
    for weight in model.graph.initializer:
        if weight.name == "members.0.head.weight":
            values = np.full_like(onnx.numpy_helper.to_array(weight), np.nan)
            weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    image_ZHW = make_slices(32)
    wanted = compute_reference(prepare(random_model(tiny_params).trained.network), image_ZHW)
    content = model.SerializeToString()
    found = compare_outputs(image_ZHW, wanted, content, batch_size=2, threshold=THRESHOLD)
    assert np.isnan(found.difference)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        # The first UNet is that of `plain_file`.
        *((name, {}) for name in NETWORKS if name not in ("unet", "pspnet")),
        ("pspnet", {"encoder": "resnet101"}),
    ],
)
def test_every_architecture_is_written_and_computes_the_same(tiny_params, tmp_path, name, changes):
    content = {"organs": {"liver": (1, 2), "spleen": (3,), "kidney": (4,)}, "architecture": name}
    options = {"deep_supervision": None, "cgm": None, **content, **changes}
    model = random_model(tiny_params, size_px=ODD_SIZE_PX, **options)
    written = export(tmp_path / "organs.onnx", model)
    # A hundred untrained layers round more: torch itself is 1e-4 from its float64 result.
    assert written.parity.difference < (TOLERANCE if "encoder" in changes else 1e-4)
    assert written.num_bytes == (tmp_path / "organs.onnx").stat().st_size


class Unusual(UNet):
    def decode(self, maps, *, all_heads):
        return [torch.special.bessel_j0(x) for x in super().decode(maps, all_heads=all_heads)]


def test_operation_that_onnx_lacks_is_named(tiny_params):
    network = build(describe_network("unet", tiny_params)).eval()
    network.__class__ = Unusual
    with pytest.raises(StageError, match=r"Unusual cannot be written as ONNX 18: .*bessel_j0"):
        to_onnx(network, 32)


def test_network_too_large_for_a_file_is_refused(tiny_params):
    description = describe_network("unet", tiny_params).model_copy(update={"width": 400})
    with torch.device("meta"):
        network = build(description)
    with pytest.raises(StageError, match=r"found a network of 6\.\d GB; one file of ONNX holds 2"):
        to_onnx(network, 32)


@pytest.mark.parametrize("name", ["organs.bin", "organs", "folder.onnx"])
def test_name_that_is_no_onnx_file_is_refused(tiny_params, tmp_path, name):
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(StageError, match=rf"found --onnx .*{name}; wanted the name of a file"):
        export(tmp_path / name, random_model(tiny_params))


def test_missing_package_is_named(tiny_params, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # Python's mark of a missing module
    with pytest.raises(StageError, match=r"lacks onnxscript; install the extra .*'\.\[onnx\]'"):
        export(tmp_path / "organs.onnx", random_model(tiny_params))


def alternating(tiny_params, gate, refine):
    """A model that finds each organ in some slices of a scan, whose probabilities overlap."""
    trained = shallow_trained(tiny_params)
    scan = Volume(make_body()[0], Geometry(make_body()[0].shape[::-1], np.diag([-7, -7, 8, 1.0])))
    classifier = trained.network.classifier.conv
    classifier.weight.data *= 100  # so that it is sure of most slices
    bias_K2 = classifier.bias.data.unflatten(0, (-1, 2))
    predictor = Predictor(trained, 0.5, 4, torch.device("cpu"))
    found = predictor.predict(predictor.slice_scan(scan), "none")
    odds_ZK = found.prediction.organ_probability.double().logit(eps=1e-6)
    bias_K2[:, 1] -= odds_ZK.quantile(0.7, dim=0).float()
    return Model("organs", "3", SHA256, THRESHOLD, trained, gate, refine)


# The graph of "none" is that of "slab"; "hard" is compared below.
@pytest.mark.parametrize(("gate", "refine"), [("slab", "largest_component"), ("soft", "none")])
def test_documented_example_finds_what_predict_finds_with_another_gate(
    tiny_params, tmp_path, gate, refine
):
    text = (ROOT / "docs/predict.md").read_text().partition("## ONNX\n")[2]
    (example,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)
    model = alternating(tiny_params, gate, refine)
    export(tmp_path / "organs.onnx", model)
    save_nifti(tmp_path / "scan.nii.gz", make_body()[0], (8.0, 7.0, 7.0), "RAS")
    done = subprocess.run(
        [sys.executable, "-c", example + "\nnp.save('labels.npy', label_ZYX)\n"],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    scan = read_image(tmp_path / "scan.nii.gz")
    predictor = Predictor(
        model.trained, THRESHOLD, 4, torch.device("cpu"), gate=gate, refine=refine
    )
    expected = predictor.segment(scan).label_map
    found = np.load(tmp_path / "labels.npy")
    assert (expected > 0).mean() > 0.001
    assert (found != expected).mean() < 1e-4


def test_documented_example_finds_what_predict_finds(file, classified, tmp_path):
    text = (ROOT / "docs/predict.md").read_text().partition("## ONNX\n")[2]
    (example,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)
    (tmp_path / "organs.onnx").write_bytes(file.read_bytes())
    save_nifti(tmp_path / "scan.nii.gz", make_body()[0], (8.0, 7.0, 7.0), "RAS")
    check = "\nimport sys\nassert 'torch' not in sys.modules\nnp.save('mask.npy', label_ZYX == 2)\n"
    done = subprocess.run(
        [sys.executable, "-c", example + check],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    predictor = Predictor(classified.trained, THRESHOLD, 4, torch.device("cpu"))
    masks = predictor.segment(read_image(tmp_path / "scan.nii.gz")).masks
    spleen = np.load(tmp_path / "mask.npy")
    assert 0.01 < spleen.mean() < 0.99
    np.testing.assert_array_equal(spleen, masks["spleen"])
    assert done.stdout.splitlines()[0] == "liver 0.0 ml"
    name, volume_ml, unit = done.stdout.splitlines()[1].split()
    assert (name, unit) == ("spleen", "ml")
    assert float(volume_ml) == pytest.approx(spleen.sum() * 8 * 7 * 7 / 1000)


def test_command_writes_the_named_model_and_shows_the_comparison(tiny_params, tmp_path):
    model = random_model(tiny_params)
    save_trained(tmp_path / "net", model.trained.network, model.trained.description)
    out = tmp_path / "new/organs.onnx"
    done = subprocess.run(
        [sys.executable, "-m", "tasks.cli", "export", "--onnx", out,
         "--model", tmp_path / "net"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    size = f"{out.stat().st_size / 1e6:.1f} MB"
    expected = rf"""export: .*organs\.onnx: unet, {size}, opset 18
export: ONNX Runtime and predict differ by at most \S+ in probability and in \d+ of \d+ mask pixels
"""
    assert re.fullmatch(expected, done.stdout)
    assert [path.name for path in out.parent.iterdir()] == ["organs.onnx"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("o.onnx",), "error: no params.yaml here names a registered model"),
        (("o.onnx", "--model", "models:/a@champion"), "error: there is no registry in mlruns/"),
        (("o.onnx", "--model", "nowhere"), "error: no trained network in nowhere"),
        (("o.zip", "--model", "nowhere"), "error: found --onnx o.zip; wanted"),
    ],
)
def test_command_fails_with_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    done = CliRunner().invoke(app, ["export", "--onnx", *arguments])
    assert done.exit_code == 1
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
