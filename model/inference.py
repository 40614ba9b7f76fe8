"""From the slices of a scan to probabilities.

Shapes: Z slices, B batch, K organs, H W pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.output import (
    Gate,
    Output,
    check_gate,
    organ_open,
    organ_probability,
    probabilities,
)
from model.segmentation import SegmentationNetwork, pad_to_multiple, restore


class Prediction(NamedTuple):
    """What a network says of a scan, on the CPU.

    Attributes:
        probabilities: K x Z x H x W, in [0, 1]; exactly 0 where a hard gate is closed.
        organ_probability: Z x K, float32, the classifier's "slice contains the organ"; None for
            a network without one.
    """

    probabilities: Tensor
    organ_probability: Tensor | None


def prepare(net: SegmentationNetwork) -> SegmentationNetwork:
    """A copy for inference: eval mode, no gradients, batch norms folded into convolutions."""
    net = copy.deepcopy(net).eval().requires_grad_(False)
    for module in net.modules():
        fold = getattr(module, "fold_norms", None)
        if fold is not None:
            fold()
    return net


def adjacent_slices(image_ZHW: Tensor, slices: Tensor, num_adjacent: int) -> Tensor:
    """Each named slice with its neighbours as channels; beyond an end the end slice repeats.

    Args:
        image_ZHW: Z x H x W.
        slices: B indices along Z.
        num_adjacent: slices in a stack, odd: the slice itself in the middle.

    Returns:
        B x num_adjacent x H x W.

    Raises:
        ValueError: for an even or non-positive number.
    """
    if num_adjacent < 1 or num_adjacent % 2 == 0:
        raise ValueError(f"num_adjacent is {num_adjacent}: it must be odd, such as 1, 3 or 5")
    offsets = torch.arange(num_adjacent, device=slices.device) - num_adjacent // 2
    return image_ZHW[(slices.unsqueeze(1) + offsets).clamp(0, len(image_ZHW) - 1)]


class BatchPrediction(NamedTuple):
    """What a network says of some consecutive slices, on the CPU.

    Attributes:
        slices: which they are.
        probabilities: K x B x H x W, float32, in [0, 1]; exactly 0 where a hard gate is closed.
        organ_probability: B x K, float32; None for a network without a classifier.
    """

    slices: slice
    probabilities: Tensor
    organ_probability: Tensor | None


def predict_slices(
    net: SegmentationNetwork,
    image_ZHW: Tensor,
    *,
    num_adjacent: int = 3,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    gate: Gate = "hard",
    dtype: torch.dtype = torch.float32,
    precision: torch.dtype = torch.float32,
) -> Prediction:
    """Segment every slice of a scan, and keep all of it.

    Args:
        net: best from `prepare`.
        image_ZHW: Z x H x W, floating point, intensities in [0, 1].
        num_adjacent: slices stacked as channels, as in training.
        batch_size: slices at a time.
        device: where to compute.
        gate: see `model.output.probabilities`.
        dtype: of the probabilities, such as torch.float16 for half the memory.
        precision: of convolutions, as `predict_batches` takes it.

    Raises:
        ValueError: as `predict_batches`.
    """
    batches = predict_batches(
        net,
        image_ZHW,
        num_adjacent=num_adjacent,
        batch_size=batch_size,
        device=device,
        gate=gate,
        precision=precision,
    )
    volume_KZHW = torch.zeros(net.num_organs, *image_ZHW.shape, dtype=dtype)
    organs: list[Tensor] = []
    for batch in batches:
        volume_KZHW[:, batch.slices] = batch.probabilities.to(dtype)
        if batch.organ_probability is not None:
            organs.append(batch.organ_probability)
    return Prediction(volume_KZHW, torch.cat(organs) if organs else None)


def predict_batches(
    net: SegmentationNetwork,
    image_ZHW: Tensor,
    *,
    num_adjacent: int = 3,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    gate: Gate = "hard",
    precision: torch.dtype = torch.float32,
) -> Iterator[BatchPrediction]:
    """Segment every slice of a scan, batch by batch, so that memory holds one of them.

    With a hard gate the decoder runs only for slices in which it is open for some organ.

    Args:
        net: best from `prepare`; used in eval mode, and left in the mode that it was in.
        image_ZHW: Z x H x W, floating point, intensities in [0, 1].
        num_adjacent: slices stacked as channels, as in training.
        batch_size: slices at a time.
        device: where to compute; the network is moved there.
        gate: see `model.output.probabilities`.
        precision: of convolutions; another one than float32 is autocast.

    Raises:
        ValueError: if the image is not three-dimensional floating point, for an unknown gate, or
            a number that makes no sense.
    """
    check_gate(gate)
    if image_ZHW.dim() != 3 or not image_ZHW.is_floating_point() or not len(image_ZHW):
        raise ValueError(
            f"image has shape {tuple(image_ZHW.shape)} and type {image_ZHW.dtype}: expected "
            "floating point slices x height x width, at least one slice"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
    device = torch.device(device)
    return _batches(net, image_ZHW, num_adjacent, batch_size, device, gate, precision)


@torch.inference_mode()
def _batches(
    net: SegmentationNetwork,
    image_ZHW: Tensor,
    num_adjacent: int,
    batch_size: int,
    device: torch.device,
    gate: Gate,
    precision: torch.dtype,
) -> Iterator[BatchPrediction]:
    was_training = net.training
    net.to(device).eval()
    try:
        for first in range(0, len(image_ZHW), batch_size):
            slices = torch.arange(first, min(first + batch_size, len(image_ZHW)))
            x_BCHW = adjacent_slices(image_ZHW, slices, num_adjacent).to(device, torch.float32)
            with _autocast(device, precision):
                batch_BKHW, organ_BK = _predict_batch(net, x_BCHW, gate)
            yield BatchPrediction(
                slice(first, first + len(slices)),
                batch_BKHW.transpose(0, 1).cpu(),
                None if organ_BK is None else organ_BK.cpu(),
            )
    finally:
        net.train(was_training)


def _autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[Any]:
    if precision == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, precision)


def _predict_batch(
    net: SegmentationNetwork, x_BCHW: Tensor, gate: Gate
) -> tuple[Tensor, Tensor | None]:
    """Probabilities B x K x H x W and, with a classifier, organ probabilities B x K."""
    padded, frame = pad_to_multiple(x_BCHW, net.stride)
    maps = net.encode(padded)
    scores = net.classify(maps)
    wanted = torch.ones(len(x_BCHW), dtype=torch.bool, device=x_BCHW.device)
    if scores is not None and gate == "hard":
        wanted = organ_open(scores).any(dim=1)
    result = x_BCHW.new_zeros(len(x_BCHW), net.num_organs, *x_BCHW.shape[-2:])
    if wanted.any():
        chosen = maps if wanted.all() else [each[wanted] for each in maps]
        logits = restore(net.decode(chosen, all_heads=False)[0], frame)
        kept = None if scores is None else scores[wanted]
        result[wanted] = probabilities(Output([logits], kept), gate)
    return result, None if scores is None else organ_probability(scores)
