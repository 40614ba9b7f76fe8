"""The networks by name: one factory, one interface, `net(x) -> Output`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from model.blocks import initialise
from model.encoders import Encoder, PlainEncoder
from model.segmentation import SegmentationNetwork
from model.unet import UNet
from model.unet3plus import UNet3Plus
from model.unetplusplus import UNetPlusPlus


class NetworkInfo(NamedTuple):
    """A network of the comparison.

    Attributes:
        title: name in the literature.
        source: paper in which it was published.
        build: constructor, called with encoder, num_organs, width, deep_supervision, cgm.
        encoders: encoders it can have.
        deep_supervision: default; None where the network has none.
        cgm: default; None where the network has none.
    """

    title: str
    source: str
    build: Callable[..., SegmentationNetwork]
    encoders: tuple[str, ...]
    deep_supervision: bool | None = None
    cgm: bool | None = None


def _unet(encoder: Encoder, num_organs: int, width: int) -> UNet:
    return UNet(encoder, num_organs=num_organs)


def _unetplusplus(
    encoder: Encoder, num_organs: int, width: int, deep_supervision: bool
) -> UNetPlusPlus:
    return UNetPlusPlus(encoder, num_organs=num_organs, deep_supervision=deep_supervision)


def _unet3plus(
    encoder: Encoder, num_organs: int, width: int, deep_supervision: bool, cgm: bool
) -> UNet3Plus:
    return UNet3Plus(
        encoder,
        num_organs=num_organs,
        branch_channels=width,
        deep_supervision=deep_supervision,
        cgm=cgm,
    )


NETWORKS: dict[str, NetworkInfo] = {
    "unet": NetworkInfo("UNet", "Ronneberger et al., MICCAI 2015", _unet, ("plain",)),
    "unetplusplus": NetworkInfo(
        "UNet++", "Zhou et al., DLMIA 2018", _unetplusplus, ("plain",), True
    ),
    "unet3plus": NetworkInfo(
        "UNet 3+", "Huang et al., ICASSP 2020", _unet3plus, ("plain",), True, True
    ),
}

ENCODERS: dict[str, Callable[[int, int], Encoder]] = {"plain": PlainEncoder}


def build_network(
    name: str,
    *,
    in_channels: int,
    num_organs: int,
    width: int = 64,
    encoder: str = "plain",
    deep_supervision: bool | None = None,
    cgm: bool | None = None,
) -> SegmentationNetwork:
    """Build a network with fresh weights (Kaiming normal, see `model.blocks.initialise`).

    Args:
        name: a key of `NETWORKS`.
        in_channels: adjacent slices in the input.
        num_organs: sigmoid channels out, and gates of the classification-guided module.
        width: channels of the first level, 64 in the papers.
        encoder: a key of `ENCODERS`.
        deep_supervision: a head on every decoder level; None = the network's default.
        cgm: the classification-guided module; None = the network's default.

    Raises:
        ValueError: for an unknown name or encoder, a part that the network does not have, or a
            number below 1. The message lists what exists.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}: use one of {', '.join(NETWORKS)}")
    info = NETWORKS[name]
    if encoder not in info.encoders:
        raise ValueError(
            f"network {name!r} has no encoder {encoder!r}: use one of {', '.join(info.encoders)}"
        )
    numbers = {"in_channels": in_channels, "num_organs": num_organs, "width": width}
    for key, number in numbers.items():
        if number < 1:
            raise ValueError(f"{key} is {number}: it must be at least 1")
    options = {}
    for key, asked in {"deep_supervision": deep_supervision, "cgm": cgm}.items():
        default = getattr(info, key)
        if default is not None:
            options[key] = default if asked is None else asked
        elif asked:
            having = [each for each, other in NETWORKS.items() if getattr(other, key) is not None]
            raise ValueError(
                f"network {name!r} has no {key}: leave it out, or use one of {', '.join(having)}"
            )
    net = info.build(ENCODERS[encoder](in_channels, width), num_organs, width, **options)
    initialise(net)
    return net
