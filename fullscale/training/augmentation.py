"""Random augmentation of training slices, a batch at a time on the training device.

B batch, C channels, H W pixels, N nodes and K control points along a side, T taps of a kernel.

The geometry of a sample is changed by one smooth map: an elastic deformation by cubic B-splines
over a coarse lattice (free-form deformation; Rueckert et al., IEEE Trans. Med. Imaging 18(8),
1999), then rotation, scaling, shift and flip by a matrix. Image and label are resampled once each,
at the same points.
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
"""Spans of the lattice along a side. The deformation is one-to-one if no control point moves by
more than 1 / 2.046 of a span (Choi and Lee, Graphical Models 62(1), 2000). AugmentParams ensures
it."""
NUM_CONTROLS = NUM_SPANS + 3
NUM_NODES = 17
"""Nodes along a side at which the map is computed; between them it is bilinear."""
MIDDLE = 0.5


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch, not yet scaled by the augmentation strengths.

    Attributes:
        rotation_B, scale_B, shift_B2 (x, y), contrast_B: uniform in -1..1.
        flip_B, blur_B: uniform in 0..1.
        bend_BKK2: uniform in the unit disc, (x, y) of each control point.
        noise_seed_B: seed of each sample's noise.
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
    """Draw the random numbers of some samples of an epoch.

    A sample's numbers depend only on seed, epoch and position: the seed is the key, epoch and
    position are the counter of a Philox generator (Salmon et al., SC 2011). No two samples share
    numbers. Numbers of augmentations that are off are drawn as well, so that enabling one does not
    change the others.
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
    """Compute the source points of the augmented image at N x N nodes.

    Each node is displaced by at most elastic_fraction of the shorter side, then mapped by the
    inverse of flip, scale, rotation about the image's centre, and shift.

    Returns:
        float32 on the CPU, B x 2 x N x N: x and y in the source, where -1 and 1 are the centres of
        the outermost pixels.
    """
    # Imported when used: without geometric augmentation, kornia is not needed.
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
    """Evaluate the splines at the nodes, B x N x N x 2; at most as long as the control vectors."""
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
    """Resample image (bilinear) and label (nearest) at the points of `sampling_nodes`.

    Points outside the image are air, which is 0 in window units, and background.
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
    """Blur each sample in place with a Gaussian of its sigma, rows then columns, zero padding."""
    # Weighted sums of shifted images: on the CPU three times as fast as a convolution with B x C
    # groups, and a sample's rounding does not depend on its batch.
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
    """Add Gaussian noise in place, generated from each sample's seed."""
    generator = torch.Generator(image_BCHW.device)
    noise_CHW = torch.empty_like(image_BCHW[0])
    for image_CHW, seed in zip(image_BCHW, seed_B, strict=True):
        image_CHW += noise_CHW.normal_(0, deviation, generator=generator.manual_seed(seed))


def _to_device(numbers: NDArray[np.float64], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers, np.float32)).to(device, non_blocking=True)


class Augment:
    """Transform image and label together, then blur the image, change its contrast and add noise.

    The augmentation of a sample is a function of (seed, epoch, position in the epoch): it is the
    same in any batch, on any rank and after any interruption. Only the noise depends on the kind
    of device, as their generators differ. torch's global random state is neither used nor changed.

    Args:
        params: strengths; 0 disables an augmentation.
        window_hu: HU of the image values 0 and 1.
        seed: 0 or more.

    Raises:
        ValueError: seed is negative.
    """

    def __init__(self, params: AugmentParams, window_hu: tuple[float, float], seed: int) -> None:
        if seed < 0:
            raise ValueError(f"seed is {seed}, expected 0 or more: choose another of seeds")
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
        """Augment a batch, in float32.

        Args:
            image_BCHW: float32 in 0..1 (window units).
            label_BHW: uint8 label map; follows the image's geometry by nearest neighbour.
            epoch: counted from 0.
            position_B: int64, each sample's position in the epoch's order; preferably on the CPU,
                as reading it from a GPU would wait for the GPU.

        Returns:
            Image and label of the same shapes and types; the inputs if nothing is enabled.

        Raises:
            ValueError: the image is not float32, or the shapes do not fit.
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
