"""A trained network that no one trained, for the tests of what is done with one."""

from __future__ import annotations

import torch

from tasks.params import Params
from tasks.trained import Trained, build, describe


def random_trained(params: Params, name: str = "unet3plus", *, seed: int = 0, **changes) -> Trained:
    """Random weights whose gate, where there is one, is open: every slice has something in it.

    Args:
        params: of the project.
        name: of a recipe.
        seed: of the weights.
        changes: of the description.
    """
    torch.manual_seed(seed)
    description = describe(name, params).model_copy(update=changes)
    network = build(description).eval()
    if network.classifier is not None:
        network.classifier.conv.bias.data.unflatten(0, (-1, 2))[:, 1] += 100
    return Trained(network, description)
