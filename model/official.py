"""Load checkpoints of the UNet 3+ authors' program, of any width.

Both programs have the same layers in the same order. This module maps the authors' names to ours.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.networks import build_network
from model.segmentation import SegmentationNetwork

CONV_OR_NORM = ("conv", "norm")
DEEPEST = 5


class Place(NamedTuple):
    """Our layer for one of theirs, and its position where ours concatenates several of theirs."""

    layer: str
    part: int = 0


Rule = tuple[str, Callable[..., Place]]

ENCODER: list[Rule] = [
    (
        r"conv([1-5])\.conv([12])\.([01])",
        lambda i, j, part: Place(f"encoder.levels.{i - 1}.{j - 1}.{CONV_OR_NORM[part]}"),
    ),
]
HEADS: list[Rule] = [(r"outconv([1-5])", lambda i: Place(f"heads.{i - 1}"))]
CLASSIFIER: list[Rule] = [(r"cls\.1", lambda: Place("classifier.conv"))]
UNET: list[Rule] = [
    *ENCODER,
    (
        r"center\.conv([12])\.([01])",
        lambda j, part: Place(f"encoder.levels.4.{j - 1}.{CONV_OR_NORM[part]}"),
    ),
    (r"up_concat([1-4])\.up", lambda i: Place(f"ups.{i - 1}")),
    (
        r"up_concat([1-4])\.conv\.conv([12])\.0",
        lambda i, j: Place(f"blocks.{i - 1}.{j - 1}.conv"),
    ),
    (r"outconv1", lambda: Place("head")),
]
UNETPLUSPLUS: list[Rule] = [
    (
        r"conv([0-4])0\.conv([12])\.([01])",
        lambda i, j, part: Place(f"encoder.levels.{i}.{j - 1}.{CONV_OR_NORM[part]}"),
    ),
    (r"up_concat([0-3])([1-4])\.up", lambda i, column: Place(f"columns.{column - 1}.ups.{i}")),
    (
        r"up_concat([0-3])([1-4])\.conv\.conv([12])\.0",
        lambda i, column, j: Place(f"columns.{column - 1}.blocks.{i}.{j - 1}.conv"),
    ),
    (r"final_([1-4])", lambda i: Place(f"heads.{i - 1}")),
]
UNET3PLUS: list[Rule] = [
    *ENCODER,
    (
        r"hd?([1-5])_(?:PT|Cat|UT)_hd([1-4])_conv",
        lambda source, level: Place(f"levels.{level - 1}.branches.{source - 1}"),
    ),
    (
        r"hd?([1-5])_(?:PT|Cat|UT)_hd([1-4])_bn",
        lambda source, level: Place(f"levels.{level - 1}.norm", source),
    ),
    (r"conv([1-4])d_1", lambda i: Place(f"levels.{i - 1}.mix")),
    (r"bn([1-4])d_1", lambda i: Place(f"levels.{i - 1}.mix_norm")),
]


class Official(NamedTuple):
    """A network of the authors' program.

    Attributes:
        network: our network, a key of `NETWORKS`.
        options: arguments of `build_network`.
        rules: pattern of a layer's name, and our place for it.
        first_conv: name of the weight that gives width and input channels.
        head: name of the weight that gives the number of organs.
    """

    network: str
    options: dict[str, Any]
    rules: list[Rule]
    first_conv: str = "conv1.conv1.0.weight"
    head: str = "outconv1.weight"


OFFICIAL = {
    "unet": Official("unet_official", {}, UNET),
    "unetplusplus": Official(
        "unetplusplus",
        {"deep_supervision": True},
        UNETPLUSPLUS,
        "conv00.conv1.0.weight",
        "final_1.weight",
    ),
    "unet3plus": Official(
        "unet3plus",
        {"deep_supervision": False, "cgm": False},
        [*UNET3PLUS, (r"outconv1", lambda: Place("heads.0"))],
    ),
    "unet3plus_ds": Official(
        "unet3plus", {"deep_supervision": True, "cgm": False}, [*UNET3PLUS, *HEADS]
    ),
    "unet3plus_ds_cgm": Official(
        "unet3plus", {"deep_supervision": True, "cgm": True}, [*UNET3PLUS, *HEADS, *CLASSIFIER]
    ),
}


def from_official(name: str, state_dict: Mapping[str, Tensor]) -> SegmentationNetwork:
    """Build our network with the weights of a checkpoint of the authors' program.

    Width, input channels and number of organs are read from the shapes. Their classifier decides
    for the slice as a whole; with several organs, its decision is used for each of them.

    Args:
        name: unet, unetplusplus, unet3plus, unet3plus_ds (deep supervision) or unet3plus_ds_cgm.
        state_dict: the network's state in the authors' names. The prefix "module." of
            DataParallel is removed.

    Returns:
        The network in training mode, as from `build_network`.

    Raises:
        ValueError: unknown name, or entries that are missing, unexpected, or of another shape.
    """
    if name not in OFFICIAL:
        raise ValueError(f"unknown official network {name!r}: use one of {', '.join(OFFICIAL)}")
    official = OFFICIAL[name]
    theirs = {key.removeprefix("module."): value for key, value in state_dict.items()}
    missing = [key for key in (official.first_conv, official.head) if key not in theirs]
    if missing:
        raise ValueError(
            f"no official {name}: the state dict lacks {', '.join(missing)}; "
            f"it begins with {', '.join(list(theirs)[:3]) or 'nothing'}{_hint(name, theirs)}"
        )
    width, in_channels = theirs[official.first_conv].shape[:2]
    num_organs = theirs[official.head].shape[0]
    net = build_network(
        official.network,
        in_channels=in_channels,
        num_organs=num_organs,
        width=width,
        **official.options,
    )
    state = _rename(theirs, official.rules)
    if official.options.get("cgm"):
        for key in ("classifier.conv.weight", "classifier.conv.bias"):
            if key in state:
                state[key] = torch.cat([state[key]] * num_organs)
    _check(name, net, state, theirs)
    # Not strict: older versions of torch saved no batch counters.
    net.load_state_dict(state, strict=False)
    return net


def _rename(theirs: Mapping[str, Tensor], rules: list[Rule]) -> dict[str, Tensor]:
    """Return the state in our names; names that no rule matches are left unchanged."""
    parts: defaultdict[str, dict[int, Tensor]] = defaultdict(dict)
    for key, value in theirs.items():
        layer, _, tensor = key.rpartition(".")
        place = Place(layer)
        for pattern, rule in rules:
            found = re.fullmatch(pattern, layer)
            if found:
                place = rule(*(int(group) for group in found.groups()))
        parts[f"{place.layer}.{tensor}"][place.part] = value
    return {
        key: next(iter(values.values()))
        if key.endswith("num_batches_tracked")
        else torch.cat([values[part] for part in sorted(values)])
        for key, values in parts.items()
    }


def _hint(name: str, theirs: Mapping[str, Tensor]) -> str:
    """Name the other network of `OFFICIAL` whose layers a state dict has; empty without one."""
    layers = {key.rpartition(".")[0] for key in theirs}
    for other, official in OFFICIAL.items():
        is_known = all(
            any(re.fullmatch(pattern, layer) for pattern, _ in official.rules) for layer in layers
        )
        if other != name and is_known and {official.first_conv, official.head} <= set(theirs):
            return f"; it looks like {other}"
    return ""


def _check(
    name: str,
    net: SegmentationNetwork,
    state: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
) -> None:
    """Raise ValueError unless `state` has the entries of `net`; batch counters may be missing."""
    wanted = net.state_dict()
    problems = {
        "lacks": [key for key in wanted if key not in state and "num_batches" not in key],
        "has too much": [key for key in state if key not in wanted],
        "has another shape for": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
            for key, value in wanted.items()
            if key in state and state[key].shape != value.shape
        ],
    }
    text = "; ".join(
        f"{what} {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for what, keys in problems.items()
        if keys
    )
    if text:
        raise ValueError(
            f"the state dict is no official {name}: in our names, it {text}{_hint(name, theirs)}"
        )
