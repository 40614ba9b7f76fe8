"""Resample a volume to square slices, and slices back to the volume.

Axis letters: Z slices, Y X voxels of the scan in canonical orientation, H W pixels of a slice,
K organs. A slice is a square canvas with a fixed number of millimetres a pixel, centred on the
trunk. Slices are resampled in the plane only; their distance never changes.

Resampling is separable: one sparse matrix of triangle-filter weights per axis. The triangle is as
wide as the coarser of the two grids, so that downsampling averages (no aliasing) and upsampling
interpolates linearly. Pixel centres are at half pixels on both grids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fullscale.scans.checks import BODY_HU
from fullscale.scans.cohort import IGNORED_ID
from fullscale.scans.trunk import find_trunk

# SciPy is imported where it is used: it is slow to import, and reading a grid does not need it.
# Nor does it need nibabel, which `Volume` loads.
if TYPE_CHECKING:
    from scipy import sparse

    from fullscale.scans.volume import Volume

AIR_HU = -1000

Array = NDArray[Any]


@dataclass(frozen=True)
class Grid:
    """Position of the square slices on the volume of one scan.

    Attributes:
        shape_ZYX: number of voxels of the scan in canonical orientation.
        spacing_mm: distance of voxels along Z, Y, X in mm.
        top_mm: upper edge of the canvas, from the outer edge of the first row; may be negative.
        left_mm: left edge of the canvas, from the outer edge of the first column; may be negative.
        pixel_mm: distance of neighbouring pixels of a slice in mm.
        size_px: number of pixels along H and along W.
        trunk_mm: extent of the trunk along Y and X in mm, without arms.
    """

    shape_ZYX: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    top_mm: float
    left_mm: float
    pixel_mm: float
    size_px: int
    trunk_mm: tuple[float, float]

    @property
    def side_mm(self) -> float:
        """Length of the canvas's sides in mm."""
        return self.pixel_mm * self.size_px

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers and lists; `from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Grid:
        """Return the grid that `to_json` was called on."""
        z, y, x = content["shape_ZYX"]
        dz, dy, dx = content["spacing_mm"]
        height, width = content["trunk_mm"]
        return cls(
            (int(z), int(y), int(x)),
            (float(dz), float(dy), float(dx)),
            float(content["top_mm"]),
            float(content["left_mm"]),
            float(content["pixel_mm"]),
            int(content["size_px"]),
            (float(height), float(width)),
        )

    def _axes(self) -> tuple[tuple[int, float, float], tuple[int, float, float]]:
        """Return number of voxels, spacing and start of the canvas in mm, along Y and along X."""
        return (
            (self.shape_ZYX[1], self.spacing_mm[1], self.top_mm),
            (self.shape_ZYX[2], self.spacing_mm[2], self.left_mm),
        )

    def to_slices(self) -> tuple[sparse.csr_array, sparse.csr_array]:
        """Return the matrices (H, Y) and (W, X) that resample a scan's plane to pixels."""
        rows, columns = (
            _resampling_matrix(_Axis(num, 0.0, step), _Axis(self.size_px, start, self.pixel_mm))
            for num, step, start in self._axes()
        )
        return rows, columns

    def to_scan(self) -> tuple[sparse.csr_array, sparse.csr_array]:
        """Return the matrices (Y, H) and (X, W) that resample pixels to a scan's plane."""
        rows, columns = (
            _resampling_matrix(_Axis(self.size_px, start, self.pixel_mm), _Axis(num, 0.0, step))
            for num, step, start in self._axes()
        )
        return rows, columns


def plan_grid(
    scan: Volume, size_px: int, pixel_mm: float, *, body_threshold_hu: float = BODY_HU
) -> Grid:
    """Centre a square canvas on the trunk. All slices share one canvas.

    Args:
        scan: HU, canonical orientation.
        size_px: pixels along each side of the canvas.
        pixel_mm: distance of neighbouring pixels in mm.
        body_threshold_hu: voxels above this value may belong to the body.

    Raises:
        ScanError: the scan shows no trunk.
    """
    trunk = find_trunk(scan, body_threshold_hu)
    z, y, x = scan.values_ZYX.shape
    side_mm = size_px * pixel_mm
    top_mm, left_mm = (centre - side_mm / 2 for centre in trunk.centre_mm)
    return Grid(
        (z, y, x), scan.spacing_mm, top_mm, left_mm, float(pixel_mm), int(size_px), trunk.extent_mm
    )


def slice_image(scan: Volume, grid: Grid, window_hu: Sequence[float]) -> NDArray[np.int16]:
    """Resample a scan to the grid's slices.

    Args:
        scan: HU, canonical orientation.
        grid: result of `plan_grid` for this scan.
        window_hu: lowest and highest HU; other values are clipped.

    Returns:
        int16 (Z, H, W), HU within the window. Pixels outside the scan are air.
    """
    _check_shape(scan.values_ZYX, grid)
    rows, columns = grid.to_slices()
    low, high = window_hu
    slices_ZHW = np.empty((grid.shape_ZYX[0], grid.size_px, grid.size_px), dtype=np.int16)
    for z, plane in enumerate(scan.values_ZYX):
        # The matrices treat voxels beyond the scan as 0, so 0 must mean air.
        above_air = np.subtract(plane, AIR_HU, dtype=np.float32)
        pixels = _resample_plane(rows, columns, above_air) + np.float32(AIR_HU)
        slices_ZHW[z] = np.rint(np.clip(pixels, low, high))
    return slices_ZHW


def slice_labels(
    labels_ZYX: NDArray[np.uint8], grid: Grid, organs: Mapping[str, Sequence[int]]
) -> tuple[NDArray[np.uint8], dict[str, int]]:
    """Resample a label map to the grid's slices.

    A pixel gets the organ, the background or "not judged", whichever covers the largest part of it.

    Args:
        labels_ZYX: label ids, canonical orientation.
        grid: result of `plan_grid` for the scan of this label map.
        organs: label ids of each organ; other ids but `IGNORED_ID` count as background.

    Returns:
        uint8 (Z, H, W), 0 background, 1 for the first of `organs` and so on, `IGNORED_ID` where
        nobody judged; and, for each organ, the number of its voxels whose centre lies outside the
        canvas.

    Raises:
        ValueError: two organs share a label id.
    """
    _check_shape(labels_ZYX, grid)
    index_of_id = _organ_index(organs)
    rows, columns = grid.to_slices()
    on_canvas = np.ix_(*(_indices_on_canvas(*axis, grid.side_mm) for axis in grid._axes()))
    slices_ZHW = np.zeros((grid.shape_ZYX[0], grid.size_px, grid.size_px), dtype=np.uint8)
    num_voxels = np.zeros(len(index_of_id), dtype=np.int64)
    num_kept = np.zeros_like(num_voxels)
    for z, plane in enumerate(labels_ZYX):
        if not plane.any():
            continue
        organ_plane = index_of_id[plane]
        num_voxels += np.bincount(organ_plane.ravel(), minlength=len(num_voxels))
        num_kept += np.bincount(organ_plane[on_canvas].ravel(), minlength=len(num_voxels))
        most = np.zeros(slices_ZHW.shape[1:], dtype=np.float32)
        covered = np.zeros_like(most)
        for index in (*range(1, len(organs) + 1), IGNORED_ID):
            mask = organ_plane == index
            if not mask.any():
                continue
            share = _resample_plane(rows, columns, mask.astype(np.float32))
            slices_ZHW[z][share > most] = index
            np.maximum(most, share, out=most)
            covered += share
        slices_ZHW[z][most <= 1 - covered] = 0
    num_lost = (num_voxels - num_kept)[1 : len(organs) + 1].tolist()
    return slices_ZHW, dict(zip(organs, num_lost, strict=True))


def restore(probabilities: Array, grid: Grid) -> NDArray[np.float32]:
    """Resample values on slices to the scan's canonical grid.

    Args:
        probabilities: (Z, H, W) or (K, Z, H, W), any real type. Calls with one organ at a time
            need the least memory.
        grid: grid of these slices.

    Returns:
        float32 (Z, Y, X) or (K, Z, Y, X); 0 outside the canvas.

    Raises:
        ValueError: the array does not fit the grid.
    """
    if probabilities.ndim == 4:
        return np.stack([restore(organ_ZHW, grid) for organ_ZHW in probabilities])
    expected = (grid.shape_ZYX[0], grid.size_px, grid.size_px)
    if probabilities.shape != expected:
        raise ValueError(f"slices of shape {probabilities.shape}; expected {expected} (Z, H, W)")
    rows, columns = grid.to_scan()
    restored_ZYX = np.zeros(grid.shape_ZYX, dtype=np.float32)
    for plane, pixels in zip(restored_ZYX, probabilities, strict=True):
        if pixels.any():
            plane[...] = _resample_plane(rows, columns, pixels.astype(np.float32, copy=False))
    return restored_ZYX


@dataclass(frozen=True)
class _Axis:
    """Number of samples, outer edge of the first sample, and distance of samples; in mm."""

    num: int
    start_mm: float
    step_mm: float


def _resampling_matrix(source: _Axis, target: _Axis) -> sparse.csr_array:
    """Return the filter weights (target.num, source.num) of one axis.

    The weights of a row sum to 1, minus the weights of samples beyond the ends of the source.

    Args:
        source: axis of the input.
        target: axis of the output.
    """
    from scipy import sparse

    radius = max(source.step_mm, target.step_mm)
    # Centre of each target sample, in samples of the source.
    centre = (
        target.start_mm + (np.arange(target.num) + 0.5) * target.step_mm - source.start_mm
    ) / source.step_mm - 0.5
    reach = radius / source.step_mm
    num_taps = math.ceil(2 * reach) + 1
    taps = np.ceil(centre - reach).astype(int)[:, None] + np.arange(num_taps)
    weights = np.maximum(0.0, 1 - np.abs(taps - centre[:, None]) / reach)
    weights /= weights.sum(axis=1, keepdims=True)
    used = (taps >= 0) & (taps < source.num) & (weights > 0)
    ends = np.concatenate([[0], np.cumsum(used.sum(axis=1))])
    return sparse.csr_array(
        (weights[used].astype(np.float32), taps[used].astype(np.int32), ends.astype(np.int32)),
        shape=(target.num, source.num),
    )


def _resample_plane(
    rows: sparse.csr_array, columns: sparse.csr_array, plane: Array
) -> NDArray[np.float32]:
    return np.asarray((columns @ (rows @ plane).T).T)


def _indices_on_canvas(num: int, step_mm: float, start_mm: float, side_mm: float) -> Array:
    """Return the indices of the voxels of one axis whose centre lies on the canvas."""
    centre = (np.arange(num) + 0.5) * step_mm
    return np.flatnonzero((centre >= start_mm) & (centre <= start_mm + side_mm))


def _organ_index(organs: Mapping[str, Sequence[int]]) -> NDArray[np.uint8]:
    """Return the index of the organ (from 1; 0 background) of each label id from 0 to 254.

    The id of voxels that nobody judged stays.
    """
    index_of_id = np.zeros(256, dtype=np.uint8)
    index_of_id[IGNORED_ID] = IGNORED_ID
    for index, (organ, label_ids) in enumerate(organs.items(), start=1):
        for label_id in label_ids:
            if not 1 <= label_id < IGNORED_ID:
                raise ValueError(f"organ {organ}: label id {label_id}; expected 1 to 254")
            if index_of_id[label_id]:
                raise ValueError(f"label id {label_id} is given to two organs; {organ} is one")
            index_of_id[label_id] = index
    return index_of_id


def _check_shape(values_ZYX: Array, grid: Grid) -> None:
    if values_ZYX.shape != grid.shape_ZYX:
        raise ValueError(
            f"volume of shape {values_ZYX.shape}; the grid was planned on {grid.shape_ZYX}"
        )
