"""Random changes to training slices, a batch at a time on the training device.

B batch, C channels, H W pixels, N nodes and K control points along a side, T taps of a kernel.

A sample is moved by one smooth map: bent by cubic B-splines over a coarse lattice (free-form
deformation; Rueckert et al., IEEE Trans. Med. Imaging 18(8), 1999), then turned, scaled, shifted
and flipped by a matrix. Image and label are resampled once each, at the same points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - as everyone calls it
from numpy.typing import NDArray
from torch import Tensor

from fullscale.params import AugmentParams

NUM_SPANS = 4
"""Spans of the lattice along a side. The bend stays one-to-one while no control point moves by more
than 1 / 2.046 of a span (Choi and Lee, Graphical Models 62(1), 2000): AugmentParams holds to it."""
NUM_CONTROLS = NUM_SPANS + 3
NUM_NODES = 17
"""The map is computed at this many nodes along a side; between them it is bilinear."""
MIDDLE = 0.5


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch, before any strength is applied.

    Attributes:
        rotation_B, scale_B, shift_B2 (x, y), contrast_B: uniform in -1..1.
        flip_B, blur_B: uniform in 0..1.
        bend_BKK2: uniform in the unit disc, (x, y) of each control point.
        noise_seed_B: seeds the generator of a sample's noise.
    """

    rotation_B: NDArray[np.float64]
    scale_B: NDArray[np.float64]
    shift_B2: NDArray[np.float64]
    contrast_B: NDArray[np.float64]
    flip_B: NDArray[np.float64]
    blur_B: NDArray[np.float64]
    bend_BKK2: NDArray[np.float64]
    noise_seed_B: list[int]


def draw(seed: int, epoch: int, positions: Sequence[int]) -> Draws:
    """The numbers of some samples of an epoch; each sample's depend on nothing but its own place.

    Seed is the key, epoch and position are the counter of the Philox generator (Salmon et al.,
    SC 2011), so that no two samples ever share a number. All are drawn, whatever is switched off:
    switching one change on leaves the others as they were.
    """
    uniform, noise_seed_B = [], []
    for position in positions:
        counter = np.array([0, 0, position, epoch], dtype=np.uint64)
        random = np.random.Generator(np.random.Philox(key=seed, counter=counter))
        noise_seed_B.append(int(random.integers(2**63)))
        uniform.append(random.random(7 + 2 * NUM_CONTROLS**2))
    few, bend = np.split(np.stack(uniform), [7], axis=1)
    signed = 2 * few - 1
    radius, turn = np.sqrt(bend[:, ::2]), 2 * math.pi * bend[:, 1::2]
    disc = np.stack([radius * np.cos(turn), radius * np.sin(turn)], axis=-1)
    return Draws(
        rotation_B=signed[:, 0],
        scale_B=signed[:, 1],
        shift_B2=signed[:, 2:4],
        contrast_B=signed[:, 4],
        flip_B=few[:, 5],
        blur_B=few[:, 6],
        bend_BKK2=disc.reshape(-1, NUM_CONTROLS, NUM_CONTROLS, 2),
        noise_seed_B=noise_seed_B,
    )


def sampling_nodes(draws: Draws, params: AugmentParams, height_px: int, width_px: int) -> Tensor:
    """Where the changed picture takes its pixels from, at N x N nodes spread over it.

    A node is bent by at most elastic_fraction of the shorter side, then goes the way back through
    flip, scale, rotation about the picture's middle, and shift.

    Returns:
        float32 on the CPU, B x 2 x N x N: x and y in the source, where -1 and 1 are the centres of
        the outermost pixels.
    """
    from kornia.geometry import (
        create_meshgrid,
        denormalize_pixel_coordinates,
        get_affine_matrix2d,
        normalize_pixel_coordinates,
        warp_grid,
    )

    num_samples = len(draws.rotation_B)
    nodes = denormalize_pixel_coordinates(
        create_meshgrid(NUM_NODES, NUM_NODES, dtype=torch.float64), height_px, width_px
    )
    if params.elastic_fraction:
        largest_px = params.elastic_fraction * min(height_px, width_px)
        nodes = nodes + torch.from_numpy(largest_px * _bend(draws.bend_BKK2))
    sides_px = np.array([width_px, height_px])
    scale_B2 = np.stack([1 + params.scale_fraction * draws.scale_B] * 2, axis=1)
    scale_B2[draws.flip_B < params.flip_probability, 0] *= -1
    forth_B33 = get_affine_matrix2d(
        translations=torch.from_numpy(params.shift_fraction * sides_px * draws.shift_B2),
        center=torch.from_numpy((sides_px - 1) / 2).expand(num_samples, 2),
        scale=torch.from_numpy(scale_B2),
        angle=torch.from_numpy(params.rotation_deg * draws.rotation_B),
    )
    source_px = warp_grid(nodes, torch.linalg.inv(forth_B33))
    source_BNN2: Tensor = normalize_pixel_coordinates(source_px, height_px, width_px)
    return source_BNN2.permute(0, 3, 1, 2).float().contiguous()


def _bend(control_BKK2: NDArray[np.float64]) -> NDArray[np.float64]:
    """The spline's value at the nodes, B x N x N x 2; no longer than the longest control vector."""
    at = np.linspace(0, NUM_SPANS, NUM_NODES)
    first = np.minimum(at.astype(int), NUM_SPANS - 1)
    t = at - first
    cubics = [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, 3 * (t + t**2 - t**3) + 1, t**3]
    weights_NK = np.zeros((NUM_NODES, NUM_CONTROLS))
    for offset, cubic in enumerate(cubics):
        weights_NK[np.arange(NUM_NODES), first + offset] = cubic / 6
    control_B2KK = control_BKK2.transpose(0, 3, 1, 2)
    return (weights_NK @ control_B2KK @ weights_NK.T).transpose(0, 2, 3, 1)


def resample(image_BCHW: Tensor, label_BHW: Tensor, nodes_B2NN: Tensor) -> tuple[Tensor, Tensor]:
    """Take image (bilinear) and label (nearest) from the points that `sampling_nodes` gave.

    Outside lies air, which is 0 in window units, and background.
    """
    points_BHW2 = F.interpolate(
        nodes_B2NN, size=image_BCHW.shape[-2:], mode="bilinear", align_corners=True
    ).permute(0, 2, 3, 1)
    image_BCHW = F.grid_sample(image_BCHW, points_BHW2, mode="bilinear", align_corners=True)
    moved_B1HW = F.grid_sample(
        label_BHW[:, None].float(), points_BHW2, mode="nearest", align_corners=True
    )
    return image_BCHW, moved_B1HW[:, 0].to(label_BHW.dtype)


def blur_(image_BCHW: Tensor, sigma_px_B: NDArray[np.float64], radius_px: int) -> None:
    """Blur each sample in place by its own Gaussian, rows then columns; outside lies 0.

    Shifted pictures are added: on a CPU that takes a third of the time of a convolution in B x C
    groups, and how a sample is rounded cannot depend on the batch it is in.
    """
    from kornia.filters import get_gaussian_kernel1d

    weights_BT = get_gaussian_kernel1d(2 * radius_px + 1, torch.from_numpy(sigma_px_B)[:, None])
    weights_TB111 = _to_device(weights_BT.numpy().T[..., None, None, None], image_BCHW.device)
    half_BCHW = torch.empty_like(image_BCHW)
    for axis, source, target in ((2, image_BCHW, half_BCHW), (3, half_BCHW, image_BCHW)):
        torch.mul(source, weights_TB111[radius_px], out=target)
        size_px = source.shape[axis]
        for shift_px in range(1, min(radius_px, size_px - 1) + 1):
            rest_px = size_px - shift_px
            for start, place in ((0, shift_px), (shift_px, 0)):
                target.narrow(axis, place, rest_px).addcmul_(
                    source.narrow(axis, start, rest_px), weights_TB111[radius_px + shift_px]
                )


def add_noise_(image_BCHW: Tensor, deviation: float, seed_B: Sequence[int]) -> None:
    """Add Gaussian noise in place, each sample's from a generator of its own seed."""
    generator = torch.Generator(image_BCHW.device)
    noise_CHW = torch.empty_like(image_BCHW[0])
    for image_CHW, seed in zip(image_BCHW, seed_B, strict=True):
        image_CHW += noise_CHW.normal_(0, deviation, generator=generator.manual_seed(seed))


def _to_device(numbers: NDArray[np.float64], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers, np.float32)).to(device, non_blocking=True)


class Augment:
    """Move image and label together, then blur the image, change its contrast and add noise.

    What happens to a sample is a function of (seed, epoch, its position in the epoch): it is the
    same in any batch, on any rank and after any interruption. Only noise differs between kinds of
    device, whose generators differ. torch's global random state is neither read nor moved.

    Args:
        params: strengths; 0 switches a change off.
        window_hu: the window that 0 and 1 of the image stand for.
        seed: not negative.

    Raises:
        ValueError: seed is negative.
    """

    def __init__(self, params: AugmentParams, window_hu: tuple[float, float], seed: int) -> None:
        if seed < 0:
            raise ValueError(f"seed is {seed}, expected 0 or more: choose another train.seed")
        self._params = params
        self._noise = params.noise_hu / (window_hu[1] - window_hu[0])
        self._seed = seed
        self._moves = any(
            (
                params.rotation_deg,
                params.scale_fraction,
                params.shift_fraction,
                params.elastic_fraction,
                params.flip_probability,
            )
        )
        self._changes = self._moves or any(
            (params.blur_px, params.contrast_fraction, params.noise_hu)
        )

    @torch.no_grad()
    def __call__(
        self, image_BCHW: Tensor, label_BHW: Tensor, epoch: int, position_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Change a batch; always computes in float32.

        Args:
            image_BCHW: float32 in 0..1 (window units).
            label_BHW: uint8 label map; follows the image's geometry by nearest neighbour.
            epoch: from 0.
            position_B: int64, each sample's position in the epoch's order; best on the CPU, where
                reading it waits for nothing.

        Returns:
            Image and label of the same shapes and types; the very same where all is switched off.

        Raises:
            ValueError: the image is not float32, or shapes do not belong together.
        """
        if image_BCHW.dtype != torch.float32:
            raise ValueError(
                f"image is {image_BCHW.dtype}, expected torch.float32 in window units: "
                "normalise it first"
            )
        num_samples, _, height_px, width_px = image_BCHW.shape
        if label_BHW.shape != (num_samples, height_px, width_px) or len(position_B) != num_samples:
            raise ValueError(
                f"image {tuple(image_BCHW.shape)} came with label {tuple(label_BHW.shape)} and "
                f"{len(position_B)} positions, expected label B x H x W and a position for each "
                "of the image's B samples"
            )
        if not self._changes:
            return image_BCHW, label_BHW
        params, device = self._params, image_BCHW.device
        draws = draw(self._seed, epoch, position_B.tolist())
        if self._moves:
            nodes_B2NN = sampling_nodes(draws, params, height_px, width_px)
            nodes_B2NN = nodes_B2NN.to(device, non_blocking=True)
            image_BCHW, label_BHW = resample(image_BCHW, label_BHW, nodes_B2NN)
        else:
            image_BCHW = image_BCHW.clone(memory_format=torch.contiguous_format)
        if params.blur_px:
            blur_(image_BCHW, params.blur_px * draws.blur_B, math.ceil(3 * params.blur_px))
        if params.contrast_fraction:
            gain_B = 1 + params.contrast_fraction * draws.contrast_B
            gain_B111 = _to_device(gain_B[:, None, None, None], device)
            image_BCHW.sub_(MIDDLE).mul_(gain_B111).add_(MIDDLE)
        if params.noise_hu:
            add_noise_(image_BCHW, self._noise, draws.noise_seed_B)
        return image_BCHW.clamp_(0, 1), label_BHW
