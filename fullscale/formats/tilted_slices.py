"""Slices of a tilted gantry, which are not stacked along their normal, on an upright grid and back.

Each slice only moves within its plane. So no slice is mixed with another, and what is found on the
upright grid has one place on the slices of the scanner.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class TiltedSlices:
    """The grid of tilted slices, and an upright one that covers them.

    Attributes:
        shape: number of columns, rows and slices.
        affine: 4 x 4, voxel (column, row, slice) to millimetres; its third axis is oblique to the
            others.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]

    @cached_property
    def _drift_px(self) -> NDArray[np.float64]:
        """Columns and rows by which each slice lies beyond the one before."""
        axes, step = self.affine[:3, :2], self.affine[:3, 2]
        return np.asarray((axes.T @ step) / (axes**2).sum(axis=0))

    @cached_property
    def _start_px(self) -> NDArray[np.float64]:
        """First column and row of the upright grid, in those of the first slice."""
        return np.floor(np.minimum(0, self._drift_px * (self.shape[2] - 1)))

    def __str__(self) -> str:
        step = self.affine[:3, 2]
        drift = self.affine[:3, :2] @ self._drift_px
        across_mm, along_mm = (float(np.linalg.norm(part)) for part in (drift, step - drift))
        degrees = np.degrees(np.arctan2(across_mm, along_mm))
        return f"slices shifted by {across_mm:.2f} mm each, a tilt of {degrees:.1f} degrees"

    @property
    def upright_shape(self) -> tuple[int, int, int]:
        """Columns, rows and slices of the upright grid, which holds every slice whole."""
        more = np.ceil(np.abs(self._drift_px) * (self.shape[2] - 1)).astype(int)
        return self.shape[0] + int(more[0]), self.shape[1] + int(more[1]), self.shape[2]

    @property
    def upright_affine(self) -> NDArray[np.float64]:
        """4 x 4, voxel of the upright grid to millimetres."""
        upright = self.affine.copy()
        upright[:3, 2] -= self.affine[:3, :2] @ self._drift_px
        upright[:3, 3] += self.affine[:3, :2] @ self._start_px
        return upright

    def to_upright(self, values: Array, *, order: Literal[0, 1], outside: float) -> Array:
        """Return values (columns, rows, slices) on the upright grid.

        Args:
            values: on the slices.
            order: 0 for the nearest value, 1 to interpolate linearly.
            outside: value beyond the slices.
        """
        return self._move(values, self.upright_shape, order, outside, -1)

    def to_slices(self, values: Array, *, order: Literal[0, 1]) -> Array:
        """Return values (columns, rows, slices) of the upright grid on the slices."""
        return self._move(values, self.shape, order, 0, 1)

    def _move(
        self,
        values: Array,
        shape: tuple[int, int, int],
        order: Literal[0, 1],
        outside: float,
        sign: int,
    ) -> Array:
        from scipy import ndimage

        moved = np.empty(shape, dtype=values.dtype, order="F")
        for k in range(shape[2]):
            offset_px = sign * (k * self._drift_px - self._start_px)
            plane = ndimage.affine_transform(
                values[..., k].astype(np.float32),
                np.ones(2),
                offset_px,
                shape[:2],
                order=order,
                mode="grid-constant",
                cval=outside,
            )
            moved[..., k] = np.rint(plane) if moved.dtype.kind in "iu" else plane
        return moved
