from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from model.context import PooledBranch
from model.encoders import Encoder, PlainEncoder, ResNet101Encoder
from model.losses import total_loss
from model.networks import ENCODERS, NETWORKS, build_network, list_networks
from model.segmentation import SegmentationNetwork
from model.unet import AttentionGate

PUBLISHED_PARAMETERS = [
    ("unet_official", {}, 39_396_033),
    ("unetplusplus", {}, 47_176_132),
    ("unet3plus", {"deep_supervision": False, "cgm": False}, 26_971_777),
    ("unet3plus", {"deep_supervision": True, "cgm": False}, 26_989_637),
    ("unet3plus", {"deep_supervision": True, "cgm": True}, 26_989_637 + 2 * 1024 + 2),
]


def variants() -> list[tuple[str, dict[str, Any]]]:
    """Every network with every combination of its parts."""
    found = []
    for name, info in NETWORKS.items():
        parts = {
            "encoder": list(info.stride),
            "deep_supervision": (False, True) if "deep_supervision" in info.takes else (False,),
            "cgm": (False, True) if "cgm" in info.takes else (False,),
        }
        found += [
            (name, dict(zip(parts, each, strict=True)))
            for each in itertools.product(*parts.values())
        ]
    return found


VARIANTS = variants()
IDS = [f"{name}-{'-'.join(str(each) for each in parts.values())}" for name, parts in VARIANTS]


def build(name: str, parts: dict[str, Any], **other: int) -> SegmentationNetwork:
    torch.manual_seed(0)
    sizes = {"in_channels": 3, "num_organs": 2, "width": 4} | other
    return build_network(name, **sizes, **parts)


@pytest.mark.parametrize(("name", "parts", "count"), PUBLISHED_PARAMETERS)
def test_parameter_count_is_the_published_one(name: str, parts: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        net = build_network(name, in_channels=3, num_organs=1, **parts)
    assert sum(each.numel() for each in net.parameters()) == count


@pytest.mark.parametrize(("name", "parts"), VARIANTS, ids=IDS)
def test_output_shapes_in_both_modes(name: str, parts: dict[str, Any]) -> None:
    net = build(name, parts)
    x = torch.rand(2, 3, 64, 48)
    trained = net(x)
    assert len(trained.logits) > 1 if parts["deep_supervision"] else len(trained.logits) == 1
    for logits in trained.logits:
        assert logits.shape == (2, 2, 64, 48)
    evaluated = net.eval()(x)
    assert [each.shape for each in evaluated.logits] == [(2, 2, 64, 48)]
    for output in (trained, evaluated):
        if parts["cgm"]:
            assert output.organ_logits.shape == (2, 2, 2)
        else:
            assert output.organ_logits is None


@pytest.mark.parametrize(("name", "parts"), VARIANTS, ids=IDS)
def test_all_heads_in_eval_mode_on_request(name: str, parts: dict[str, Any]) -> None:
    net = build(name, parts)
    x = torch.rand(1, 3, 32, 32)
    num_heads = len(net(x.expand(2, -1, -1, -1)).logits)
    net.eval()
    every, finest = net(x, all_heads=True), net(x)
    assert len(every.logits) == num_heads
    torch.testing.assert_close(every.logits[0], finest.logits[0])


@pytest.mark.parametrize("size", [(33, 34), (35, 47), (16, 17), (63, 96)])
@pytest.mark.parametrize("name", NETWORKS)
def test_any_size_is_padded_and_cropped(name: str, size: tuple[int, int]) -> None:
    net = build(name, {}).eval()
    assert net(torch.rand(1, 3, *size)).logits[0].shape == (1, 2, *size)


@pytest.mark.parametrize("name", NETWORKS)
def test_odd_size_equals_the_same_image_padded_by_hand(name: str) -> None:
    net = build(name, {}).eval()
    x = torch.rand(1, 3, 30, 32)
    height = -(-30 // net.stride) * net.stride
    top = (height - 30) // 2
    whole = torch.zeros(1, 3, height, 32)
    whole[:, :, top : top + 30] = x
    torch.testing.assert_close(
        net(x).logits[0], net(whole).logits[0][:, :, top : top + 30], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("in_channels", [1, 5])
@pytest.mark.parametrize("num_organs", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_any_number_of_channels_and_organs(name: str, in_channels: int, num_organs: int) -> None:
    net = build(name, {}, in_channels=in_channels, num_organs=num_organs)
    assert net.eval()(torch.rand(1, in_channels, 32, 32)).logits[0].shape == (1, num_organs, 32, 32)


@pytest.mark.parametrize(("name", "parts"), VARIANTS, ids=IDS)
def test_every_parameter_gets_a_finite_gradient(name: str, parts: dict[str, Any]) -> None:
    net = build(name, parts)
    target = torch.rand(2, 2, 64, 64) > 0.5
    target[0, 0] = False
    total_loss(net(torch.rand(2, 3, 64, 64)), target).total.backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        if "norm" in key or "weight" in key:
            assert parameter.grad.abs().max() > 0, key


def test_classifier_learns_which_slices_hold_the_organ() -> None:
    net = build("unet3plus", {})
    x = torch.zeros(8, 3, 32, 32)
    target = torch.zeros(8, 2, 32, 32)
    x[:4, :, 8:24, 8:24] = 1
    target[:4, :, 8:24, 8:24] = 1
    optimizer = torch.optim.Adam(net.classifier.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = total_loss(net(x), target, terms=("iou",)).classification
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize(("name", "parts"), VARIANTS, ids=IDS)
def test_weights_survive_safetensors(name: str, parts: dict[str, Any]) -> None:
    net, other = (
        build(name, parts).eval(),
        build_network(name, in_channels=3, num_organs=2, width=4, **parts),
    )
    other.load_state_dict(load(save(net.state_dict())))
    x = torch.rand(1, 3, 32, 48)
    assert torch.equal(net(x).logits[0], other.eval()(x).logits[0])


@pytest.mark.parametrize(("name", "parts"), VARIANTS, ids=IDS)
def test_channels_last_gives_the_same(name: str, parts: dict[str, Any]) -> None:
    net = build(name, parts).eval()
    x = torch.rand(2, 3, 48, 64)
    expected = net(x, all_heads=True)
    net.to(memory_format=torch.channels_last)
    found = net(x.to(memory_format=torch.channels_last), all_heads=True)
    for one, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "parts"), VARIANTS, ids=IDS)
def test_autocast_bfloat16_stays_close(name: str, parts: dict[str, Any]) -> None:
    net = build(name, parts).eval()
    x = torch.rand(2, 3, 64, 64)
    expected = net(x).logits[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = net(x).logits[0]
    spread = expected.std()
    assert (found.float() - expected).abs().mean() < 0.1 * spread


@pytest.mark.parametrize("side", [64, 96])
@pytest.mark.parametrize(
    ("kind", "stride", "channels", "strides"),
    [
        (PlainEncoder, 16, [3, 6, 12, 24, 48], [1, 2, 4, 8, 16]),
        (PlainEncoder, 8, [3, 6, 12, 24, 48], [1, 2, 4, 8, 8]),
        (PlainEncoder, 32, [3, 6, 12, 24, 48, 48], [1, 2, 4, 8, 16, 32]),
        (ResNet101Encoder, 32, [3, 12, 24, 48, 96], [2, 4, 8, 16, 32]),
        (ResNet101Encoder, 16, [3, 12, 24, 48, 96], [2, 4, 8, 16, 16]),
        (ResNet101Encoder, 8, [3, 12, 24, 48, 96], [2, 4, 8, 8, 8]),
    ],
)
def test_encoder_maps_have_the_channels_and_strides_it_states(
    kind: type[Encoder], stride: int, channels: list[int], strides: list[int], side: int
) -> None:
    encoder = kind(2, 3, stride=stride)
    assert (encoder.channels, encoder.strides) == (channels, strides)
    maps = encoder.eval()(torch.rand(1, 2, side, side))
    assert [each.shape for each in maps] == [
        (1, c, side // s, side // s) for c, s in zip(channels, strides, strict=True)
    ]


def test_resnet101_has_the_published_size() -> None:
    with torch.device("meta"):
        encoder = ResNet101Encoder(3, 64)
    classifier = 2048 * 1000 + 1000
    assert sum(each.numel() for each in encoder.parameters()) + classifier == 44_549_160


def test_closed_attention_gate_lets_nothing_through() -> None:
    gate = AttentionGate(6).eval()
    gate.score.norm.bias.data.fill_(-1e4)
    x = torch.rand(1, 6, 4, 4)
    assert gate(x, torch.rand_like(x)).abs().max() == 0
    gate.score.norm.bias.data.fill_(1e4)
    assert torch.equal(gate(x, torch.rand_like(x)), x)


@pytest.mark.parametrize("name", ["pspnet", "deeplabv3", "deeplabv3plus"])
def test_global_pooling_trains_on_a_single_image(name: str) -> None:
    net = build(name, {})
    net(torch.rand(1, 3, 32, 32)).logits[0].sum().backward()
    assert all(torch.isfinite(each.grad).all() for each in net.parameters())


@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_pooled_branch_of_a_constant_map_is_constant(bins: int) -> None:
    branch = PooledBranch(3, 2, bins).eval()
    y = branch(torch.full((1, 3, 5, 7), 0.5))
    torch.testing.assert_close(y, y[..., :1, :1].expand_as(y))


@pytest.mark.slow
def test_description_counts_parameters_and_multiplications() -> None:
    rows = {(row.name, row.encoder): row for row in list_networks(side_px=320)}
    assert len(rows) == sum(len(info.stride) for info in NETWORKS.values())
    for row in rows.values():
        if row.encoder == "plain" and row.published_parameters_m is not None:
            assert row.parameters / 1e6 == pytest.approx(row.published_parameters_m, abs=0.02)
    assert rows["unet_official", "plain"].parameters == 39_396_033
    assert rows["unet_official", "plain"].gmac == pytest.approx(85, abs=1)
    assert rows["unet3plus", "plain"].gmac < 0.6 * 309


def test_published_resnet101_rows_share_the_plain_decoders() -> None:
    published = [info.published_parameters_m for info in NETWORKS.values()]
    differences = [each["resnet101"] - each["plain"] for each in published if each]
    assert max(differences) - min(differences) < 0.1


def test_same_seed_gives_the_same_weights() -> None:
    first, second = (build("unet3plus", {}).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_convolutions_are_kaiming_normal_and_norms_are_the_identity() -> None:
    net = build("unet3plus", {}, width=16)
    mix = net.levels[0].mix
    assert mix.weight.std().item() == pytest.approx((2 / (80 * 9)) ** 0.5, rel=0.02)
    assert mix.bias.abs().max() == 0
    assert torch.equal(net.levels[0].norm.weight, torch.ones(80))


def test_variance_survives_a_transposed_convolution() -> None:
    net = build("unet", {}, width=16)
    up = net.ups[-1]
    y = up(torch.randn(1, up.in_channels, 32, 32))
    assert y[..., 4:-4, 4:-4].std().item() == pytest.approx(1, rel=0.1)


def test_unknown_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown network 'u-net': use one of unet, "):
        build_network("u-net", in_channels=3, num_organs=1)


def test_unknown_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown encoder 'vgg': use one of plain, resnet101"):
        build_network("unet", in_channels=3, num_organs=1, encoder="vgg")


@pytest.mark.parametrize("part", ["cgm", "deep_supervision"])
def test_a_part_that_the_network_lacks_is_refused(part: str) -> None:
    with pytest.raises(ValueError, match=rf"network 'unet' has no {part}: .*unet3plus"):
        build_network("unet", in_channels=3, num_organs=1, **{part: True})
    build_network("unet", in_channels=3, num_organs=1, width=4, **{part: False})


@pytest.mark.parametrize("key", ["in_channels", "num_organs", "width"])
def test_numbers_below_one_are_refused(key: str) -> None:
    numbers = {"in_channels": 3, "num_organs": 1, "width": 4, key: 0}
    with pytest.raises(ValueError, match=f"{key} is 0: it must be at least 1"):
        build_network("unet", **numbers)


def test_every_network_names_its_source_and_encoders() -> None:
    for info in NETWORKS.values():
        assert "20" in info.source
        assert set(info.stride) == set(ENCODERS)


@pytest.mark.slow  # compiles each network
@pytest.mark.parametrize(
    ("name", "training"), [*((name, True) for name in NETWORKS), ("unet3plus", False)]
)
def test_compiled_network_is_one_graph_with_the_same_output(name: str, training: bool) -> None:
    net = build(name, {}).train(training)
    for module in net.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.eval()
    x = torch.rand(2, 3, 64, 64)
    expected = net(x)
    torch.compiler.reset()
    found = torch.compile(net, fullgraph=True, backend="aot_eager")(x)
    for one, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
