"""Convert a checkpoint of the UNet 3+ authors' program to a folder as stage train writes it."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fullscale.params import SliceParams
from fullscale.prediction.network_files import (
    DESCRIPTION_NAME,
    WEIGHTS_NAME,
    NetworkDescription,
    save_trained,
)
from fullscale.runtime.errors import StageError, shorten
from model.official import OFFICIAL, from_official
from model.preprocessing import NUM_ADJACENT_SLICES

STATE_KEYS = ("state_dict", "model_state_dict", "model", "net")
"""Keys of the network's state in a checkpoint that holds more."""
MAX_LABEL_ID = 255
_ORGAN = re.compile(r"(?P<name>[^=]+)=(?P<ids>\d+(,\d+)*)")


def import_checkpoint(
    path: Path, folder: Path, architecture: str, organs: Sequence[str], slicing: SliceParams
) -> NetworkDescription:
    """Write weights.safetensors and network.json from a checkpoint; return the description.

    The network is named after the folder.

    Args:
        path: written with torch.save: a state dict in the authors' names, alone or under one of
            `STATE_KEYS`.
        folder: new folder for the network.
        architecture: a key of `model.official.OFFICIAL`.
        organs: NAME=ID or NAME=ID,ID, in the order of the network's output channels.
        slicing: how the network's training scans became slices.

    Raises:
        StageError: the checkpoint cannot be read or is of another network, an organ cannot be
            understood, or the folder already holds a network.
    """
    label_ids = parse_organs(organs)
    for name in (WEIGHTS_NAME, DESCRIPTION_NAME):
        if (folder / name).exists():
            raise StageError(f"{folder} already holds a {name}; name a new folder")
    state = read_state(path)
    try:
        network = from_official(architecture, state)
    except ValueError as error:
        raise StageError(f"{path}: {error}; choose --architecture to match it") from None
    width, num_channels = next(network.parameters()).shape[:2]  # the first convolution
    if num_channels != NUM_ADJACENT_SLICES:
        raise StageError(
            f"{path}: the network takes {num_channels} input channels, expected "
            f"{NUM_ADJACENT_SLICES}, a slice between its neighbours; it cannot be imported"
        )
    if network.num_organs != len(label_ids):
        raise StageError(
            f"{path}: the network segments {network.num_organs} organs, but --organ names "
            f"{len(label_ids)} ({', '.join(label_ids)}); name the organ of each output channel, in "
            "order"
        )
    if not all(torch.isfinite(value).all() for value in state.values()):
        raise StageError(f"{path}: some weights are not finite; use a checkpoint from before that")
    official = OFFICIAL[architecture]
    description = NetworkDescription(
        name=folder.name,
        architecture=official.network,
        encoder="plain",
        width=width,
        deep_supervision=official.options.get("deep_supervision"),
        cgm=official.options.get("cgm"),
        organs=label_ids,
        slice=slicing,
    )
    save_trained(folder, network, description)
    return description


def parse_organs(organs: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Convert NAME=ID or NAME=ID,ID to organ -> label ids, in the same order.

    Raises:
        StageError: another form, a label id outside 1..255, or a name or id that is used twice.
    """
    label_ids: dict[str, tuple[int, ...]] = {}
    for text in organs:
        found = _ORGAN.fullmatch(text)
        ids = tuple(int(each) for each in found["ids"].split(",")) if found else ()
        if found is None or not all(1 <= each <= MAX_LABEL_ID for each in ids):
            raise StageError(
                f"found --organ {text}; wanted NAME=ID or NAME=ID,ID with label ids from 1 to "
                f"{MAX_LABEL_ID}, such as liver=1"
            )
        used = {each for others in label_ids.values() for each in others}
        if found["name"] in label_ids or len({*ids, *used}) < len(ids) + len(used):
            raise StageError(f"--organ {text} repeats a name or a label id; give each of them once")
        label_ids[found["name"]] = ids
    return label_ids


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a checkpoint; code in the file is never run.

    Raises:
        StageError: the file is missing or damaged, or holds more than tensors and plain values.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise StageError(f"{path} does not exist; name a file that torch.save wrote") from None
    except pickle.UnpicklingError as error:
        raise StageError(
            f"{path} is not a file of torch.save with tensors only, and is not loaded, because "
            "other objects in it could run code; save it again with "
            f"torch.save(network.state_dict(), FILE) ({shorten(error, 120)})"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise StageError(f"{path} cannot be read: {shorten(error)}; copy it again") from None
    if isinstance(content, Mapping):
        nested = [content[key] for key in STATE_KEYS if isinstance(content.get(key), Mapping)]
        content = nested[0] if nested else content
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise StageError(
            f"{path} holds no state dict, alone or under one of {', '.join(STATE_KEYS)}; save it "
            "with torch.save(network.state_dict(), FILE)"
        )
    return dict(content)
