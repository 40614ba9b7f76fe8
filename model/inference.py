"""Inference: the slices of a scan -> probabilities.

Shapes: Z slices, B batch, K organs, H W pixels.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence
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
from model.output import Gating, check_gating, gate_weights, organ_probability, slab_reach
from model.preprocessing import neighbour_positions
from model.segmentation import Frame, SegmentationNetwork, pad_to_multiple, restore


class Prediction(NamedTuple):
    """Prediction of the slices of a scan, on the CPU.

    Attributes:
        probabilities: K x Z x H x W, in [0, 1]; with "hard" and "slab" gating exactly 0 in slices
            that the slice classifier closes for the organ.
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
        gating: see `model.output.gate_weights`.
        precision: of convolutions; other types than float32 use autocast.
    """

    num_adjacent: int = 3
    neighbour_step: float = 1.0
    batch_size: int = 16
    device: torch.device | str = "cpu"
    gating: Gating = "hard"
    precision: torch.dtype = torch.float32

    @property
    def reach(self) -> int:
        """Return over how many slices an open slice opens others; 0 unless gating is "slab"."""
        return slab_reach(self.neighbour_step) if self.gating == "slab" else 0


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

    With "hard" and "slab" gating the decoder runs only for slices that are open for an organ. With
    "slab" a batch waits for the next one, whose slices may open its last ones.

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
    members = [_batches(member, image_ZHW, settings) for member in list_members(net)]
    return members[0] if len(members) == 1 else map(_join, *members)


def join_predictions(members: Sequence[Prediction]) -> Prediction:
    """Return an ensemble's prediction of slices, of those of its members.

    Args:
        members: of the same slices, each with the decision of its own slice classifier applied.
    """
    organs = [each.organ_probability for each in members if each.organ_probability is not None]
    return Prediction(
        join_probabilities([each.probabilities for each in members]),
        join_organ_probabilities(organs) if organs else None,
    )


def _join(*members: BatchPrediction) -> BatchPrediction:
    found = [Prediction(each.probabilities, each.organ_probability) for each in members]
    return BatchPrediction(members[0].slices, *join_predictions(found))


class _Encoded(NamedTuple):
    """Consecutive slices between encoder and decoder.

    Attributes:
        slices: their indices along Z.
        maps: of `SegmentationNetwork.encode`.
        frame: place of the slices in their padded copies.
    """

    slices: slice
    maps: list[Tensor]
    frame: Frame


@torch.inference_mode()
def _batches(
    net: SegmentationNetwork, image_ZHW: Tensor, settings: InferenceSettings
) -> Iterator[BatchPrediction]:
    device, num_slices = torch.device(settings.device), len(image_ZHW)
    reach = 0 if net.classifier is None else settings.reach
    organ_ZK = torch.zeros(0, net.num_organs)
    waiting: deque[_Encoded] = deque()
    was_training = net.training
    net.to(device).eval()
    try:
        for first in range(0, num_slices, settings.batch_size):
            slices = torch.arange(first, min(first + settings.batch_size, num_slices))
            stacks_BCHW = adjacent_slices(
                image_ZHW, slices, settings.num_adjacent, settings.neighbour_step
            )
            done = first + len(slices)
            with _autocast(device, settings.precision):
                encoded, scores = _encode(net, stacks_BCHW.to(device), slice(first, done))
            waiting.append(encoded)
            del encoded  # its maps must not outlive their decoding
            if scores is not None:
                organ_ZK = torch.cat([organ_ZK, organ_probability(scores).cpu()])
            while waiting and (done == num_slices or waiting[0].slices.stop + reach <= done):
                found = waiting[0].slices
                weight_BK = organ_BK = None
                if scores is not None:
                    organ_BK = organ_ZK[found]
                    low = max(0, found.start - reach)
                    weight_ZK = gate_weights(
                        organ_ZK[low : found.stop + reach], settings.gating, reach
                    )
                    weight_BK = weight_ZK[found.start - low :][: len(organ_BK)].to(device)
                with _autocast(device, settings.precision):
                    batch_BKHW = _decode(net, waiting.popleft(), weight_BK)
                yield BatchPrediction(found, batch_BKHW.transpose(0, 1).cpu(), organ_BK)
    finally:
        net.train(was_training)


def _autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[Any]:
    if precision == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, precision)


def _encode(
    net: SegmentationNetwork, x_BCHW: Tensor, slices: slice
) -> tuple[_Encoded, Tensor | None]:
    """Return the maps of a batch, and the scores of the slice classifier, B x K x 2."""
    padded, frame = pad_to_multiple(x_BCHW.to(torch.float32), net.stride)
    maps = net.encode(padded)
    return _Encoded(slices, maps, frame), net.classify(maps)


def _decode(net: SegmentationNetwork, batch: _Encoded, weight_BK: Tensor | None) -> Tensor:
    """Return probabilities B x K x H x W, float32; the decoder skips slices of weight 0."""
    maps, (height, width) = batch.maps, batch.frame.size
    num_slices = len(maps[0])
    wanted = torch.ones(num_slices, dtype=torch.bool, device=maps[0].device)
    if weight_BK is not None:
        wanted = (weight_BK > 0).any(dim=1)
    result = torch.zeros(num_slices, net.num_organs, height, width, device=maps[0].device)
    if wanted.any():
        chosen = maps if wanted.all() else [each[wanted] for each in maps]
        logits = restore(net.decode(chosen, all_heads=False)[0], batch.frame)
        found = torch.sigmoid(logits.float())
        result[wanted] = found if weight_BK is None else found * weight_BK[wanted][..., None, None]
    return result
