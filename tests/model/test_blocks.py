from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from model.blocks import (
    RECOMPUTE_FROM_BYTES,
    ConvBlock,
    DoubleConv,
    Recomputing,
    fold_norm,
    join,
    norm_relu_then,
)
from model.losses import total_loss
from model.networks import build_network
from model.segmentation import OrganClassifier, pad_to_multiple, restore


def shaken(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm


@pytest.mark.parametrize("size", [(16, 32), (33, 34), (35, 1), (1, 47)])
def test_padding_and_cropping_undo_each_other(size: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *size)
    padded, frame = pad_to_multiple(x, 16)
    assert all(each % 16 == 0 for each in padded.shape[-2:])
    assert all(0 <= a - b < 16 for a, b in zip(padded.shape[-2:], size, strict=True))
    assert torch.equal(restore(padded, frame), x)
    assert padded.sum().item() == pytest.approx(x.sum().item(), rel=1e-5)


def test_join_concatenates_channels_in_any_layout() -> None:
    parts = [
        torch.rand(2, 3, 4, 5),
        torch.rand(2, 1, 4, 5).to(memory_format=torch.channels_last),
        torch.rand(4, 2, 5, 2).permute(1, 3, 0, 2),
    ]
    joined = join(parts)
    assert torch.equal(joined, torch.cat(parts, dim=1))
    assert joined.is_contiguous(memory_format=torch.channels_last)


def test_one_norm_over_two_convolutions_folds_into_both() -> None:
    convs = [nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1, bias=False)]
    norm = shaken(nn.BatchNorm2d(6)).eval()
    x = torch.rand(2, 3, 8, 8)
    expected = norm(torch.cat([conv(x) for conv in convs], dim=1))
    fold_norm(convs, norm)
    found = torch.cat([conv(x) for conv in convs], dim=1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_norm_without_statistics_is_not_folded() -> None:
    norm = nn.BatchNorm2d(2, track_running_stats=False)
    with pytest.raises(ValueError, match="without running statistics cannot be folded"):
        fold_norm([nn.Conv2d(1, 2, 3)], norm)


@pytest.mark.parametrize("norm", [True, False])
def test_conv_block_is_convolution_norm_relu(norm: bool) -> None:
    block = ConvBlock(3, 4, norm=norm)
    x = torch.rand(2, 3, 8, 8)
    plain = F.conv2d(x, block.conv.weight, block.conv.bias, padding=1)
    if norm:
        plain = F.batch_norm(plain, None, None, training=True)
    torch.testing.assert_close(block(x), plain.clamp(min=0))
    assert block(x).min() == 0


def test_double_conv_is_its_two_blocks() -> None:
    double = DoubleConv(3, 4)
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(double(x), double[1](double[0](x)))


@pytest.mark.parametrize("training", [True, False])
def test_recomputing_changes_neither_output_gradient_nor_statistics(
    training: bool,
) -> None:
    results = []
    for threshold in (0, None):
        torch.manual_seed(0)
        norm, conv = shaken(nn.BatchNorm2d(3)).train(training), nn.Conv2d(3, 2, 3)
        x = torch.randn(2, 3, 6, 6, requires_grad=True)
        y = norm_relu_then(norm, conv, x, threshold)
        (y**2).sum().backward()
        results.append([y, x.grad, *(p.grad for p in conv.parameters()), *norm.buffers()])
        assert norm.num_batches_tracked == training
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_recomputing_a_network_gives_the_same_step() -> None:
    steps = []
    for threshold in (0, None):
        torch.manual_seed(0)
        net = build_network("unet3plus", in_channels=3, num_organs=1, width=4)
        net.recompute_maps(threshold)
        x, target = torch.rand(2, 3, 32, 32), torch.rand(2, 1, 32, 32) > 0.5
        total_loss(net(x), target).total.backward()
        steps.append([p.grad for p in net.parameters()] + list(net.buffers()))
    for one, other in zip(*steps, strict=True):
        torch.testing.assert_close(one, other)


def test_recomputing_keeps_one_map_instead_of_two() -> None:
    kept = {}
    for threshold in (0, None):
        norm, conv = nn.BatchNorm2d(8), nn.Conv2d(8, 1, 1)
        x = torch.rand(1, 8, 64, 64, requires_grad=True)
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            y = norm_relu_then(norm, conv, x * 1, threshold)
        kept[threshold] = sum(e.self_cpu_memory_usage for e in profile.key_averages())
        y.sum().backward()
        del y
    assert kept[None] - kept[0] == pytest.approx(8 * 64 * 64 * 4, rel=0.05)


def test_classifier_takes_the_maximum_of_a_1x1_convolution() -> None:
    classifier = OrganClassifier(5, 3).eval()
    x = torch.randn(2, 5, 4, 4)
    scores = torch.einsum("bchw,oc->bohw", x, classifier.conv.weight[:, :, 0, 0])
    scores = scores.flatten(2).max(dim=2).values + classifier.conv.bias
    torch.testing.assert_close(classifier(x), scores.view(2, 3, 2))


def test_classifier_drops_half_of_its_input_in_training() -> None:
    torch.manual_seed(0)
    x = torch.ones(1, 1000, 1, 1)
    dropped = OrganClassifier(1000, 1).dropout(x)
    assert dropped.eq(0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert dropped.max() == 2


def test_only_large_maps_are_recomputed_by_default() -> None:
    net = build_network("unet3plus", in_channels=3, num_organs=1, width=4)
    found = {each.recompute_from_bytes for each in net.modules() if isinstance(each, Recomputing)}
    assert found == {RECOMPUTE_FROM_BYTES}
    net.recompute_maps(None)
    found = {each.recompute_from_bytes for each in net.modules() if isinstance(each, Recomputing)}
    assert found == {None}
