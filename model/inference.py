"""Inference: the slices of a scan -> probabilities.

Shapes: Z slices, B batch, K organs, H W pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.ensemble import (
    AnyNetwork,
    join_organ_probabilities,
    join_probabilities,
    list_members,
)
from model.output import (
    Gating,
    Output,
    check_gating,
    organ_present,
    organ_probability,
    probabilities,
)
from model.preprocessing import neighbour_positions
from model.segmentation import SegmentationNetwork, pad_to_multiple, restore


class Prediction(NamedTuple):
    """Prediction of all slices of a scan, on the CPU.

    Attributes:
        probabilities: K x Z x H x W, in [0, 1]; with "hard" gating exactly 0 in slices where the
            slice classifier finds the organ absent.
        organ_probability: Z x K, float32, the slice classifier's probability that the slice
            contains the organ, of an ensemble the highest of its members'; None without one.
    """

    probabilities: Tensor
    organ_probability: Tensor | None


def prepare(net: AnyNetwork) -> AnyNetwork:
    """Copy a network or ensemble for inference: eval mode, no gradients, batch norms folded."""
    net = copy.deepcopy(net).eval().requires_grad_(False)
    for module in net.modules():
        fold = getattr(module, "fold_norms", None)
        if fold is not None:
            fold()
    return net


def adjacent_slices(
    image_ZHW: Tensor, slices_B: Tensor, num_adjacent: int, step: float = 1.0
) -> Tensor:
    """Stack each slice with its neighbours as channels.

    Args:
        image_ZHW: Z x H x W, floating point.
        slices_B: indices along Z, on the CPU.
        num_adjacent: slices in a stack, odd, with the slice itself in the middle.
        step: distance of neighbours, as in `neighbour_positions`.

    Returns:
        B x num_adjacent x H x W.

    Raises:
        ValueError: as in `neighbour_positions`.
    """
    low_BC, share_BC = neighbour_positions(slices_B, len(image_ZHW), num_adjacent, step)
    low_BCHW = image_ZHW[low_BC]
    if not share_BC.any():
        return low_BCHW
    high_BCHW = image_ZHW[(low_BC + 1).clamp(max=len(image_ZHW) - 1)]
    return torch.lerp(low_BCHW, high_BCHW, share_BC[..., None, None].to(image_ZHW.dtype))


class BatchPrediction(NamedTuple):
    """Prediction of some consecutive slices, on the CPU.

    Attributes:
        slices: their indices along Z.
        probabilities: K x B x H x W, float32, in [0, 1]; see `Prediction`.
        organ_probability: B x K, float32; None for a network without a classifier.
    """

    slices: slice
    probabilities: Tensor
    organ_probability: Tensor | None


@dataclass(frozen=True)
class InferenceSettings:
    """Settings of inference.

    Attributes:
        num_adjacent: slices stacked as channels, as in training.
        neighbour_step: distance of neighbours, in slices of this scan; see `adjacent_slices`.
        batch_size: slices computed at a time.
        device: where to compute; the network is moved there.
        gating: see `model.output.probabilities`.
        precision: of convolutions; other types than float32 use autocast.
    """

    num_adjacent: int = 3
    neighbour_step: float = 1.0
    batch_size: int = 16
    device: torch.device | str = "cpu"
    gating: Gating = "hard"
    precision: torch.dtype = torch.float32


DEFAULTS = InferenceSettings()


def predict_slices(
    net: AnyNetwork,
    image_ZHW: Tensor,
    settings: InferenceSettings = DEFAULTS,
    *,
    dtype: torch.dtype = torch.float32,
) -> Prediction:
    """Segment every slice of a scan and return all probabilities.

    Args:
        net: preferably from `prepare`.
        image_ZHW: Z x H x W, floating point, intensities in [0, 1].
        settings: of inference.
        dtype: of the probabilities; torch.float16 halves the memory.

    Raises:
        ValueError: as in `predict_batches`.
    """
    batches = predict_batches(net, image_ZHW, settings)
    volume_KZHW = torch.zeros(net.num_organs, *image_ZHW.shape, dtype=dtype)
    organs: list[Tensor] = []
    for batch in batches:
        volume_KZHW[:, batch.slices] = batch.probabilities.to(dtype)
        if batch.organ_probability is not None:
            organs.append(batch.organ_probability)
    return Prediction(volume_KZHW, torch.cat(organs) if organs else None)


def predict_batches(
    net: AnyNetwork, image_ZHW: Tensor, settings: InferenceSettings = DEFAULTS
) -> Iterator[BatchPrediction]:
    """Yield the prediction of a scan batch by batch; memory holds one batch at a time.

    With "hard" gating the decoder runs only for slices in which the classifier finds an organ.

    Args:
        net: preferably from `prepare`. It is set to eval mode, and back at the end.
        image_ZHW: Z x H x W, floating point, intensities in [0, 1].
        settings: of inference.

    Raises:
        ValueError: the image is not three-dimensional floating point, unknown gating, or a batch
            size below 1.
    """
    # Checked here, because the body of a generator does not run before the first batch.
    check_gating(settings.gating)
    if image_ZHW.dim() != 3 or not image_ZHW.is_floating_point() or not len(image_ZHW):
        raise ValueError(
            f"image has shape {tuple(image_ZHW.shape)} and type {image_ZHW.dtype}: expected "
            "floating point slices x height x width, at least one slice"
        )
    if settings.batch_size < 1:
        raise ValueError(f"batch_size is {settings.batch_size}: it must be at least 1")
    return _batches(net, image_ZHW, settings)


@torch.inference_mode()
def _batches(
    net: AnyNetwork, image_ZHW: Tensor, settings: InferenceSettings
) -> Iterator[BatchPrediction]:
    device, batch_size = torch.device(settings.device), settings.batch_size
    was_training = net.training
    net.to(device).eval()
    try:
        for first in range(0, len(image_ZHW), batch_size):
            slices = torch.arange(first, min(first + batch_size, len(image_ZHW)))
            stacks_BCHW = adjacent_slices(
                image_ZHW, slices, settings.num_adjacent, settings.neighbour_step
            )
            x_BCHW = stacks_BCHW.to(device, torch.float32)
            with _autocast(device, settings.precision):
                batch_BKHW, organ_BK = _predict_batch(net, x_BCHW, settings.gating)
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


def _predict_batch(net: AnyNetwork, x_BCHW: Tensor, gating: Gating) -> tuple[Tensor, Tensor | None]:
    """Return probabilities B x K x H x W and, with a classifier, organ probabilities B x K."""
    found = [_predict_member(member, x_BCHW, gating) for member in list_members(net)]
    classified = [each_BK for _, each_BK in found if each_BK is not None]
    return (
        join_probabilities([each_BKHW for each_BKHW, _ in found]),
        join_organ_probabilities(classified) if classified else None,
    )


def _predict_member(
    net: SegmentationNetwork, x_BCHW: Tensor, gating: Gating
) -> tuple[Tensor, Tensor | None]:
    padded, frame = pad_to_multiple(x_BCHW, net.stride)
    maps = net.encode(padded)
    scores = net.classify(maps)
    wanted = torch.ones(len(x_BCHW), dtype=torch.bool, device=x_BCHW.device)
    if scores is not None and gating == "hard":
        wanted = organ_present(scores).any(dim=1)
    result = x_BCHW.new_zeros(len(x_BCHW), net.num_organs, *x_BCHW.shape[-2:])
    if wanted.any():
        chosen = maps if wanted.all() else [each[wanted] for each in maps]
        logits = restore(net.decode(chosen, all_heads=False)[0], frame)
        kept = None if scores is None else scores[wanted]
        result[wanted] = probabilities(Output([logits], kept), gating)
    return result, None if scores is None else organ_probability(scores)
