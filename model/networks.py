"""The networks by name: one factory, and one interface, `net(x) -> Output`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from model.blocks import initialise
from model.context import DeepLabV2, DeepLabV3, DeepLabV3Plus, FCN8s, PSPNet
from model.encoders import Encoder, PlainEncoder, ProjectedEncoder, ResNet101Encoder
from model.segmentation import SegmentationNetwork
from model.unet import AttentionUNet, UNet
from model.unet3plus import UNet3Plus
from model.unetplusplus import UNetPlusPlus


class NetworkInfo(NamedTuple):
    """A network of the comparison.

    Attributes:
        title: name in the literature.
        source: paper in which it was published.
        build: constructor; arguments encoder, num_organs, and those in `takes`.
        stride: of the deepest map, by encoder.
        takes: which of width, deep_supervision and cgm are arguments of `build`.
        projected: maps of ResNet-101 are projected to the plain encoder's channels.
        published_parameters_m: millions of parameters in the comparison, by encoder.
    """

    title: str
    source: str
    build: Callable[..., SegmentationNetwork]
    stride: dict[str, int]
    takes: tuple[str, ...] = ()
    projected: bool = False
    published_parameters_m: dict[str, float] = {}  # noqa: RUF012


U_SHAPED = {"plain": 16, "resnet101": 32}
DILATED_TO_8 = {"plain": 8, "resnet101": 8}
DILATED_TO_16 = {"plain": 16, "resnet101": 16}

NETWORKS: dict[str, NetworkInfo] = {
    "unet": NetworkInfo(
        "UNet, batch norm also in its decoder",
        "Ronneberger et al., MICCAI 2015",
        UNet,
        U_SHAPED,
        projected=True,
    ),
    "unet_official": NetworkInfo(
        "UNet",
        "Ronneberger et al., MICCAI 2015",
        partial(UNet, norm=False),
        U_SHAPED,
        projected=True,
        published_parameters_m={"plain": 39.39, "resnet101": 55.90},
    ),
    "unetplusplus": NetworkInfo(
        "UNet++",
        "Zhou et al., DLMIA 2018",
        UNetPlusPlus,
        U_SHAPED,
        ("deep_supervision",),
        projected=True,
        published_parameters_m={"plain": 47.18, "resnet101": 63.76},
    ),
    "unet3plus": NetworkInfo(
        "UNet 3+",
        "Huang et al., ICASSP 2020",
        UNet3Plus,
        U_SHAPED,
        ("width", "deep_supervision", "cgm"),
        projected=True,
        published_parameters_m={"plain": 26.97, "resnet101": 43.55},
    ),
    "attention_unet": NetworkInfo(
        "Attention UNet", "Oktay et al., MIDL 2018", AttentionUNet, U_SHAPED, projected=True
    ),
    "pspnet": NetworkInfo("PSPNet", "Zhao et al., CVPR 2017", PSPNet, DILATED_TO_8),
    "deeplabv2": NetworkInfo("DeepLab v2", "Chen et al., IEEE TPAMI 2018", DeepLabV2, DILATED_TO_8),
    "deeplabv3": NetworkInfo(
        "DeepLab v3", "Chen et al., arXiv 1706.05587, 2017", DeepLabV3, DILATED_TO_16, ("width",)
    ),
    "deeplabv3plus": NetworkInfo(
        "DeepLab v3+", "Chen et al., ECCV 2018", DeepLabV3Plus, DILATED_TO_16, ("width",)
    ),
    "fcn": NetworkInfo("FCN-8s", "Long et al., CVPR 2015", FCN8s, {"plain": 32, "resnet101": 32}),
}

ENCODERS: dict[str, str] = {
    "plain": "two 3x3 convolutions a level, as in the UNet 3+ paper",
    "resnet101": "He et al., CVPR 2016",
}


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
        num_organs: sigmoid channels of the output, and outputs of the slice classifier (CGM).
        width: channels of the first level, 64 in the papers.
        encoder: a key of `ENCODERS`.
        deep_supervision: a head on every decoder level; None = if the network has them.
        cgm: the classification-guided module; None = if the network has it.

    Raises:
        ValueError: unknown name or encoder, an option that the network lacks, or a number below 1.
            The message lists what exists.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}: use one of {', '.join(NETWORKS)}")
    if encoder not in ENCODERS:
        raise ValueError(f"unknown encoder {encoder!r}: use one of {', '.join(ENCODERS)}")
    numbers = {"in_channels": in_channels, "num_organs": num_organs, "width": width}
    for key, number in numbers.items():
        if number < 1:
            raise ValueError(f"{key} is {number}: it must be at least 1")
    info = NETWORKS[name]
    options: dict[str, Any] = {"width": width} if "width" in info.takes else {}
    for key, asked in {"deep_supervision": deep_supervision, "cgm": cgm}.items():
        if key in info.takes:
            options[key] = True if asked is None else asked
        elif asked:
            having = [each for each, other in NETWORKS.items() if key in other.takes]
            raise ValueError(
                f"network {name!r} has no {key}: leave it out, or use one of {', '.join(having)}"
            )
    stem = _build_encoder(encoder, info, in_channels, width)
    net = info.build(stem, num_organs=num_organs, **options)
    initialise(net)
    return net


def _build_encoder(encoder: str, info: NetworkInfo, in_channels: int, width: int) -> Encoder:
    if encoder == "plain":
        return PlainEncoder(in_channels, width, stride=info.stride[encoder])
    resnet = ResNet101Encoder(in_channels, width, stride=info.stride[encoder])
    return ProjectedEncoder(resnet, width) if info.projected else resnet


class NetworkRow(NamedTuple):
    """A row of the table of networks: at the paper's width, 3 input channels, 1 organ.

    Attributes:
        name: what `build_network` takes.
        title: name in the literature.
        encoder: what `build_network` takes.
        parameters: of our network, without the classification-guided module.
        published_parameters_m: millions, in the UNet 3+ paper; None where it gives none.
        gmac: of `Cost`, for a 320 x 320 slice.
        source: paper in which the network was published.
    """

    name: str
    title: str
    encoder: str
    parameters: int
    published_parameters_m: float | None
    gmac: float
    source: str


RESNET101_NOTE = (
    "With ResNet-101 the published counts exceed the plain ones by 16.5 to 16.6 million in all "
    "three U-shaped networks: the decoders are the plain ones, and the encoder would have 35.4 "
    "million, less than ResNet-101 has (42.5). The paper does not say how. Ours is the whole "
    "ResNet-101 with 1x1 convolutions to the plain encoder's channels, 45.3 million."
)


def list_networks(side_px: int = 320) -> list[NetworkRow]:
    """Return every network with every encoder; computed on the meta device, without weights.

    Args:
        side_px: slice height and width for `gmac`.
    """
    return [
        _make_row(name, encoder, side_px) for name in NETWORKS for encoder in NETWORKS[name].stride
    ]


class Cost(NamedTuple):
    """Cost of a network.

    Attributes:
        parameters: number of learned values.
        gmac: 10^9 multiplications of convolutions and matrix products for one slice at inference,
            finest head only.
    """

    parameters: int
    gmac: float


def compute_cost(build: Callable[[], SegmentationNetwork], in_channels: int, side_px: int) -> Cost:
    """Compute the cost of a network on the meta device.

    Args:
        build: returns the network, on torch's default device.
        in_channels: adjacent slices in the input.
        side_px: slice height and width.
    """
    with torch.device("meta"), torch.no_grad():
        net = build().eval()
        flop = count_flop(lambda: net(torch.empty(1, in_channels, side_px, side_px)))
    return Cost(sum(each.numel() for each in net.parameters()), flop / 2e9)


def count_flop(run: Callable[[], object]) -> int:
    """Count the operations of convolutions and matrix products while `run` runs.

    A multiplication and its addition are two.
    """
    from torch.utils.flop_counter import FlopCounterMode

    def count(total: torch.Size, a: torch.Size, b: torch.Size, **_: object) -> int:
        return 2 * a.numel() * b[-1]

    # The counter alone does not know the products that are added in place.
    in_place = {torch.ops.aten.addmm_: count, torch.ops.aten.baddbmm_: count}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        run()
    return int(counter.get_total_flops())


def _make_row(name: str, encoder: str, side_px: int) -> NetworkRow:
    info = NETWORKS[name]
    options = {"cgm": False} if "cgm" in info.takes else {}
    cost = compute_cost(
        lambda: build_network(name, in_channels=3, num_organs=1, encoder=encoder, **options),
        3,
        side_px,
    )
    return NetworkRow(
        name=name,
        title=info.title,
        encoder=encoder,
        parameters=cost.parameters,
        published_parameters_m=info.published_parameters_m.get(encoder),
        gmac=cost.gmac,
        source=info.source,
    )
