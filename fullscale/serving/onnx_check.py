"""Compare an ONNX file, run by ONNX Runtime on the CPU, with the prediction in torch.

Axis letters: Z slices, B batch, K organs, H W pixels of a slice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.blocks import resize
from model.ensemble import AnyNetwork, list_members
from model.inference import InferenceSettings, adjacent_slices, predict_slices
from model.output import Gating
from model.preprocessing import NUM_ADJACENT_SLICES

SLICES = "slices"
PROBABILITY = "probability"
ORGAN_PROBABILITY = "organ_probability"
LOGITS = "logits"
"""Logits before the slice classifier (CGM) sets them to zero: an output for this check only."""

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Parity:
    """Differences between two computations of the same slices.

    Attributes:
        difference: largest absolute difference of probabilities, those of pixels and those of
            organs; NaN if one of them is NaN.
        num_different: pixels that are in an organ's mask in only one of the two.
        num_pixels: pixels compared; a pixel counts once for each organ, batch and output.
    """

    difference: float
    num_different: int
    num_pixels: int

    def __add__(self, other: Parity) -> Parity:
        return Parity(
            float(np.maximum(self.difference, other.difference)),  # max() would lose a NaN
            self.num_different + other.num_different,
            self.num_pixels + other.num_pixels,
        )


def make_slices(size_px: int, seed: int = 0) -> Tensor:
    """Make slices to compare on: all 0, all 1, a checkerboard, noise, and smooth regions.

    Args:
        size_px: H and W.
        seed: random seed of the noise and the smooth regions.

    Returns:
        float32 Z x H x W in [0, 1].
    """
    random = torch.Generator().manual_seed(seed)
    x = torch.arange(size_px)
    coarse_HW = torch.rand(8, 8, generator=random)
    return torch.stack(
        [
            torch.zeros(size_px, size_px),
            torch.ones(size_px, size_px),
            ((x[:, None] + x) % 2).float(),
            torch.rand(size_px, size_px, generator=random),
            resize(coarse_HW[None, None], (size_px, size_px))[0, 0],
        ]
    )


def graph_gating(gate: Gating) -> Gating:
    """Return what a graph can do of a gate: a batch does not know its slab, so that is left."""
    return "none" if gate == "slab" else gate


def compute_reference(
    network: AnyNetwork, image_ZHW: Tensor, gating: Gating = "hard"
) -> dict[str, Array]:
    """Compute the outputs of an ONNX file with torch, as `fullscale predict` does.

    Args:
        network: from `model.inference.prepare`.
        image_ZHW: intensities in [0, 1].
        gating: see `graph_gating`.

    Returns:
        Arrays by name of the output. `PROBABILITY`: float32 Z x K x H x W in [0, 1], after the
        slice classifier (CGM). Only for a network with a classifier: `ORGAN_PROBABILITY`, Z x K,
        and `LOGITS`, the pixels' probabilities without the classifier, of one member after the
        other along K.
    """
    classified = predict_slices(network, image_ZHW, InferenceSettings(gating=gating))
    found = {PROBABILITY: classified.probabilities.transpose(0, 1).numpy()}
    if classified.organ_probability is not None:
        all_open = [
            predict_slices(member, image_ZHW, InferenceSettings(gating="none")).probabilities
            for member in list_members(network)
        ]
        found[ORGAN_PROBABILITY] = classified.organ_probability.numpy()
        found[LOGITS] = torch.cat(all_open).transpose(0, 1).numpy()
    return found


def compare_outputs(
    image_ZHW: Tensor,
    wanted: dict[str, Array],
    content: bytes,
    *,
    batch_size: int,
    threshold: float,
) -> Parity:
    """Compute slices with an ONNX file, and compare every output of the file.

    Args:
        image_ZHW: intensities in [0, 1].
        wanted: from `compute_reference`, of the same slices.
        content: bytes of the ONNX file.
        batch_size: slices at a time.
        threshold: lowest probability of a pixel that belongs to an organ.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only; its warnings concern its own optimiser
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    total = Parity(0.0, 0, 0)
    for some in torch.split(torch.arange(len(image_ZHW)), batch_size):
        x_BCHW = adjacent_slices(image_ZHW, some, NUM_ADJACENT_SLICES)
        for name, array in zip(names, session.run(names, {SLICES: x_BCHW.numpy()}), strict=True):
            found = torch.from_numpy(array).sigmoid().numpy() if name == LOGITS else array
            total += _compare_arrays(found, wanted[name][some.numpy()], threshold)
    return total


def _compare_arrays(found: Array, wanted: Array, threshold: float) -> Parity:
    if found.shape != wanted.shape:
        raise ValueError(f"found an output of shape {found.shape}; wanted {wanted.shape}")
    difference = float(np.abs(found - wanted).max())
    if found.ndim == 2:  # probabilities of organs, which make no mask
        return Parity(difference, 0, 0)
    num_different = int(np.count_nonzero((found >= threshold) != (wanted >= threshold)))
    return Parity(difference, num_different, found.size)
