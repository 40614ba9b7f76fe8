"""One scan with one network: the label map, and what was measured on the way.

Z slices, Y X voxels of the scan in canonical orientation, K organs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fullscale.prediction.network_files import Description, Trained
from fullscale.prediction.predictor import Predictor, Progress
from fullscale.runtime.errors import StageError
from fullscale.scans.volume import Volume

CPU_BATCH_BYTES, GPU_BATCH_SHARE = 512 << 20, 0.5
MAX_BATCH_SIZE = 64
MAPS_PER_SLICE = 24
"""Measured: the largest network takes memory for up to so many maps of its first level, in float32,
for each slice of a batch."""


@dataclass(frozen=True)
class Model:
    """A network to segment with, and where it comes from.

    Attributes:
        name: of the registered model, or of the network in params.yaml.
        version: of the registered model; None for a folder.
        weights_sha256: checksum of the weights.
        threshold: probability from which a voxel belongs to an organ.
        trained: network and description.
    """

    name: str
    version: str | None
    weights_sha256: str
    threshold: float
    trained: Trained


@dataclass(frozen=True)
class OrganFound:
    """What was found of one organ.

    Attributes:
        label_id: of its voxels in the label map.
        volume_ml: of its voxels.
        mean_hu: over its voxels; None where there are none.
        voxels_Z: number of its voxels in each slice, from the feet up.
        gate_Z: the classifier's probability that a slice holds it; None without a classifier.
    """

    label_id: int
    volume_ml: float
    mean_hu: float | None
    voxels_Z: NDArray[np.int64]
    gate_Z: NDArray[np.float32] | None

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; slices are counted from 0 at the feet."""
        drawn = np.flatnonzero(self.voxels_Z)
        gate = None
        if self.gate_Z is not None:
            gate = {
                "highest": round(float(self.gate_Z.max()), 4),
                "num_open_slices": int((self.gate_Z > 0.5).sum()),
                "by_slice": [round(float(score), 4) for score in self.gate_Z],
            }
        return {
            "label": self.label_id,
            "volume_ml": round(self.volume_ml, 3),
            "mean_hu": None if self.mean_hu is None else round(self.mean_hu, 2),
            "num_slices": len(drawn),
            "first_slice": int(drawn[0]) if len(drawn) else None,
            "last_slice": int(drawn[-1]) if len(drawn) else None,
            "gate": gate,
        }


@dataclass(frozen=True, eq=False)
class Segmented:
    """What was found in one scan.

    Attributes:
        label_ZYX: uint8, each organ's first label id.
        organs: in the order of the network's channels.
        probabilities: organ to float16 (Z, Y, X) in [0, 1]; None where not asked for.
    """

    label_ZYX: NDArray[np.uint8]
    organs: dict[str, OrganFound]
    probabilities: dict[str, NDArray[np.float16]] | None


def segment_scan(
    predictor: Predictor,
    scan: Volume,
    *,
    keep_probabilities: bool = False,
    progress: Progress | None = None,
) -> Segmented:
    """Segment a scan; beside scan and label map, memory holds its slices and one batch.

    Args:
        predictor: a network ready to segment.
        scan: HU in canonical orientation.
        keep_probabilities: two bytes for every voxel and organ.
        progress: shows how far it is.

    Raises:
        ScanError: the scan shows no body.
        StageError: memory runs out.
    """
    organs = predictor.description.organs
    shape_ZYX = scan.values_ZYX.shape
    label_ZYX = np.zeros(shape_ZYX, dtype=np.uint8)
    kept = {organ: np.zeros(shape_ZYX, np.float16) for organ in organs if keep_probabilities}
    voxels_KZ = np.zeros((len(organs), len(label_ZYX)), dtype=np.int64)
    sum_hu_K = np.zeros(len(organs))
    gates = []
    try:
        for slab in predictor.slabs(scan, progress):
            label_ZYX[slab.z] = labels = predictor.to_labels(slab)
            for k, (organ, label_ids) in enumerate(organs.items()):
                mask_ZYX = labels == label_ids[0]
                voxels_KZ[k, slab.z] = np.count_nonzero(mask_ZYX, axis=(1, 2))
                sum_hu_K[k] += scan.values_ZYX[slab.z][mask_ZYX].sum(dtype=np.float64)
                if keep_probabilities:
                    kept[organ][slab.z] = slab.probability_KZYX[k]
            if slab.organ_probability_ZK is not None:
                gates.append(slab.organ_probability_ZK)
    except (MemoryError, torch.OutOfMemoryError):
        raise StageError(
            "memory ran out; try a smaller --batch-size, or --device cpu where a GPU is too small"
        ) from None
    gate_ZK = np.concatenate(gates) if gates else None
    voxel_ml = float(np.prod(scan.spacing_mm)) / 1000
    found = {}
    for k, (organ, label_ids) in enumerate(organs.items()):
        num_voxels = int(voxels_KZ[k].sum())
        found[organ] = OrganFound(
            label_ids[0],
            num_voxels * voxel_ml,
            sum_hu_K[k] / num_voxels if num_voxels else None,
            voxels_KZ[k],
            None if gate_ZK is None else gate_ZK[:, k],
        )
    return Segmented(label_ZYX, found, kept if keep_probabilities else None)


def read_batch_size(asked: str, description: Description, device: torch.device) -> int:
    """The number of slices at a time that a person asks for.

    Args:
        asked: a number, or "auto": what a device has memory for, with much left for others.
        description: of the network.
        device: where it computes.

    Raises:
        StageError: it is neither.
    """
    if asked != "auto":
        if not (asked.isdecimal() and int(asked)):
            raise StageError(
                f"found --batch-size {asked}; wanted a whole number of at least 1, or auto"
            )
        return int(asked)
    slice_bytes = 4 * description.width * description.slice.size_px**2 * MAPS_PER_SLICE
    usable_bytes: float = CPU_BATCH_BYTES
    if device.type == "cuda":
        usable_bytes = GPU_BATCH_SHARE * torch.cuda.mem_get_info(device)[0]
    return int(min(max(1, usable_bytes // slice_bytes), MAX_BATCH_SIZE))
