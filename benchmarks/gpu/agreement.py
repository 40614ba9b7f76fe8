"""Compare a GPU's results with a CPU's: outputs, gradients, and masks of a scan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.settings import Report, Settings
from benchmarks.network import PRECISIONS, relative_distance, relative_error
from benchmarks.prediction import aim_classifier, make_description, make_scan
from fullscale.prediction.network_files import Trained
from fullscale.prediction.predictor import Predictor
from model.losses import total_loss
from model.networks import build_network
from model.preprocessing import NUM_ADJACENT_SLICES
from model.segmentation import SegmentationNetwork

NETWORKS = ("unet", "unetplusplus", "unet3plus")
WIDTH, SIDE_PX, BATCH_SIZE = 32, 128, 2
"""Smaller than elsewhere: the CPU computes everything too."""
SCAN_ZYX = (16, 192, 192)


def run(settings: Settings, report: Report) -> None:
    """Measure."""
    for name in NETWORKS:
        for precision in settings.precisions:
            report.measure(
                f"{name}, {precision}",
                lambda name=name, precision=precision: compare_step(name, precision, settings),
            )
    report.measure("masks of a scan", lambda: compare_masks(settings))


def compare_step(name: str, precision: str, settings: Settings) -> dict[str, float]:
    """Return how far output, loss and gradient are from those of a CPU in float32.

    `..._on_cpu` is how far a CPU is in the same precision: so much is rounding.
    """
    width, side_px = min(WIDTH, settings.width), min(SIDE_PX, settings.side_px)
    torch.manual_seed(0)
    network = build_network(
        name, in_channels=NUM_ADJACENT_SLICES, num_organs=2, width=width
    ).train()
    if network.classifier is not None:
        network.classifier.dropout.eval()  # it draws other numbers on another device
    x_BCHW = torch.rand(BATCH_SIZE, NUM_ADJACENT_SLICES, side_px, side_px)
    mask_BKHW = torch.rand(BATCH_SIZE, 2, side_px, side_px) > 0.5
    wanted = _step(network, x_BCHW, mask_BKHW, "float32")
    on_cpu = _step(network, x_BCHW, mask_BKHW, precision)
    device = torch.device(settings.device)
    found = _step(network.to(device), x_BCHW.to(device), mask_BKHW.to(device), precision)
    return {
        f"{measure}{suffix}": value
        for suffix, each in (("", found), ("_on_cpu", on_cpu))
        for measure, value in {
            "output": relative_error(each[0], wanted[0]),
            "loss": abs(each[1] / wanted[1] - 1),
            "gradient": relative_distance(each[2], wanted[2]),
        }.items()
    }


def _step(
    network: SegmentationNetwork, x_BCHW: Tensor, mask_BKHW: Tensor, precision: str
) -> tuple[Tensor, float, list[Tensor]]:
    network.zero_grad()
    dtype = PRECISIONS[precision]
    with torch.autocast(x_BCHW.device.type, dtype, enabled=dtype != torch.float32):
        output = network(x_BCHW)
    loss = total_loss(output, mask_BKHW).total
    loss.backward()
    gradients = [each.grad.cpu() for each in network.parameters() if each.grad is not None]
    return output.logits[0].detach().float().cpu(), float(loss.detach()), gradients


def compare_masks(settings: Settings) -> dict[str, Any]:
    """Return in how many voxels the label map of a scan differs from that of a CPU in float32."""
    scan = make_scan(*SCAN_ZYX[:2], SCAN_ZYX[0] // 2)
    description = make_description(min(SIDE_PX, settings.side_px), min(WIDTH, settings.width))
    torch.manual_seed(0)
    network = build_network(
        "unet3plus", in_channels=NUM_ADJACENT_SLICES, num_organs=1, width=description.width
    ).eval()
    weight, bias = network.classifier.conv.parameters()  # type: ignore[union-attr]
    quarter = SCAN_ZYX[0] // 4
    aim_classifier(weight, bias, network, description, scan, (quarter, 3 * quarter))
    trained = Trained(network, description)
    wanted = Predictor(trained, 0.5, 4, torch.device("cpu"), "fp32").segment(scan).label_map
    found: dict[str, Any] = {"organ_voxels": int(wanted.sum())}
    for precision in ("fp32", "bf16"):
        predictor = Predictor(trained, 0.5, 4, torch.device(settings.device), precision)
        label_map = predictor.segment(scan).label_map
        found[f"different_voxels_{precision}"] = int((label_map != wanted).sum())
    return found
