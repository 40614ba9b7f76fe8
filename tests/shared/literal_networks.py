"""The published networks, formulated plainly over a state dict in their authors' names.

Nothing here is shared with the package: convolutions after upsampling, one batch norm for each
branch, pooling by the whole factor. It is the reference for tests and benchmarks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

State = dict[str, Tensor]


def conv(state: State, name: str, x: Tensor) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)


def batch_norm(state: State, name: str, x: Tensor, training: bool) -> Tensor:
    names = ("running_mean", "running_var", "weight", "bias")
    return F.batch_norm(x, *(state[f"{name}.{each}"] for each in names), training=training)


def block(state: State, name: str, x: Tensor, training: bool) -> Tensor:
    for j in (1, 2):
        x = conv(state, f"{name}.conv{j}.0", x)
        if f"{name}.conv{j}.1.weight" in state:
            x = batch_norm(state, f"{name}.conv{j}.1", x, training)
        x = F.relu(x)
    return x


def up(state: State, name: str, x: Tensor) -> Tensor:
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return F.conv_transpose2d(x, weight, bias, stride=2, padding=1)


def upsample(x: Tensor, scale: int) -> Tensor:
    return F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)


def unet(state: State, x: Tensor, training: bool) -> tuple[list[Tensor], Tensor | None]:
    encoded = []
    for name in ("conv1", "conv2", "conv3", "conv4", "center"):
        encoded.append(block(state, name, F.max_pool2d(encoded[-1], 2) if encoded else x, training))
    x = encoded[4]
    for i in (4, 3, 2, 1):
        joined = torch.cat([up(state, f"up_concat{i}.up", x), encoded[i - 1]], 1)
        x = block(state, f"up_concat{i}.conv", joined, training)
    return [conv(state, "outconv1", x)], None


def unetplusplus(state: State, x: Tensor, training: bool) -> tuple[list[Tensor], Tensor | None]:
    node = {(0, 0): block(state, "conv00", x, training)}
    for i in (1, 2, 3, 4):
        node[i, 0] = block(state, f"conv{i}0", F.max_pool2d(node[i - 1, 0], 2), training)
    for j in (1, 2, 3, 4):
        for i in range(5 - j):
            below = up(state, f"up_concat{i}{j}.up", node[i + 1, j - 1])
            joined = torch.cat([below, *(node[i, k] for k in range(j))], 1)
            node[i, j] = block(state, f"up_concat{i}{j}.conv", joined, training)
    heads = [conv(state, f"final_{j}", node[0, j]) for j in (1, 2, 3, 4)]
    return [(heads[0] + heads[1] + heads[2] + heads[3]) / 4, *heads[::-1]], None


def unet3plus(state: State, x: Tensor, training: bool) -> tuple[list[Tensor], Tensor | None]:
    encoder = {1: block(state, "conv1", x, training)}
    for i in (2, 3, 4, 5):
        encoder[i] = block(state, f"conv{i}", F.max_pool2d(encoder[i - 1], 2), training)
    decoder = {5: encoder[5]}
    for i in (4, 3, 2, 1):
        branches = []
        for k in (1, 2, 3, 4, 5):
            if k < i:
                name, at_level = f"h{k}_PT_hd{i}", F.max_pool2d(encoder[k], 2 ** (i - k))
            elif k == i:
                name, at_level = f"h{k}_Cat_hd{i}", encoder[k]
            else:
                name, at_level = f"hd{k}_UT_hd{i}", upsample(decoder[k], 2 ** (k - i))
            branch = conv(state, f"{name}_conv", at_level)
            branches.append(F.relu(batch_norm(state, f"{name}_bn", branch, training)))
        mixed = conv(state, f"conv{i}d_1", torch.cat(branches, 1))
        decoder[i] = F.relu(batch_norm(state, f"bn{i}d_1", mixed, training))
    num_heads = sum(f"outconv{i}.weight" in state for i in range(1, 6))
    heads = [conv(state, f"outconv{i}", decoder[i]) for i in range(1, num_heads + 1)]
    logits = [upsample(head, 2**i) if i else head for i, head in enumerate(heads)]
    scores = None
    if "cls.1.weight" in state:
        scores = F.adaptive_max_pool2d(conv(state, "cls.1", encoder[5]), 1).flatten(1)
    return logits, scores


FORWARD = {
    "unet": unet,
    "unetplusplus": unetplusplus,
    "unet3plus": unet3plus,
    "unet3plus_ds": unet3plus,
    "unet3plus_ds_cgm": unet3plus,
}


def random_state(
    name: str, *, width: int, in_channels: int = 3, num_organs: int = 1, seed: int = 0
) -> State:
    """Weights, statistics and affine terms of one of `FORWARD`, all random."""
    rng = torch.Generator().manual_seed(seed)
    state: State = {}

    def add_conv(layer: str, before: int, after: int, kernel: int = 3) -> None:
        spread = (2 / (before * kernel**2)) ** 0.5
        state[f"{layer}.weight"] = spread * torch.randn(
            after, before, kernel, kernel, generator=rng
        )
        state[f"{layer}.bias"] = 0.1 * torch.randn(after, generator=rng)

    def add_norm(layer: str, channels: int) -> None:
        state[f"{layer}.weight"] = 1 + 0.2 * torch.randn(channels, generator=rng)
        state[f"{layer}.bias"] = 0.2 * torch.randn(channels, generator=rng)
        state[f"{layer}.running_mean"] = 0.2 * torch.randn(channels, generator=rng)
        state[f"{layer}.running_var"] = 0.5 + torch.rand(channels, generator=rng)
        state[f"{layer}.num_batches_tracked"] = torch.tensor(7)

    def add_block(layer: str, before: int, after: int, *, norm: bool) -> None:
        for j, channels in ((1, before), (2, after)):
            add_conv(f"{layer}.conv{j}.0", channels, after)
            if norm:
                add_norm(f"{layer}.conv{j}.1", after)

    def add_up(layer: str, before: int, after: int) -> None:
        state[f"{layer}.weight"] = torch.randn(before, after, 4, 4, generator=rng) / (
            2 * before**0.5
        )
        state[f"{layer}.bias"] = 0.1 * torch.randn(after, generator=rng)

    channels = [width * 2**i for i in range(5)]
    encoder = {
        "unet": ["conv1", "conv2", "conv3", "conv4", "center"],
        "unetplusplus": [f"conv{i}0" for i in range(5)],
    }.get(name, [f"conv{i}" for i in range(1, 6)])
    for layer, before, after in zip(encoder, [in_channels, *channels], channels, strict=False):
        add_block(layer, before, after, norm=True)
    if name == "unet":
        for i in (1, 2, 3, 4):
            add_up(f"up_concat{i}.up", channels[i], channels[i - 1])
            add_block(f"up_concat{i}.conv", 2 * channels[i - 1], channels[i - 1], norm=False)
        add_conv("outconv1", width, num_organs)
    elif name == "unetplusplus":
        for j in (1, 2, 3, 4):
            for i in range(5 - j):
                add_up(f"up_concat{i}{j}.up", channels[i + 1], channels[i])
                add_block(f"up_concat{i}{j}.conv", (j + 1) * channels[i], channels[i], norm=False)
            add_conv(f"final_{j}", width, num_organs, 1)
    else:
        for i in (4, 3, 2, 1):
            for k in (1, 2, 3, 4, 5):
                layer = f"h{k}_PT_hd{i}" if k < i else f"h{k}_Cat_hd{i}"
                layer = f"hd{k}_UT_hd{i}" if k > i else layer
                before = channels[k - 1] if k <= i or k == 5 else 5 * width
                add_conv(f"{layer}_conv", before, width)
                add_norm(f"{layer}_bn", width)
            add_conv(f"conv{i}d_1", 5 * width, 5 * width)
            add_norm(f"bn{i}d_1", 5 * width)
        for i in (1, 2, 3, 4, 5) if "_ds" in name else (1,):
            add_conv(f"outconv{i}", channels[4] if i == 5 else 5 * width, num_organs)
        if name.endswith("_cgm"):
            add_conv("cls.1", channels[4], 2, 1)
    return state
