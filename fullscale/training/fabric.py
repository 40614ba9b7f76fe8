"""Devices and precision of a training, by Lightning Fabric."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from fullscale.params import Params
from fullscale.runtime.startup import compiler_left_out
from fullscale.training.batch_size import uses_bf16

# Imported when used: it takes half a second.
if TYPE_CHECKING:
    from lightning_fabric import Fabric


def make_fabric(params: Params) -> Fabric:
    """Return a Fabric, not launched yet, with the devices and the precision of `params`."""
    with compiler_left_out():
        from lightning_fabric import Fabric

    train = params.train
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(mode=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Fabric(
        accelerator="auto",
        devices=train.devices,
        num_nodes=train.num_nodes,
        strategy=train.strategy,
        precision="bf16-mixed" if uses_bf16(params, device) else "32-true",
    )
