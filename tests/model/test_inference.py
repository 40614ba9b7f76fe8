from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from model.inference import (
    InferenceSettings,
    adjacent_slices,
    predict_batches,
    predict_slices,
    prepare,
)
from model.networks import NETWORKS, build_network
from model.output import organ_present, probabilities
from model.preprocessing import neighbour_step
from model.segmentation import SegmentationNetwork


def build(name: str, **parts: Any) -> SegmentationNetwork:
    """A network whose running statistics and gates differ from slice to slice."""
    torch.manual_seed(0)
    net = build_network(name, in_channels=3, num_organs=2, width=4, **parts)
    for _ in range(3):
        net(torch.rand(4, 3, 32, 32))
    if net.classifier is not None:
        scores = net.eval()(volume().unsqueeze(1).expand(-1, 3, -1, -1)).organ_logits
        difference = scores[..., 1] - scores[..., 0]
        bias = net.classifier.conv.bias.data.unflatten(0, (-1, 2))
        bias[:, 1] -= difference.median(dim=0).values
    return net.eval()


def volume(num_slices: int = 7, height: int = 32, width: int = 40) -> torch.Tensor:
    return torch.rand(num_slices, height, width, generator=torch.Generator().manual_seed(3))


def one_by_one(net: SegmentationNetwork, image: torch.Tensor, gating: str = "hard") -> torch.Tensor:
    """K x Z x H x W: each slice alone through the whole network."""
    padded = torch.cat([image[:1], image, image[-1:]])
    with torch.no_grad():
        slices = [probabilities(net(padded[None, z : z + 3]), gating)[0] for z in range(len(image))]
    return torch.stack(slices, dim=1)


def test_adjacent_slices_repeat_at_the_ends() -> None:
    image = torch.arange(4.0).reshape(4, 1, 1)
    stacks = adjacent_slices(image, torch.tensor([0, 1, 3]), 3)[..., 0, 0]
    assert stacks.tolist() == [[0, 0, 1], [0, 1, 2], [2, 3, 3]]
    wide = adjacent_slices(image, torch.tensor([0, 2]), 5)[..., 0, 0]
    assert wide.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 3]]


def test_neighbours_between_slices_are_interpolated() -> None:
    image = torch.tensor([0.0, 10, 30, 70]).reshape(4, 1, 1)
    stacks = adjacent_slices(image, torch.tensor([0, 1, 2, 3]), 3, step=0.25)[..., 0, 0]
    assert stacks.tolist() == [[0, 0, 2.5], [7.5, 10, 15], [25, 30, 40], [60, 70, 70]]
    far = adjacent_slices(image, torch.tensor([0, 2]), 3, step=1.5)[..., 0, 0]
    assert far.tolist() == [[0, 0, 20], [5, 30, 70]]


def test_neighbours_of_a_resampled_scan_are_those_of_the_scan() -> None:
    """The image between slices is linear, so a scan with more slices shows the same."""
    image = torch.rand(6, 5, 5, generator=torch.Generator().manual_seed(0))
    at = torch.arange(21) / 4
    low = at.long().clamp(max=4)
    thin = torch.lerp(image[low], image[low + 1], (at - low)[:, None, None])
    expected = adjacent_slices(image, torch.arange(6), 3)
    found = adjacent_slices(thin, 4 * torch.arange(6), 3, step=neighbour_step(7.0, 1.75))
    assert torch.allclose(found, expected, atol=1e-6)


def test_neighbours_at_the_spacing_are_the_slices_themselves() -> None:
    step = neighbour_step(6.999999, 7.0000005)  # headers hold float32
    assert step == 1
    image = torch.rand(6, 5, 5)
    stacks = adjacent_slices(image, torch.arange(6), 3, step)
    assert torch.equal(stacks, adjacent_slices(image, torch.arange(6), 3))


@pytest.mark.parametrize("step", [0.0, -1.0, float("nan")])
def test_distance_of_neighbours_must_be_positive(step: float) -> None:
    with pytest.raises(ValueError, match="it must be above 0"):
        adjacent_slices(volume(), torch.tensor([0]), 3, step)


@pytest.mark.parametrize("num_adjacent", [0, -1, 2, 4])
def test_adjacent_slices_must_be_odd(num_adjacent: int) -> None:
    with pytest.raises(ValueError, match=f"num_adjacent is {num_adjacent}: it must be odd"):
        adjacent_slices(volume(), torch.tensor([0]), num_adjacent)


@pytest.mark.parametrize("gating", ["hard", "soft", "none"])
@pytest.mark.parametrize("name", NETWORKS)
def test_prediction_equals_the_network_slice_by_slice(name: str, gating: str) -> None:
    net, image = build(name), volume()
    expected = one_by_one(net, image, gating)
    prepared = prepare(net)
    for batch_size in (1, 3, 16):
        found = predict_slices(
            prepared, image, InferenceSettings(batch_size=batch_size, gating=gating)
        )
        assert found.probabilities.shape == (2, 7, 32, 40)
        torch.testing.assert_close(found.probabilities, expected, atol=1e-5, rtol=1e-5)


def test_decoder_runs_only_for_slices_with_an_open_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    net, image = build("unet3plus"), volume(9)
    scores = net(adjacent_slices(image, torch.arange(9), 3)).organ_logits
    num_open = int(organ_present(scores).any(dim=1).sum())
    assert 0 < num_open < 9
    decoded = []
    decode = net.decode

    def counting(maps: list[torch.Tensor], *, all_heads: bool) -> list[torch.Tensor]:
        decoded.append(len(maps[0]))
        return decode(maps, all_heads=all_heads)

    monkeypatch.setattr(net, "decode", counting)
    predict_slices(net, image, InferenceSettings(batch_size=4))
    assert sum(decoded) == num_open


def test_closed_slices_are_exactly_zero_and_organ_probability_says_why() -> None:
    found = predict_slices(build("unet3plus"), volume(9))
    assert found.organ_probability.shape == (9, 2)
    closed = (found.organ_probability <= 0.5).T
    assert closed.any()
    assert not closed.all()
    assert found.probabilities[closed].abs().max() == 0
    assert (found.probabilities[~closed].amax(dim=(1, 2)) > 0).all()


def test_all_gates_closed_gives_an_empty_prediction() -> None:
    net = build("unet3plus")
    net.classifier.conv.bias.data = torch.tensor([100.0, -100.0, 100.0, -100.0])
    found = predict_slices(net, volume())
    assert found.probabilities.abs().max() == 0


def test_network_without_a_classifier_gives_no_organ_probability() -> None:
    assert predict_slices(build("unet"), volume()).organ_probability is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_probabilities_have_the_requested_type(dtype: torch.dtype) -> None:
    found = predict_slices(build("unet"), volume(), dtype=dtype)
    assert found.probabilities.dtype == dtype


def test_half_precision_images_are_accepted() -> None:
    net, image = build("unet"), volume().half()
    found = predict_slices(net, image)
    torch.testing.assert_close(
        found.probabilities, one_by_one(net, image.float()), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(("height", "width"), [(33, 34), (35, 50), (17, 32)])
def test_prediction_of_odd_sizes(height: int, width: int) -> None:
    net, image = build("unet3plus"), volume(3, height, width)
    found = predict_slices(prepare(net), image)
    torch.testing.assert_close(found.probabilities, one_by_one(net, image), atol=1e-5, rtol=1e-5)


def test_one_slice_is_enough() -> None:
    net, image = build("unet"), volume(1)
    torch.testing.assert_close(
        predict_slices(net, image).probabilities, one_by_one(net, image), atol=1e-5, rtol=1e-5
    )


def test_prediction_leaves_the_network_in_its_mode() -> None:
    net = build("unet").train()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    predict_slices(net, volume())
    assert net.training
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize(
    "image",
    [torch.zeros(3, 8), torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8).int(), torch.zeros(0, 8, 8)],
)
def test_other_images_are_refused(image: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected floating point slices x height x width"):
        predict_slices(build("unet"), image)


def test_batch_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        predict_slices(build("unet"), volume(), InferenceSettings(batch_size=0))


def test_unknown_gate_is_refused() -> None:
    with pytest.raises(ValueError, match="use one of hard, slab, soft, none"):
        predict_slices(build("unet"), volume(), InferenceSettings(gating="closed"))


@pytest.mark.parametrize("name", NETWORKS)
def test_prepared_network_has_no_batch_norm_and_the_same_output(name: str) -> None:
    net = build(name)
    ready = prepare(net)
    assert not [each for each in ready.modules() if isinstance(each, torch.nn.BatchNorm2d)]
    x = torch.rand(2, 3, 48, 64)
    expected, found = net(x, all_heads=True), ready(x, all_heads=True)
    for one, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    if expected.organ_logits is not None:
        assert torch.equal(organ_present(found.organ_logits), organ_present(expected.organ_logits))


def test_preparing_leaves_the_network_alone() -> None:
    net = build("unet3plus").train()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    prepare(net)
    assert net.training
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("step", [0.8, 1.0, 2.5, 3.0])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 16])
def test_slab_opens_slices_next_to_an_open_one(batch_size: int, step: float) -> None:
    """In batches of any size, smaller than the reach too."""
    net, image = build("unet3plus"), volume(11)
    settings = InferenceSettings(batch_size=batch_size, neighbour_step=step, gating="slab")
    found = predict_slices(net, image, settings)
    plain = predict_slices(net, image, replace(settings, gating="none"))
    reach = max(1, int(step))
    shown = plain.organ_probability > 0.5
    opened = torch.stack(
        [shown[max(0, z - reach) : z + reach + 1].any(dim=0) for z in range(len(image))]
    )
    assert torch.equal(found.organ_probability, plain.organ_probability)
    assert shown.sum() < opened.sum()
    if step == 1:
        assert not opened.all()
    expected = plain.probabilities * opened.T[..., None, None]
    torch.testing.assert_close(found.probabilities, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.probabilities == 0, expected == 0)


def test_maps_of_a_batch_do_not_outlive_its_decoding() -> None:
    """Else two batches of maps would be in memory where one suffices."""
    net, kept = build("unet"), []

    def keep(module: Any, inputs: Any, maps: list[torch.Tensor]) -> None:
        kept.append(weakref.ref(maps[0]))

    net.encoder.register_forward_hook(keep)
    for _ in predict_batches(net, volume(), InferenceSettings(batch_size=2)):
        assert kept[-1]() is None


@pytest.mark.parametrize("gating", ["hard", "slab", "none"])
@pytest.mark.parametrize("name", ["unet", "unet3plus"])
def test_batches_are_the_prediction_in_parts(name: str, gating: str) -> None:
    net, image = build(name), volume()
    whole = predict_slices(net, image, InferenceSettings(batch_size=3, gating=gating))
    batches = list(predict_batches(net, image, InferenceSettings(batch_size=3, gating=gating)))
    assert [batch.slices for batch in batches] == [slice(0, 3), slice(3, 6), slice(6, 7)]
    for batch in batches:
        assert torch.equal(batch.probabilities, whole.probabilities[:, batch.slices])
        if whole.organ_probability is None:
            assert batch.organ_probability is None
        else:
            assert torch.equal(batch.organ_probability, whole.organ_probability[batch.slices])


def test_batches_are_made_on_demand() -> None:
    net, seen = build("unet"), []
    net.encoder.register_forward_hook(lambda *_: seen.append(1))
    batches = predict_batches(net, volume(), InferenceSettings(batch_size=1))
    assert seen == []
    next(batches)
    assert len(seen) == 1


def test_batches_left_early_leave_the_network_in_its_mode() -> None:
    net = build("unet").train()
    batches = predict_batches(net, volume(), InferenceSettings(batch_size=1))
    next(batches)
    assert not net.training
    batches.close()
    assert net.training


def test_invalid_arguments_are_refused_before_the_first_batch() -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        predict_batches(build("unet"), volume(), InferenceSettings(batch_size=0))


def test_lower_precision_is_autocast_and_close() -> None:
    net, image = prepare(build("unet3plus")), volume()
    exact = predict_slices(net, image, InferenceSettings(gating="none")).probabilities
    rough = predict_slices(
        net, image, InferenceSettings(gating="none", precision=torch.bfloat16)
    ).probabilities
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, atol=0.05, rtol=0)
