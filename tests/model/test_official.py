from __future__ import annotations

import pytest
import torch
from literal_networks import FORWARD, State, random_state

from model.inference import prepare
from model.official import OFFICIAL, from_official

PUBLISHED_PARAMETERS = {
    "unet": 39_396_033,
    "unetplusplus": 47_176_132,
    "unet3plus": 26_971_777,
    "unet3plus_ds": 26_989_637,
    "unet3plus_ds_cgm": 26_989_637 + 2 * 1024 + 2,
}


def copied(state: State) -> State:
    return {key: value.clone() for key, value in state.items()}


def in_double(state: State) -> State:
    return {k: v.double() if v.is_floating_point() else v for k, v in state.items()}


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_literal_formulation_has_the_published_size(name: str) -> None:
    state = random_state(name, width=64)
    counted = [v for k, v in state.items() if "running" not in k and "num_batches" not in k]
    assert sum(value.numel() for value in counted) == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("size", [(32, 48), (64, 64)])
@pytest.mark.parametrize("name", OFFICIAL)
def test_network_equals_the_literal_formulation(
    name: str, size: tuple[int, int], training: bool
) -> None:
    state = in_double(random_state(name, width=5, num_organs=2))
    net = from_official(name, copied(state)).double().train(training)
    if net.classifier is not None:
        net.classifier.dropout.eval()
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)).double()
    logits, scores = FORWARD[name](state, x, training)
    found = net(x, all_heads=True)
    assert len(found.logits) == len(logits)
    for one, other in zip(found.logits, logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)
    if scores is None:
        assert found.organ_logits is None
    else:
        torch.testing.assert_close(found.organ_logits, scores[:, None].expand(-1, 2, -1))


@pytest.mark.parametrize("name", OFFICIAL)
def test_running_statistics_after_a_training_step_equal_the_literal_ones(name: str) -> None:
    state = random_state(name, width=4)
    net = from_official(name, copied(state))
    x = torch.rand(2, 3, 32, 48)
    FORWARD[name](state, x, True)
    net(x)
    for key, value in from_official(name, state).state_dict().items():
        if "running" in key:
            torch.testing.assert_close(net.state_dict()[key], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", OFFICIAL)
def test_gradients_equal_the_literal_ones(name: str) -> None:
    state = in_double(random_state(name, width=4))
    net = from_official(name, copied(state)).double()
    if net.classifier is not None:
        net.classifier.dropout.eval()
    x = torch.rand(2, 3, 32, 48, dtype=torch.float64)
    leaves = {k: v.requires_grad_() for k, v in state.items() if k.endswith(("weight", "bias"))}
    logits, scores = FORWARD[name](state, x, True)
    found = net(x)
    total = sum((each**2).mean() for each in logits)
    ours = sum((each**2).mean() for each in found.logits)
    if scores is not None:
        total, ours = total + scores.sum(), ours + found.organ_logits.sum()
    total.backward()
    ours.backward()
    gradients = {k: v.detach() for k, v in state.items()} | {k: v.grad for k, v in leaves.items()}
    expected = dict(from_official(name, gradients).double().named_parameters())
    for key, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key].double(), atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize("name", OFFICIAL)
def test_folded_network_equals_the_literal_formulation(name: str) -> None:
    state = random_state(name, width=5)
    net = prepare(from_official(name, state))
    x = torch.rand(2, 3, 48, 32)
    logits, _ = FORWARD[name](state, x, False)
    error = (net(x).logits[0] - logits[0]).abs().max()
    assert error < 1e-5 * logits[0].abs().max()


@pytest.mark.parametrize(("width", "in_channels", "num_organs"), [(3, 1, 1), (6, 5, 3)])
@pytest.mark.parametrize("name", OFFICIAL)
def test_sizes_are_read_from_the_checkpoint(
    name: str, width: int, in_channels: int, num_organs: int
) -> None:
    state = random_state(name, width=width, in_channels=in_channels, num_organs=num_organs)
    output = from_official(name, state).eval()(torch.rand(1, in_channels, 32, 32))
    assert output.logits[0].shape == (1, num_organs, 32, 32)


def test_names_of_a_data_parallel_checkpoint_are_understood() -> None:
    state = random_state("unet", width=4)
    wrapped = {f"module.{key}": value for key, value in state.items()}
    plain, found = (from_official("unet", each).eval() for each in (state, wrapped))
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(plain(x).logits[0], found(x).logits[0])


def test_checkpoint_without_batch_counters_is_accepted() -> None:
    state = {k: v for k, v in random_state("unet", width=4).items() if "num_batches" not in k}
    from_official("unet", state)


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="use one of unet, unetplusplus, unet3plus, unet3plus_ds"):
        from_official("unet3+", {})


def test_another_networks_checkpoint_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no official unetplusplus: .* lacks conv00\.conv1\.0"):
        from_official("unetplusplus", random_state("unet", width=4))


def test_empty_checkpoint_is_refused() -> None:
    with pytest.raises(ValueError, match="it begins with nothing"):
        from_official("unet", {})


def test_missing_entries_are_named() -> None:
    state = random_state("unet3plus_ds", width=4)
    del state["conv3.conv1.0.bias"]
    with pytest.raises(ValueError, match=r"lacks encoder\.levels\.2\.0\.conv\.bias"):
        from_official("unet3plus_ds", state)


def test_surplus_entries_are_named() -> None:
    with pytest.raises(ValueError, match=r"has too much cls\.1\.weight, cls\.1\.bias"):
        from_official("unet3plus_ds", random_state("unet3plus_ds_cgm", width=4))


def test_other_shapes_are_named() -> None:
    state = random_state("unet", width=4)
    state["outconv1.bias"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"head\.bias \(7,\) instead of \(1,\)"):
        from_official("unet", state)
