"""Segment one scan: label map, probabilities, and measurements of each organ.

Z slices, Y X voxels of the scan in canonical orientation, K organs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fullscale.prediction.network_files import NetworkDescription, Trained
from fullscale.prediction.predictor import MAX_SLAB_SLICES, Precision, Predictor, Progress, Refine
from fullscale.runtime.errors import StageError
from fullscale.scans.volume import Volume
from model.output import Gating

CPU_BATCH_BYTES, GPU_BATCH_SHARE = 512 << 20, 0.5
MAX_BATCH_SIZE = 64
MAPS_PER_SLICE = 24
"""Measured: for each slice of a batch, the largest network needs the memory of up to this number of
float32 maps of its first level."""


@dataclass(frozen=True)
class Model:
    """A network to segment with, and its origin.

    Attributes:
        name: of the registered model; for a folder, the network's name in its network.json.
        version: of the registered model; None for a folder.
        weights_sha256: checksum of the weights.
        threshold: probability from which a voxel belongs to an organ.
        trained: network and description.
        gate: how the slice classifier (CGM) acts, as `model.output.gate_weights` takes it.
        refine: how masks are refined, as `Predictor` takes it.
    """

    name: str
    version: str | None
    weights_sha256: str
    threshold: float
    trained: Trained
    gate: Gating = "hard"
    refine: Refine = "none"

    def make_predictor(
        self, batch_size: int, device: torch.device, precision: str = "auto"
    ) -> Predictor:
        """Return the model ready to segment, with its own threshold, gate and refinement.

        Args:
            batch_size: slices at a time.
            device: where to compute.
            precision: number format of convolutions, see `pick_precision`.
        """
        return Predictor(
            self.trained,
            self.threshold,
            batch_size,
            device,
            precision,
            gate=self.gate,
            refine=self.refine,
        )


@dataclass(frozen=True)
class OrganFound:
    """Measurements of one organ in a scan.

    Attributes:
        label_id: of its voxels in the label map.
        volume_ml: of its voxels.
        mean_hu: mean over its voxels; None without voxels.
        voxels_Z: number of its voxels in each slice, from the feet up.
        organ_probability_Z: the slice classifier's probability that a slice contains the organ;
            None for a network without a classifier.
    """

    label_id: int
    volume_ml: float
    mean_hu: float | None
    voxels_Z: NDArray[np.int64]
    organ_probability_Z: NDArray[np.float32] | None

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers for JSON; slices are counted from 0 at the feet."""
        drawn = np.flatnonzero(self.voxels_Z)
        classifier = None
        if self.organ_probability_Z is not None:
            classifier = {
                "highest": round(float(self.organ_probability_Z.max()), 4),
                "num_present_slices": int((self.organ_probability_Z > 0.5).sum()),
                "by_slice": [round(float(score), 4) for score in self.organ_probability_Z],
            }
        return {
            "label": self.label_id,
            "volume_ml": round(self.volume_ml, 3),
            "mean_hu": None if self.mean_hu is None else round(self.mean_hu, 2),
            "num_slices": len(drawn),
            "first_slice": int(drawn[0]) if len(drawn) else None,
            "last_slice": int(drawn[-1]) if len(drawn) else None,
            "slice_classifier": classifier,
        }


@dataclass(frozen=True, eq=False)
class Segmented:
    """Segmentation of one scan, with measurements.

    Attributes:
        label_ZYX: uint8, each organ's first label id.
        organs: in the order of the network's channels.
        probabilities: organ to float16 (Z, Y, X) in [0, 1]; None if not requested.
        precision: "fp32" or "bf16", the number format of the convolutions.
    """

    label_ZYX: NDArray[np.uint8]
    organs: dict[str, OrganFound]
    probabilities: dict[str, NDArray[np.float16]] | None
    precision: Precision


def segment_scan(
    predictor: Predictor,
    scan: Volume,
    *,
    keep_probabilities: bool = False,
    progress: Progress | None = None,
) -> Segmented:
    """Segment a scan; memory holds scan, label map, slices and one batch.

    Args:
        predictor: a prepared network.
        scan: HU in canonical orientation.
        keep_probabilities: return probabilities, two bytes for every voxel and organ.
        progress: shows progress over batches.

    Raises:
        ScanError: the scan shows no trunk.
        StageError: memory runs out.
    """
    organs = predictor.description.organs
    shape_ZYX = scan.values_ZYX.shape
    label_ZYX = np.zeros(shape_ZYX, dtype=np.uint8)
    kept = {organ: np.zeros(shape_ZYX, np.float16) for organ in organs if keep_probabilities}
    voxels_KZ = np.zeros((len(organs), len(label_ZYX)), dtype=np.int64)
    sum_hu_K = np.zeros(len(organs))
    slab_probabilities = []
    try:
        for slab in predictor.slabs(scan, progress):
            label_ZYX[slab.z] = predictor.to_labels(slab)
            for organ, probability_ZYX in zip(kept, slab.probability_KZYX, strict=False):
                kept[organ][slab.z] = probability_ZYX
            if slab.organ_probability_ZK is not None:
                slab_probabilities.append(slab.organ_probability_ZK)
        predictor.finish_labels(label_ZYX)
        for start in range(0, len(label_ZYX), MAX_SLAB_SLICES):
            z = slice(start, start + MAX_SLAB_SLICES)
            for k, label_ids in enumerate(organs.values()):
                mask_ZYX = label_ZYX[z] == label_ids[0]
                voxels_KZ[k, z] = np.count_nonzero(mask_ZYX, axis=(1, 2))
                sum_hu_K[k] += scan.values_ZYX[z][mask_ZYX].sum(dtype=np.float64)
    except (MemoryError, torch.OutOfMemoryError):
        raise StageError(
            "memory ran out; try a smaller --batch-size, or --device cpu where a GPU is too small"
        ) from None
    organ_ZK = np.concatenate(slab_probabilities) if slab_probabilities else None
    voxel_ml = float(np.prod(scan.spacing_mm)) / 1000
    found = {}
    for k, (organ, label_ids) in enumerate(organs.items()):
        num_voxels = int(voxels_KZ[k].sum())
        found[organ] = OrganFound(
            label_ids[0],
            num_voxels * voxel_ml,
            sum_hu_K[k] / num_voxels if num_voxels else None,
            voxels_KZ[k],
            None if organ_ZK is None else organ_ZK[:, k],
        )
    return Segmented(label_ZYX, found, kept if keep_probabilities else None, predictor.precision)


def read_batch_size(asked: str, description: NetworkDescription, device: torch.device) -> int:
    """Convert the option --batch-size to a number of slices.

    Args:
        asked: a number, or "auto", which fits the device's memory and leaves much of it free.
        description: of the network.
        device: where it computes.

    Raises:
        StageError: `asked` is neither a positive number nor "auto".
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
