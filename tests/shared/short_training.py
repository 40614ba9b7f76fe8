"""Train a network for four steps on noise and print digests of its weights and of augmentation.

    python tests/shared/short_training.py NETWORK

QEMU shows the digest on another processor: apt install qemu-user, then

    qemu-x86_64 -cpu Haswell .venv/bin/python tests/shared/short_training.py NETWORK

QEMU 7.2 computes `grid_sample` wrongly, so the digest of augmentation differs there.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from fullscale.params import load_params
from fullscale.prediction.network_files import build, describe_network
from fullscale.runtime.cpu_kernels import fix_cpu_kernels
from fullscale.training.augmentation import Augment
from fullscale.training.dataset import Batch
from fullscale.training.step import SegmentationObjective, make_optimizer, seed_step

PARAMS = Path(__file__).parents[2] / "params.yaml"
NUM_STEPS, BATCH_SIZE, SIDE_PX = 4, 4, 64


def digest(tensors: Iterable[Tensor]) -> str:
    """Return 16 digits of the SHA-256 of tensors."""
    content = b"".join(each.detach().contiguous().numpy().tobytes() for each in tensors)
    return hashlib.sha256(content).hexdigest()[:16]


def draw_batch(generator: torch.Generator, num_organs: int) -> Batch:
    """Return a batch of noise between -200 and 280 HU; each tenth pixel belongs to an organ."""
    hu = torch.randint(-200, 280, (BATCH_SIZE, 3, SIDE_PX, SIDE_PX), generator=generator)
    is_organ = torch.rand(BATCH_SIZE, SIDE_PX, SIDE_PX, generator=generator) < 0.1
    organ = torch.randint(1, num_organs + 1, is_organ.shape, generator=generator)
    return Batch(
        hu.float(),
        (organ * is_organ).to(torch.uint8),
        torch.ones(BATCH_SIZE, num_organs, dtype=torch.bool),
        torch.zeros(BATCH_SIZE, dtype=torch.int64),
        torch.arange(BATCH_SIZE),
    )


def main(name: str) -> None:
    """Train and print."""
    fix_cpu_kernels("avx2", 2)
    params = load_params(PARAMS)
    ids = {organ: (number,) for number, organ in enumerate(params.organs, start=1)}
    # As they were when the digests were compared between processors, whatever params.yaml has now.
    official = params.recipes["unet"].model_copy(update={"architecture": "unet_official"})
    wide = params.train.augment.model_copy(update={"scale_fraction": 0.3})
    params = params.model_copy(
        update={
            "organs": ids,
            "recipes": {**params.recipes, "unet": official},
            "train": params.train.model_copy(update={"augment": wide}),
        }
    )
    seed = 0
    torch.manual_seed(seed)
    network = build(describe_network(name, params)).to(memory_format=torch.channels_last).train()
    optimizer = make_optimizer(network, params.train)
    none = params.train.augment.model_copy(
        update=dict.fromkeys(type(params.train.augment).model_fields, 0.0)
    )
    window = params.slice.window_hu
    objective, augmented = (
        SegmentationObjective(
            network, len(params.organs), window, params.recipes[name].loss_terms,
            Augment(augment, window, seed),
        )
        for augment in (none, params.train.augment)
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for step in range(NUM_STEPS):
        batch = draw_batch(generator, len(params.organs))
        image_BCHW, mask_BKHW, ignored_BHW = objective.prepare(batch)
        seed_step(seed, 0, step, 0, 0)
        loss, _ = objective.loss(
            image_BCHW.contiguous(memory_format=torch.channels_last),
            mask_BKHW,
            ignored_BHW,
            batch.annotated_BK,
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), params.train.gradient_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    print("weights", digest(network.state_dict().values()))
    print("augmentation", digest(augmented.prepare(batch)[:2]))


if __name__ == "__main__":
    main(sys.argv[1])
