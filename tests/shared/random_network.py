"""Networks with random weights, in place of trained ones."""

from __future__ import annotations

from pathlib import Path

import torch

from fullscale.params import Params
from fullscale.prediction.network_files import Trained, build, describe_network, save_trained

NEIGHBOUR_MM = 7.0


def random_trained(params: Params, name: str = "unet3plus", *, seed: int = 0, **changes) -> Trained:
    """Return a network with random weights; its classifier finds every organ in every slice.

    Args:
        params: of the project.
        name: of a recipe.
        seed: of the weights.
        changes: of the description.
    """
    torch.manual_seed(seed)
    # Label names have ids in a cohort only; those of makers of cohorts count from 1.
    ids = {organ: (number,) for number, organ in enumerate(params.organs, start=1)}
    is_named = any(isinstance(each, str) for labels in params.organs.values() for each in labels)
    params = params.model_copy(update={"organs": ids}) if is_named else params
    description = describe_network(name, params)
    if description.slice.neighbour_mm == "auto":
        known = description.slice.model_copy(update={"neighbour_mm": NEIGHBOUR_MM})
        description = description.model_copy(update={"slice": known})
    description = description.model_copy(update=changes)
    network = build(description).eval()
    if network.classifier is not None:
        network.classifier.conv.bias.data.unflatten(0, (-1, 2))[:, 1] += 100
    return Trained(network, description)


def save_random(folder: Path, params: Params, name: str = "unet3plus", *, seed: int = 0) -> Path:
    """Write such a network to a folder, as stage train does; return the folder."""
    trained = random_trained(params, name, seed=seed)
    save_trained(folder, trained.network, trained.description)
    return folder


def narrow(params: Params) -> Params:
    """Return params with the smallest network and small slices."""
    return params.model_copy(
        update={
            "train": params.train.model_copy(update={"width": 4}),
            "slice": params.slice.model_copy(update={"size_px": 32, "pixel_mm": 12}),
        }
    )
