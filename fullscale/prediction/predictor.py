"""Segment a scan with a trained network: the same code in evaluation, serving and by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fullscale.prediction.components import keep_largest_components
from fullscale.prediction.crf import refine_slices
from fullscale.prediction.network_files import NetworkDescription, Trained
from fullscale.runtime.errors import StageError
from fullscale.scans.slicing import Grid, plan_grid, restore, slice_image
from fullscale.scans.volume import Volume
from model.inference import (
    BatchPrediction,
    InferenceSettings,
    Prediction,
    predict_batches,
    predict_slices,
    prepare,
)
from model.output import Gating, gate_weights, slab_reach
from model.preprocessing import NUM_ADJACENT_SLICES, neighbour_step, normalise

MAX_SLAB_SLICES = 8
"""Slices resampled at a time: with a hundred organs, 8 x 512 x 512 voxels take 840 MB."""


@dataclass(frozen=True)
class ScanSlices:
    """Slices of a scan as networks of one description take them.

    Attributes:
        grid: position of the slices on the scan.
        image_ZHW: float32 in [0, 1].
    """

    grid: Grid
    image_ZHW: Tensor


@dataclass(frozen=True)
class SlicePrediction:
    """Prediction of a scan's slices; `restore` resamples one organ at a time to the scan.

    Attributes:
        slices: what was predicted on.
        organs: in the order of the network's channels.
        prediction: probabilities of pixels, and of the slice classifier (CGM).
        reach: see `model.output.slab_reach`.
    """

    slices: ScanSlices
    organs: tuple[str, ...]
    prediction: Prediction
    reach: int

    def restore(self, organ: str) -> np.ndarray:
        """Return the probability of an organ on the scan's own voxels, canonical orientation.

        Returns:
            float32 (Z, Y, X), in [0, 1].
        """
        index = self.organs.index(organ)
        return restore(self.prediction.probabilities[index].numpy(), self.slices.grid)

    def gated(self, gating: Gating) -> SlicePrediction:
        """Return the prediction with probabilities as the slice classifier would change them.

        Of a prediction with gating "none" this is what predicting with `gating` gives, but for
        the rounding of a decoder that computes fewer slices at a time: both multiply before they
        resample. Without a classifier nothing changes.

        Args:
            gating: see `model.output.gate_weights`.
        """
        found = self.prediction
        if found.organ_probability is None:
            return self
        weight_KZ = gate_weights(found.organ_probability, gating, self.reach).T
        probabilities = found.probabilities * weight_KZ[..., None, None]
        return replace(self, prediction=found._replace(probabilities=probabilities))

    def slabs(self) -> Iterator[Slab]:
        """Yield the prediction on the scan's own voxels, from the feet up, some slices a time."""
        yield from _restore_slabs(self.slices.grid, 0, *self.prediction)

    def open_slices(self, organ: str, gating: Gating) -> np.ndarray | None:
        """Return which slices the slice classifier leaves open for an organ.

        Args:
            organ: name of the organ.
            gating: "slab" opens neighbours of slices too; for others it is the classifier's own
                decision, also where it is not acted upon.

        Returns:
            Boolean (Z,), or None for a network without a classifier.
        """
        found_ZK = self.prediction.organ_probability
        if found_ZK is None:
            return None
        weight_ZK = gate_weights(found_ZK, "slab" if gating == "slab" else "hard", self.reach)
        return weight_ZK[:, self.organs.index(organ)].numpy() > 0

    @property
    def has_classifier(self) -> bool:
        """Return whether the network has a slice classifier (CGM)."""
        return self.prediction.organ_probability is not None

    def organ_probability(self, organ: str) -> np.ndarray | None:
        """Return the slice classifier's probability that a slice contains the organ.

        Above 0.5, the organ counts as present. Of an ensemble it is the highest of the members'.

        Returns:
            float32 (Z,), or None for a network without a classifier.
        """
        found_ZK = self.prediction.organ_probability
        return None if found_ZK is None else found_ZK[:, self.organs.index(organ)].numpy()


@dataclass(frozen=True)
class Slab:
    """Prediction of consecutive slices of a scan, on its own voxels in canonical orientation.

    Attributes:
        z: range of the slices.
        probability_KZYX: float32, in [0, 1], organs in the order of the network's channels.
        organ_probability_ZK: float32, the slice classifier's "slice contains the organ"; None
            for a network without one.
    """

    z: slice
    probability_KZYX: np.ndarray
    organ_probability_ZK: np.ndarray | None


@dataclass(frozen=True)
class Segmentation:
    """Organs found in a scan, on the scan's own voxels in canonical orientation.

    Attributes:
        masks: organ to boolean array (Z, Y, X), its voxels in the label map.
        label_map: uint8 (Z, Y, X), each organ's first label id; a voxel of two organs gets the
            more probable one.
    """

    masks: dict[str, np.ndarray]
    label_map: np.ndarray


Precision = Literal["auto", "fp32", "bf16"]
"""Number format of convolutions, see `pick_precision`."""

Refine = Literal["none", "largest_component", "crf"]
"""How masks are refined: `components.keep_largest_components`, or `crf.refine_slices`."""

Progress = Callable[[Iterable[BatchPrediction], str, int], Iterable[BatchPrediction]]
"""Wraps an iterable to show progress: (batches, unit, number); see runtime.console.track."""


def pick_device(name: str = "auto") -> torch.device:
    """Return the device of a name; "auto" is a CUDA GPU if there is one, else the CPU.

    Raises:
        StageError: unknown name, or the device is not available.
    """
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    available = {"auto": True, "cpu": True, "cuda": has_cuda, "mps": has_mps}
    if name not in available:
        raise StageError(f"found device {name!r}; wanted one of {', '.join(available)}")
    if not available[name]:
        usable = ", ".join(each for each, is_here in available.items() if is_here)
        raise StageError(f"torch finds no device {name} here; use one of {usable}")
    if name == "auto":
        name = "cuda" if has_cuda else "cpu"
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the number format of a name on a device.

    "auto" is bf16 where the device computes in it natively: GPUs that have it, and processors with
    AVX512-BF16 or AMX, unless their kernels are limited to older ones (`fix_cpu_kernels`).
    `benchmarks.precision` measures what that does to time and Dice.

    Raises:
        StageError: unknown name.
    """
    if name not in get_args(Precision):
        raise StageError(
            f"found precision {name!r}; wanted one of {', '.join(get_args(Precision))}"
        )
    if name == "auto":
        has_bf16 = _has_native_bf16(device)
        return torch.bfloat16 if has_bf16 else torch.float32
    return torch.bfloat16 if name == "bf16" else torch.float32


def _has_native_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    if device.type != "cpu" or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    # torch.cpu has no public function for this.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Predictor:
    """A trained network or ensemble, prepared once to segment any number of scans.

    Args:
        trained: network and description.
        threshold: probability from which a voxel belongs to an organ.
        batch_size: slices computed at a time.
        device: where to compute; None = as `pick_device("auto")`.
        precision: number format of convolutions, see `pick_precision`.
        gate: how the slice classifier (CGM) acts, see `model.output.gate_weights`.
        refine: how masks are refined after it: "crf" changes the probabilities of each slice,
            "largest_component" the label map.

    Attributes:
        num_members: networks that segment together; 1 for a single one.
        precision: "fp32" or "bf16", as computed in.
    """

    def __init__(
        self,
        trained: Trained,
        threshold: float,
        batch_size: int,
        device: torch.device | None = None,
        precision: str = "fp32",
        gate: Gating = "hard",
        refine: Refine = "none",
    ) -> None:
        self.description: NetworkDescription = trained.description
        self.num_members = trained.num_members
        self.threshold = threshold
        self.gate = gate
        self.refine = refine
        self._network = prepare(trained.network)
        device = device or pick_device()
        dtype = pick_precision(precision, device)
        self.precision: Precision = "bf16" if dtype == torch.bfloat16 else "fp32"
        self._settings = InferenceSettings(
            num_adjacent=NUM_ADJACENT_SLICES,
            batch_size=batch_size,
            device=device,
            gating=gate,
            precision=dtype,
        )

    def slice_scan(self, scan: Volume) -> ScanSlices:
        """Return the slices of a scan; predictors of equal descriptions can share them.

        Args:
            scan: HU in canonical orientation.

        Raises:
            ScanError: the scan shows no trunk.
        """
        settings = self.description.slice
        grid = plan_grid(
            scan,
            settings.size_px,
            settings.pixel_mm,
            body_threshold_hu=settings.body_threshold_hu,
        )
        hu_ZHW = torch.from_numpy(slice_image(scan, grid, settings.window_hu))
        # Slice by slice: normalising all at once takes three times the memory.
        image_ZHW = torch.empty(hu_ZHW.shape)
        for image_HW, hu_HW in zip(image_ZHW, hu_ZHW, strict=True):
            image_HW.copy_(normalise(hu_HW, settings.window_hu))
        return ScanSlices(grid, image_ZHW)

    def predict(self, slices: ScanSlices, gating: Gating | None = None) -> SlicePrediction:
        """Compute the probabilities of all slices of a scan, before they are refined.

        Args:
            slices: of the scan.
            gating: see `model.output.gate_weights`; with "none" the decoder runs for every slice;
                None is the predictor's gate.
        """
        settings = replace(self._settings_for(slices.grid), gating=gating or self.gate)
        prediction = predict_slices(self._network, slices.image_ZHW, settings)
        reach = slab_reach(settings.neighbour_step)
        return SlicePrediction(slices, tuple(self.description.organs), prediction, reach)

    def slabs(self, scan: Volume, progress: Progress | None = None) -> Iterator[Slab]:
        """Segment a scan from the feet up; memory holds its slices and one batch.

        A label map of all slabs is complete only after `finish_labels`.

        Args:
            scan: HU in canonical orientation.
            progress: shows progress over batches.

        Raises:
            ScanError: the scan shows no trunk.
        """
        slices = self.slice_scan(scan)
        grid, image_ZHW = slices.grid, slices.image_ZHW
        batches: Iterable[BatchPrediction] = predict_batches(
            self._network, image_ZHW, self._settings_for(grid)
        )
        if progress is not None:
            batches = progress(batches, "slices", -(-len(image_ZHW) // self._settings.batch_size))
        for batch in batches:
            probability_KBHW = batch.probabilities
            if self.refine == "crf":
                probability_KBHW = self._apply_crf(probability_KBHW, image_ZHW[batch.slices])
            yield from _restore_slabs(
                grid, batch.slices.start, probability_KBHW, batch.organ_probability
            )

    def segment(self, scan: Volume) -> Segmentation:
        """Segment a scan.

        Args:
            scan: HU in canonical orientation.

        Raises:
            ScanError: the scan shows no trunk.
        """
        label_ZYX = np.zeros(scan.values_ZYX.shape, dtype=np.uint8)
        for slab in self.slabs(scan):
            label_ZYX[slab.z] = self.to_labels(slab)
        self.finish_labels(label_ZYX)
        organs = self.description.organs
        masks = {organ: label_ZYX == label_ids[0] for organ, label_ids in organs.items()}
        return Segmentation(masks, label_ZYX)

    def label_map(self, found: SlicePrediction) -> np.ndarray:
        """Return the label map of a prediction, uint8 (Z, Y, X); see `Segmentation`."""
        if self.refine == "crf":
            refined = self._apply_crf(found.prediction.probabilities, found.slices.image_ZHW)
            found = replace(found, prediction=found.prediction._replace(probabilities=refined))
        label_ZYX = np.concatenate([self.to_labels(slab) for slab in found.slabs()])
        self.finish_labels(label_ZYX)
        return label_ZYX

    def finish_labels(self, label_ZYX: np.ndarray) -> None:
        """Apply what needs the whole label map, in place: refine "largest_component"."""
        if self.refine == "largest_component":
            label_ids = (ids[0] for ids in self.description.organs.values())
            keep_largest_components(label_ZYX, label_ids)

    def to_labels(self, slab: Slab) -> np.ndarray:
        """Return the label map of a slab, uint8 (Z, Y, X); see `Segmentation`."""
        label_ZYX = np.zeros(slab.probability_KZYX.shape[1:], dtype=np.uint8)
        highest_ZYX = np.full(label_ZYX.shape, self.threshold, dtype=np.float32)
        for label_ids, found_ZYX in zip(
            self.description.organs.values(), slab.probability_KZYX, strict=True
        ):
            label_ZYX[found_ZYX >= highest_ZYX] = label_ids[0]
            np.maximum(highest_ZYX, found_ZYX, out=highest_ZYX)
        return label_ZYX

    def _apply_crf(self, probability_KBHW: Tensor, image_BHW: Tensor) -> Tensor:
        """Return the probabilities of slices after the CRF, on the CPU."""
        settings, device = self.description.slice, self._settings.device
        refined_KBHW = refine_slices(
            probability_KBHW.to(device),
            image_BHW.to(device),
            settings.pixel_mm,
            settings.window_hu,
        )
        return refined_KBHW.cpu()

    def _settings_for(self, grid: Grid) -> InferenceSettings:
        """Return the settings of inference with the distance of neighbours in this scan."""
        step = neighbour_step(self.description.neighbour_mm, grid.spacing_mm[0])
        return replace(self._settings, neighbour_step=step)


def _restore_slabs(
    grid: Grid, first: int, probability_KBHW: Tensor, organ_probability_BK: Tensor | None
) -> Iterator[Slab]:
    """Yield consecutive slices, the first of them at `first`, on the scan's own voxels."""
    end = first + probability_KBHW.shape[1]
    for start in range(first, end, MAX_SLAB_SLICES):
        z = slice(start, min(start + MAX_SLAB_SLICES, end))
        part = slice(z.start - first, z.stop - first)
        yield Slab(
            z,
            restore(probability_KBHW[:, part].numpy(), _part_of(grid, z)),
            None if organ_probability_BK is None else organ_probability_BK[part].numpy(),
        )


def _part_of(grid: Grid, z: slice) -> Grid:
    """Restrict a grid to some of the scan's slices."""
    return replace(grid, shape_ZYX=(z.stop - z.start, *grid.shape_ZYX[1:]))
