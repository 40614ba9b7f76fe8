"""One scan through one trained network: the same steps in evaluation, serving and by hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from model.inference import Prediction, predict_slices, prepare
from model.output import Gate
from scans.slicing import Grid, plan_grid, restore, slice_image
from scans.volume import Volume
from tasks.dataset import normalise
from tasks.trained import NUM_ADJACENT_SLICES, Description, Trained


@dataclass(frozen=True)
class SlicePrediction:
    """What a network says of a scan's slices; organs are brought to the scan one at a time.

    Attributes:
        grid: how the slices lie on the scan.
        organs: in the order of the network's channels.
        prediction: probabilities on the slices, and the classifier's.
    """

    grid: Grid
    organs: tuple[str, ...]
    prediction: Prediction

    def restore(self, organ: str) -> np.ndarray:
        """Probability of an organ on the scan's own voxels in canonical orientation.

        Returns:
            float32 (Z, Y, X), in [0, 1].
        """
        index = self.organs.index(organ)
        return restore(self.prediction.probabilities[index].numpy(), self.grid)

    def organ_probability(self, organ: str) -> np.ndarray | None:
        """The classifier's probability that a slice holds the organ; the gate is open above 0.5.

        Returns:
            float32 (Z,), or None for a network without a classifier.
        """
        found_ZK = self.prediction.organ_probability
        return None if found_ZK is None else found_ZK[:, self.organs.index(organ)].numpy()


@dataclass(frozen=True)
class Segmentation:
    """Organs found in a scan, on the scan's own voxels in canonical orientation.

    Attributes:
        masks: organ to boolean array (Z, Y, X).
        label_map: uint8 (Z, Y, X), each organ's first label id; where two organs claim a voxel
            the more probable one has it.
    """

    masks: dict[str, np.ndarray]
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
        self.description: Description = trained.description
        self.threshold = threshold
        self._network = prepare(trained.network)
        self._batch_size = batch_size
        self._device = device or pick_device()

    def predict(self, scan: Volume, gate: Gate = "hard") -> SlicePrediction:
        """Compute probabilities on a scan's slices.

        Args:
            scan: HU in canonical orientation.
            gate: see `model.output.probabilities`; with "none" the decoder runs for every slice.

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
            gate=gate,
        )
        return SlicePrediction(grid, tuple(self.description.organs), prediction)

    def segment(self, scan: Volume) -> Segmentation:
        """Segment a scan.

        Args:
            scan: HU in canonical orientation.

        Raises:
            ScanError: the scan shows no body.
        """
        found = self.predict(scan)
        label_map = np.zeros(found.grid.shape_ZYX, dtype=np.uint8)
        highest = np.full(found.grid.shape_ZYX, self.threshold, dtype=np.float32)
        masks = {}
        for organ, label_ids in self.description.organs.items():
            probability_ZYX = found.restore(organ)
            masks[organ] = probability_ZYX >= self.threshold
            wins = masks[organ] & (probability_ZYX >= highest)
            label_map[wins] = label_ids[0]
            np.maximum(highest, probability_ZYX, out=highest)
        return Segmentation(masks, label_map)
