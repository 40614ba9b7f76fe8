"""One scan through one trained network: the same steps in evaluation, serving and by hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from model.inference import predict_slices, prepare
from scans.slicing import plan_grid, restore, slice_image
from scans.volume import Volume
from tasks.dataset import normalise
from tasks.trained import NUM_ADJACENT_SLICES, Trained


@dataclass(frozen=True)
class Segmentation:
    """Organs found in a scan, on the scan's own voxels in canonical orientation.

    Attributes:
        masks: organ to boolean array (Z, Y, X).
        gate_open: organ to boolean array (Z,), whether the classifier found the organ in the
            slice; all True for a network without a classifier.
        label_map: uint8 (Z, Y, X), each organ's first label id; where two organs claim a voxel
            the more probable one has it.
    """

    masks: dict[str, np.ndarray]
    gate_open: dict[str, np.ndarray]
    label_map: np.ndarray


def pick_device() -> torch.device:
    """A GPU when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Predictor:
    """A trained network made ready once, for any number of scans.

    Args:
        trained: network and description.
        threshold: probability from which a voxel belongs to an organ.
        batch_size: slices computed at a time.
        device: where to compute; None takes a GPU when there is one.
    """

    def __init__(
        self,
        trained: Trained,
        threshold: float,
        batch_size: int,
        device: torch.device | None = None,
    ) -> None:
        self.description = trained.description
        self._network = prepare(trained.network)
        self._threshold = threshold
        self._batch_size = batch_size
        self._device = device or pick_device()

    def segment(self, scan: Volume) -> Segmentation:
        """Segment a scan.

        Args:
            scan: HU in canonical orientation.

        Raises:
            ScanError: the scan shows no body.
        """
        settings = self.description.slice
        grid = plan_grid(
            scan,
            settings.size_px,
            body_threshold_hu=settings.body_threshold_hu,
            body_margin_mm=settings.body_margin_mm,
        )
        image_ZHW = torch.from_numpy(slice_image(scan, grid, settings.window_hu))
        prediction = predict_slices(
            self._network,
            normalise(image_ZHW, settings.window_hu),
            num_adjacent=NUM_ADJACENT_SLICES,
            batch_size=self._batch_size,
            device=self._device,
        )
        label_map = np.zeros(grid.shape_ZYX, dtype=np.uint8)
        highest = np.full(grid.shape_ZYX, self._threshold, dtype=np.float32)
        masks, gate_open = {}, {}
        for k, (organ, label_ids) in enumerate(self.description.organs.items()):
            probability_ZYX = restore(prediction.probabilities[k].numpy(), grid)
            masks[organ] = probability_ZYX >= self._threshold
            wins = masks[organ] & (probability_ZYX >= highest)
            label_map[wins] = label_ids[0]
            np.maximum(highest, probability_ZYX, out=highest)
            gate_open[organ] = (
                np.ones(len(image_ZHW), dtype=bool)
                if prediction.organ_probability is None
                else prediction.organ_probability[:, k].numpy() > 0.5
            )
        return Segmentation(masks, gate_open, label_map)
