"""Augmentation of a batch against a plain formulation, in one process, taking turns.

The plain formulation is kornia's AugmentationSequential with the same augmentations, each with its
own resampling, and random numbers from torch's global state. The time of a training step of the
narrow UNet is given for comparison.

    python -m benchmarks.augmentation
    python -m benchmarks.augmentation --clock cpu --threads 1
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import describe_machine
from fullscale.params import AugmentParams
from fullscale.training.augmentation import Augment
from model.losses import total_loss
from model.networks import build_network

WINDOW_HU = (-160.0, 240.0)
EVERYTHING = AugmentParams(
    rotation_deg=10,
    scale_fraction=0.1,
    shift_fraction=0.05,
    elastic_fraction=0.03,
    flip_probability=0.5,
    noise_hu=10,
    blur_px=1,
    contrast_fraction=0.1,
)
NUM_SAMPLES, WIDTH = 16, 8
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def build_plain(params: AugmentParams) -> Callable[[Tensor, Tensor], Any]:
    """The same changes as a chain of kornia's; its bends are as coarse as it makes them itself."""
    from kornia import augmentation as kornia

    shift, scale, gain = params.shift_fraction, params.scale_fraction, params.contrast_fraction
    chain = kornia.AugmentationSequential(
        kornia.RandomHorizontalFlip(p=params.flip_probability),
        kornia.RandomAffine(
            params.rotation_deg, translate=(shift, shift), scale=(1 - scale, 1 + scale), p=1.0
        ),
        kornia.RandomElasticTransform(
            alpha=(params.elastic_fraction, params.elastic_fraction), align_corners=False, p=1.0
        ),
        kornia.RandomGaussianBlur((7, 7), (0.01, params.blur_px), p=1.0),
        kornia.RandomContrast((1 - gain, 1 + gain), p=1.0),
        kornia.RandomGaussianNoise(std=params.noise_hu / (WINDOW_HU[1] - WINDOW_HU[0]), p=1.0),
        data_keys=["input", "mask"],
    )

    def change(image_BCHW: Tensor, label_BHW: Tensor) -> tuple[Tensor, Tensor]:
        image, label = chain(image_BCHW, label_BHW[:, None].float())
        return image.clamp(0, 1), label[:, 0].round().to(torch.uint8)

    return change


def measure(side_px: int, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median milliseconds of the plain form, ours and a training step, after a round to warm up."""
    rng = torch.Generator().manual_seed(0)
    image = torch.rand(NUM_SAMPLES, 3, side_px, side_px, generator=rng)
    label = torch.zeros(NUM_SAMPLES, side_px, side_px, dtype=torch.uint8)
    label[:, side_px // 4 : side_px // 2, side_px // 4 : side_px // 2] = 1
    target = torch.stack([label == 1, label == 2], dim=1)
    position = torch.arange(NUM_SAMPLES)
    plain, augment = build_plain(EVERYTHING), Augment(EVERYTHING, WINDOW_HU, seed=0)
    network = build_network("unet", in_channels=3, num_organs=2, width=WIDTH)

    def step() -> None:
        total_loss(network(image), target).total.backward()

    taken: dict[str, list[float]] = {"plain": [], "ours": [], "step": []}
    for turn in range(rounds + 1):
        forms: dict[str, Callable[[], Any]] = {
            "plain": lambda: plain(image, label),
            "ours": lambda turn=turn: augment(image, label, turn, position),
            "step": step,
        }
        first, second = ("plain", "ours") if turn % 2 else ("ours", "plain")
        for name in (first, second, "step"):
            start = clock()
            forms[name]()
            if turn:
                taken[name].append(1000 * (clock() - start))
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--sides", type=int, nargs="+", default=[96, 320], metavar="PX")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", "Default grid_sample")  # the plain form's, inside kornia
    print(describe_machine(torch.device("cpu")))
    print("| side, px | plain, ms | ours, ms | plain / ours | step of the UNet, ms | ours / step |")
    print("|---|---|---|---|---|---|")
    for side_px in args.sides:
        ms = measure(side_px, args.rounds, CLOCKS[args.clock])
        plain, ours, step = ms["plain"], ms["ours"], ms["step"]
        print(
            f"| {side_px} | {plain:.1f} | {ours:.1f} | {plain / ours:.1f} | {step:.0f} "
            f"| {ours / step:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
