"""Smooth implicit solids in patient millimetres.

A solid is a function from points to a distance: negative inside, positive outside, and near the
surface close to the Euclidean distance in mm. Points are three float32 arrays of one shape, in the
LPS frame: x grows to the patient's left, y to the back, z to the head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


class Points(NamedTuple):
    """Positions in mm, LPS axes, any shape."""

    x: Array
    y: Array
    z: Array


Field = Callable[[Points], Array]
"""A value at every point: a distance in mm, or HU."""

Triple = tuple[float, float, float]
Box = tuple[Triple, Triple]
"""Lowest and highest corner in mm."""


@dataclass(frozen=True)
class Solid:
    """A distance field and a box outside which nothing of it lies."""

    distance: Field
    box: Box

    def grow(self, margin_mm: float) -> Solid:
        """The solid with its surface moved outwards by `margin_mm`."""
        low, high = self.box
        reach = max(margin_mm, 0.0)
        return Solid(
            lambda p: self.distance(p) - np.float32(margin_mm),
            (
                (low[0] - reach, low[1] - reach, low[2] - reach),
                (high[0] + reach, high[1] + reach, high[2] + reach),
            ),
        )

    def within(self, *fields: Field) -> Solid:
        """The part that lies inside all `fields`."""
        return Solid(
            lambda p: reduce(np.maximum, (f(p) for f in fields), self.distance(p)), self.box
        )

    def without(self, *fields: Field) -> Solid:
        """The part that lies outside all `fields`."""
        return Solid(
            lambda p: reduce(np.maximum, (-f(p) for f in fields), self.distance(p)), self.box
        )


@dataclass(frozen=True)
class Structure:
    """One thing to paint: where, of which HU, and which organ id its voxels carry.

    `organ` None leaves the id beneath it (a vessel or a lesion within an organ).
    """

    name: str
    solid: Solid
    hu: float | Field
    organ: int | None = 0


def join_smoothly(first: Array, second: Array, blend_mm: float) -> Array:
    """Union of two distances with a fillet of about `blend_mm` (polynomial smooth minimum)."""
    overlap = np.maximum(blend_mm - np.abs(first - second), 0) / np.float32(blend_mm)
    return np.minimum(first, second) - overlap * overlap * np.float32(blend_mm / 4)


def rotation(roll_deg: float = 0, pitch_deg: float = 0, yaw_deg: float = 0) -> Array:
    """Rotation matrix about y (roll), x (pitch) and z (yaw), applied in this order."""
    c, s = (
        np.cos(np.deg2rad([roll_deg, pitch_deg, yaw_deg])),
        np.sin(np.deg2rad([roll_deg, pitch_deg, yaw_deg])),
    )
    about_y = np.array([[c[0], 0, s[0]], [0, 1, 0], [-s[0], 0, c[0]]])
    about_x = np.array([[1, 0, 0], [0, c[1], -s[1]], [0, s[1], c[1]]])
    about_z = np.array([[c[2], -s[2], 0], [s[2], c[2], 0], [0, 0, 1]])
    return np.asarray(about_z @ about_x @ about_y, dtype=np.float32)


def ellipsoid(
    center: Triple, radii: Triple, turn: Array | None = None, exponent: float = 2.0
) -> Solid:
    """Super-ellipsoid; `exponent` above 2 makes it boxier. `turn` rotates it about its centre."""
    reach = max(radii) if turn is not None else 0.0
    half = (max(radii[0], reach), max(radii[1], reach), max(radii[2], reach))
    inverse = [np.float32(1 / r) for r in radii]

    def distance(p: Points) -> Array:
        offset = [np.float32(-c) + v for c, v in zip(center, p, strict=True)]
        if turn is not None:
            offset = [
                turn[0, i] * offset[0] + turn[1, i] * offset[1] + turn[2, i] * offset[2]
                for i in range(3)
            ]
        scaled = [np.abs(v) * w for v, w in zip(offset, inverse, strict=True)]
        return _level_distance(scaled, inverse, exponent)

    return Solid(
        distance,
        (
            (center[0] - half[0], center[1] - half[1], center[2] - half[2]),
            (center[0] + half[0], center[1] + half[1], center[2] + half[2]),
        ),
    )


def _level_distance(scaled: list[Array], inverse: list[np.float32], exponent: float) -> Array:
    """First-order distance to the level 1 of the p-norm of `scaled` coordinates."""
    if exponent == 2.0:
        norm = np.sqrt(sum(v * v for v in scaled)) + np.float32(1e-3)
        slope = np.sqrt(sum((v * w) ** 2 for v, w in zip(scaled, inverse, strict=True)))
    else:
        power = np.float32(exponent)
        powers = [v ** (power - 1) for v in scaled]
        total = sum(q * v for q, v in zip(powers, scaled, strict=True))
        norm = np.asarray(total, dtype=np.float32) ** np.float32(1 / exponent) + np.float32(1e-3)
        slope = np.sqrt(sum((q * w) ** 2 for q, w in zip(powers, inverse, strict=True)))
        slope = slope / norm ** (power - 2)
    return np.asarray((norm - 1) * norm / (slope + np.float32(1e-4)), dtype=np.float32)


def cylinder(center: tuple[float, float], radii: tuple[float, float], exponent: float) -> Field:
    """Upright super-elliptic cylinder without ends, about (x, y) `center`."""
    inverse = [np.float32(1 / r) for r in radii]

    def distance(p: Points) -> Array:
        scaled = [
            np.abs(p.x - np.float32(center[0])) * inverse[0],
            np.abs(p.y - np.float32(center[1])) * inverse[1],
        ]
        return _level_distance(scaled, inverse, exponent)

    return distance


def dome(center: Triple, radii: Triple, exponent: float = 2.3) -> Field:
    """Upper half of a super-ellipsoid on an endless upright cylinder (a half of the diaphragm)."""
    inverse = [np.float32(1 / r) for r in radii]

    def distance(p: Points) -> Array:
        scaled = [
            np.abs(p.x - np.float32(center[0])) * inverse[0],
            np.abs(p.y - np.float32(center[1])) * inverse[1],
            np.maximum(p.z - np.float32(center[2]), 0) * inverse[2],
        ]
        return _level_distance(scaled, inverse, exponent)

    return distance


def tube(path: Sequence[Triple], radii: Sequence[float]) -> Solid:
    """Chain of tapering round segments through `path`, with a radius in mm at every knot."""
    knots = np.asarray(path, dtype=np.float32)
    widths = np.asarray(radii, dtype=np.float32)

    def distance(p: Points) -> Array:
        nearest: Array | None = None
        for start, end, r0, r1 in zip(knots, knots[1:], widths, widths[1:], strict=False):
            axis = end - start
            length2 = max(float(axis @ axis), 1e-6)
            dx, dy, dz = p.x - start[0], p.y - start[1], p.z - start[2]
            t = np.clip((dx * axis[0] + dy * axis[1] + dz * axis[2]) / np.float32(length2), 0, 1)
            gap = np.sqrt(
                (dx - t * axis[0]) ** 2 + (dy - t * axis[1]) ** 2 + (dz - t * axis[2]) ** 2
            ) - (r0 + t * (r1 - r0))
            nearest = gap if nearest is None else np.minimum(nearest, gap)
        assert nearest is not None, "a tube needs two knots"  # noqa: S101
        return nearest

    low, high = knots.min(axis=0) - widths.max(), knots.max(axis=0) + widths.max()
    return Solid(
        distance,
        (
            (float(low[0]), float(low[1]), float(low[2])),
            (float(high[0]), float(high[1]), float(high[2])),
        ),
    )


def waves(rng: np.random.Generator, num_waves: int, wavelength_mm: tuple[float, float]) -> Field:
    """A smooth random field of about unit variance: plane waves of random direction and phase."""
    direction = rng.normal(size=(num_waves, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    length = rng.uniform(*wavelength_mm, size=(num_waves, 1))
    k = (2 * np.pi * direction / length).astype(np.float32)
    phase = rng.uniform(0, 2 * np.pi, num_waves).astype(np.float32)
    gain = np.float32(np.sqrt(2 / num_waves))

    def value(p: Points) -> Array:
        total = np.zeros(np.shape(p.x), dtype=np.float32)
        for (kx, ky, kz), shift in zip(k, phase, strict=True):
            total += np.cos(kx * p.x + ky * p.y + kz * p.z + shift)
        return total * gain

    return value
