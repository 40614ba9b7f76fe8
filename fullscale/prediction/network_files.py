"""Trained networks on disk: weights as safetensors, and a description to rebuild the network.

A folder with network.json holds one network. A folder without it, whose subfolders hold networks of
the same recipe, is their ensemble: so are artifacts/train/NETWORK, with a subfolder for each seed,
and the files of a registered version of several networks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from fullscale.params import Params, ParamsSection, SliceParams
from fullscale.runtime.errors import StageError, shorten
from fullscale.runtime.files import file_sha256, write_atomically
from fullscale.scans.slicing import Grid
from model.ensemble import AnyNetwork, Ensemble, list_members
from model.networks import build_network
from model.preprocessing import NUM_ADJACENT_SLICES
from model.segmentation import SegmentationNetwork

WEIGHTS_NAME = "weights.safetensors"
DESCRIPTION_NAME = "network.json"
_MEMBER_PREFIX = "network_"


class TrainedOn(ParamsSection):
    """Geometry of the training cases: each field is the lowest and the highest value, in mm.

    Attributes:
        slice_spacing_mm: distance of neighbouring slices.
        pixel_spacing_mm: distance of neighbouring voxels in a slice, along either axis.
        height_mm: from the lower edge of the lowest slice to the upper edge of the highest one.
        trunk_depth_mm: of the trunk from front to back, as `scans.trunk` finds it.
        trunk_width_mm: of the trunk from left to right, without arms.
    """

    slice_spacing_mm: tuple[float, float]
    pixel_spacing_mm: tuple[float, float]
    height_mm: tuple[float, float]
    trunk_depth_mm: tuple[float, float]
    trunk_width_mm: tuple[float, float]

    @classmethod
    def of(cls, grids: Sequence[Grid]) -> TrainedOn:
        """Summarise the grids of some scans, at least one."""
        spacing_mm = np.array([grid.spacing_mm for grid in grids])
        num_slices = np.array([grid.shape_ZYX[0] for grid in grids])
        trunk_mm = np.array([grid.trunk_mm for grid in grids])
        return cls(
            slice_spacing_mm=_range(spacing_mm[:, 0]),
            pixel_spacing_mm=_range(spacing_mm[:, 1:]),
            height_mm=_range(spacing_mm[:, 0] * num_slices),
            trunk_depth_mm=_range(trunk_mm[:, 0]),
            trunk_width_mm=_range(trunk_mm[:, 1]),
        )


def _range(values: NDArray[np.float64]) -> tuple[float, float]:
    return round(float(values.min()), 4), round(float(values.max()), 4)


class NetworkDescription(ParamsSection):
    """Everything needed, in addition to the weights, to segment a scan with a network.

    Attributes:
        name: the network's name in params.yaml.
        architecture, encoder, width, deep_supervision, cgm: arguments of `build_network`.
        organs: organ to its label ids; the order is that of the network's channels, and an
            organ's first id is written into predicted label maps.
        slice: settings that turn scans into slices; of a trained network, `neighbour_mm` is a
            number.
        epoch: epoch of the weights, counted from 1; 0 if not known.
        val_dice: mean 3D Dice of the validation cases at that epoch, on the slices' grid.
        trained_on: geometry of the training cases; None if not known.
    """

    name: str
    architecture: str
    encoder: str
    width: int
    deep_supervision: bool | None
    cgm: bool | None
    organs: dict[str, tuple[int, ...]]
    slice: SliceParams
    epoch: int = 0
    val_dice: float = 0.0
    trained_on: TrainedOn | None = None

    @property
    def neighbour_mm(self) -> float:
        """Distance of the neighbours of a slice in mm.

        Raises:
            StageError: it is still "auto": the network was not trained.
        """
        if self.slice.neighbour_mm == "auto":
            raise StageError(
                f"network {self.name} has slice.neighbour_mm auto, which only training decides; "
                "name the distance in mm"
            )
        return self.slice.neighbour_mm


@dataclass(frozen=True)
class Trained:
    """A network, or an ensemble of several, in eval mode, and its description.

    Attributes:
        network: in eval mode.
        description: of an ensemble, that of its first member with the members' mean `val_dice` and
            the epoch 0, for each has its own.
    """

    network: AnyNetwork
    description: NetworkDescription

    @property
    def num_members(self) -> int:
        """Return the number of networks that segment together; 1 for a single one."""
        return len(list_members(self.network))


def describe_network(name: str, params: Params) -> NetworkDescription:
    """Return the description of network `name` according to params.yaml."""
    recipe = params.recipes[name]
    return NetworkDescription(
        name=name,
        architecture=recipe.architecture,
        encoder=recipe.encoder,
        width=params.train.width,
        deep_supervision=recipe.deep_supervision,
        cgm=recipe.cgm,
        organs=params.label_ids,
        slice=params.slice,
    )


def choose_neighbour_mm(asked: float | Literal["auto"], grids: Sequence[Grid]) -> float:
    """Return slice.neighbour_mm as a number: "auto" is the median slice spacing of the scans.

    Args:
        asked: from params.yaml.
        grids: of the training cases.
    """
    if asked != "auto":
        return asked
    return round(float(np.median([grid.spacing_mm[0] for grid in grids])), 4)


def build(description: NetworkDescription) -> SegmentationNetwork:
    """Build the network of a description, with initial weights.

    Raises:
        StageError: there is no network with these options.
    """
    try:
        return build_network(
            description.architecture,
            in_channels=NUM_ADJACENT_SLICES,
            num_organs=len(description.organs),
            width=description.width,
            encoder=description.encoder,
            deep_supervision=description.deep_supervision,
            cgm=description.cgm,
        )
    except ValueError as error:
        raise StageError(f"recipes.{description.name}: {error}") from None


def save_trained(
    folder: Path, network: SegmentationNetwork, description: NetworkDescription
) -> None:
    """Write weights.safetensors and network.json to a folder, each atomically."""
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    write_atomically(folder / WEIGHTS_NAME, save(state))
    write_atomically(folder / DESCRIPTION_NAME, description.model_dump_json(indent=2) + "\n")


def member_folders(folder: Path) -> list[Path]:
    """Return the folders of the networks in a folder: itself, or its subfolders by their number.

    A folder that holds no network at all is returned as it is, for the message on what it lacks.
    """
    if (folder / DESCRIPTION_NAME).is_file() or (folder / WEIGHTS_NAME).is_file():
        return [folder]
    found = [path.parent for path in folder.glob(f"*/{DESCRIPTION_NAME}")]
    # By number, because 10 follows 9; other names come last.
    found.sort(key=lambda path: (not path.name.isdecimal(), path.name.zfill(20)))
    return found or [folder]


def package_files(folders: Sequence[Path]) -> dict[str, Path]:
    """Return what a registered version keeps of its networks, by artifact name.

    Args:
        folders: of the networks. Of one the two files are kept, of several the folders, under
            `network_0`, `network_1`, ...; the names of the folders must differ.
    """
    if len(folders) == 1:
        return {"weights": folders[0] / WEIGHTS_NAME, "description": folders[0] / DESCRIPTION_NAME}
    return {f"{_MEMBER_PREFIX}{place}": folder for place, folder in enumerate(folders)}


def find_packaged(artifacts: Mapping[str, str]) -> list[Path]:
    """Return the folders of the networks of a registered version, in the order of its members.

    Args:
        artifacts: artifact name to path, with the names of `package_files`.
    """
    names = [name for name in artifacts if name.startswith(_MEMBER_PREFIX)]
    if not names:
        return [Path(artifacts["weights"]).parent]
    names.sort(key=lambda name: int(name.removeprefix(_MEMBER_PREFIX)))
    return [Path(artifacts[name]) for name in names]


def digest_weights(folders: Sequence[Path]) -> str:
    """Return the SHA-256 that names some weights: the file's, or of several the digest of theirs.

    Args:
        folders: of the networks, in the order of the ensemble's members.

    Raises:
        FileNotFoundError: a network has no weights.
    """
    digests = [file_sha256(folder / WEIGHTS_NAME) for folder in folders]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()


def choose_deployed(folders: Sequence[Path], deploy: Literal["ensemble", "best"]) -> Sequence[Path]:
    """Return the folders of the trainings that are registered together.

    Args:
        folders: of all trainings of a network.
        deploy: "ensemble" takes all, "best" the one with the highest Dice of the validation cases,
            of equal ones the first.

    Raises:
        StageError: a network's description is missing or damaged.
    """
    if deploy == "ensemble" or len(folders) == 1:
        return folders
    return [max(folders, key=lambda folder: load_trained(folder).description.val_dice)]


def load_trained(folder: Path) -> Trained:
    """Read the network in a folder, or the ensemble of those in its subfolders, in eval mode.

    Raises:
        StageError: as `load_members` does.
    """
    return load_members(member_folders(folder))


def load_members(folders: Sequence[Path]) -> Trained:
    """Read a network, or several as one ensemble, in eval mode.

    Args:
        folders: of the networks, as `save_trained` writes them; at least one.

    Raises:
        StageError: a file is missing or damaged, the two files of a network do not belong
            together, or the networks are not of the same recipe, organs and slices.
    """
    members = [_load_network(folder) for folder in folders]
    first = members[0]
    if len(members) == 1:
        return first
    own = {"epoch", "val_dice"}
    for folder, member in zip(folders, members, strict=True):
        wanted, found = (each.description.model_dump(exclude=own) for each in (first, member))
        if found != wanted:
            keys = ", ".join(key for key in wanted if found[key] != wanted[key])
            raise StageError(
                f"the networks in {folders[0]} and {folder} differ in {keys}, so they are no "
                "ensemble; train them again with `dvc repro`, or name one of the folders"
            )
    mean = float(np.mean([member.description.val_dice for member in members]))
    networks = [network for member in members for network in list_members(member.network)]
    return Trained(
        Ensemble(networks).eval(),
        first.description.model_copy(update={"epoch": 0, "val_dice": mean}),
    )


def _load_network(folder: Path) -> Trained:
    cure = "train it again with `dvc repro`, or fetch it with `dvc pull dvc.yaml`"
    for name in (WEIGHTS_NAME, DESCRIPTION_NAME):
        if not (folder / name).is_file():
            raise StageError(f"no trained network in {folder}: {name} is missing; {cure}")
    try:
        text = (folder / DESCRIPTION_NAME).read_text(encoding="utf-8")
        if '"body_margin_mm"' in text:  # a key of the older geometry
            raise StageError(
                f"the network in {folder} was trained by an older Fullscale, on slices that are a "
                "box around the body instead of a fixed number of mm a pixel, and is not used "
                "here; train it again with `dvc repro`; a registered version still predicts with "
                "the code stored in it: `mlflow models predict`; while it is the champion, no new "
                "network can be compared with it: remove its alias in the MLflow UI"
            )
        description = NetworkDescription.model_validate_json(text)
        state = load_file(folder / WEIGHTS_NAME)
        # Before unet had batch norm in its decoder, unet_official was called unet.
        if description.architecture == "unet" and "blocks.0.0.norm.weight" not in state:
            description = description.model_copy(update={"architecture": "unet_official"})
        network = build(description)
        network.load_state_dict(state)
    except (ValidationError, SafetensorError, RuntimeError) as error:
        reason = shorten(error, 300)
        raise StageError(f"the trained network in {folder} is damaged: {reason}; {cure}") from None
    return Trained(network.eval(), description)
