"""Whether an ONNX file computes what prediction computes, tried with ONNX Runtime on the CPU.

Axis letters: Z slices, B batch, K organs, H W pixels of a slice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.blocks import resize
from model.inference import adjacent_slices, predict_slices
from model.preprocessing import NUM_ADJACENT_SLICES
from model.segmentation import SegmentationNetwork

SLICES = "slices"
PROBABILITY = "probability"
ORGAN_PROBABILITY = "organ_probability"
LOGITS = "logits"
"""Before the gate: an output for this check only."""

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Parity:
    """How far two computations of the same slices are apart.

    Attributes:
        difference: largest absolute difference of probabilities, of pixels as of organs; NaN where
            one of them is.
        num_different: pixels that one of them has in an organ's mask and the other has not.
        num_pixels: pixels compared, each once for every organ, batch and output.
    """

    difference: float
    num_different: int
    num_pixels: int

    def __add__(self, other: Parity) -> Parity:
        return Parity(
            float(np.maximum(self.difference, other.difference)),
            self.num_different + other.num_different,
            self.num_pixels + other.num_pixels,
        )


def make_slices(size_px: int, seed: int = 0) -> Tensor:
    """Slices to compare on: only air, the densest, a checkerboard, noise, and smooth regions.

    Args:
        size_px: H and W.
        seed: of the last two.

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


def predict(network: SegmentationNetwork, image_ZHW: Tensor) -> dict[str, Array]:
    """What prediction says of slices.

    Args:
        network: from `model.inference.prepare`.
        image_ZHW: intensities in [0, 1].

    Returns:
        By name of the output: probabilities Z x K x H x W with a hard gate, and, of a network with
        a classifier, the same without it under `LOGITS`, and those of organs, Z x K.
    """
    gated = predict_slices(network, image_ZHW, gate="hard")
    found = {PROBABILITY: gated.probabilities.transpose(0, 1).numpy()}
    if gated.organ_probability is not None:
        ungated = predict_slices(network, image_ZHW, gate="none")
        found[ORGAN_PROBABILITY] = gated.organ_probability.numpy()
        found[LOGITS] = ungated.probabilities.transpose(0, 1).numpy()
    return found


def compare(
    image_ZHW: Tensor,
    wanted: dict[str, Array],
    content: bytes,
    *,
    batch_size: int,
    threshold: float,
) -> Parity:
    """Compute slices with an ONNX file, and compare every output that it has.

    Args:
        image_ZHW: intensities in [0, 1].
        wanted: from `predict`, of the same slices.
        content: of the file.
        batch_size: slices at a time.
        threshold: probability from which a pixel belongs to an organ.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; its warnings are of its own optimiser
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
    if found.ndim == 2:  # of organs: no mask
        return Parity(difference, 0, 0)
    num_different = int(np.count_nonzero((found >= threshold) != (wanted >= threshold)))
    return Parity(difference, num_different, found.size)
