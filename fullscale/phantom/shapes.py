"""Smooth implicit solids in patient millimetres.

A solid is a function from points to a distance: negative inside, positive outside, and near the
surface close to the Euclidean distance in mm. Points are three float32 arrays of one shape, in the
LPS frame: x grows to the patient's left, y to the back, z to the head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]


class Points(NamedTuple):
    """Positions in mm, LPS axes; three arrays of one shape."""

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
        """Return the solid with its surface moved outwards by `margin_mm` (inwards if negative)."""
        low, high = self.box
        reach = max(margin_mm, 0.0)
        box = (
            (low[0] - reach, low[1] - reach, low[2] - reach),
            (high[0] + reach, high[1] + reach, high[2] + reach),
        )
        return Solid(lambda p: self.distance(p) - margin_mm, box)

    def roughen(self, field: Field, height_mm: float) -> Solid:
        """Return the solid with its surface moved by `height_mm` times a field of unit variance."""
        grown = self.grow(1.5 * height_mm)
        return Solid(lambda p: self.distance(p) + height_mm * field(p), grown.box)

    def within(self, *fields: Field) -> Solid:
        """Return the part of the solid inside all `fields`."""

        def distance(p: Points) -> Array:
            return reduce(np.maximum, (f(p) for f in fields), self.distance(p))

        return Solid(distance, self.box)

    def without(self, *fields: Field) -> Solid:
        """Return the part of the solid outside all `fields`."""

        def distance(p: Points) -> Array:
            return reduce(np.maximum, (-f(p) for f in fields), self.distance(p))

        return Solid(distance, self.box)


@dataclass(frozen=True)
class Structure:
    """One structure to paint over the earlier ones.

    Attributes:
        name: name of the tissue.
        solid: its shape.
        hu: its HU, constant or a field.
        organ: label id of the painted voxels; 0 is background.
        inside: paint only inside the organ of this id, and keep its id, as for vessels and lesions.
    """

    name: str
    solid: Solid
    hu: float | Field
    organ: int = 0
    inside: int | None = None


def remembered(field: Field) -> Field:
    """Return the field with a cache of its last value: many solids share a few surfaces."""
    last: list[tuple[Points, Array]] = []

    def value(p: Points) -> Array:
        if not last or last[0][0] is not p:
            last[:] = [(p, field(p))]
        return last[0][1]

    return value


def join_smoothly(first: Array, second: Array, blend_mm: float) -> Array:
    """Return the union of two distances with a fillet of about `blend_mm`.

    The method is the quadratic polynomial smooth minimum of Inigo Quilez.
    """
    overlap = np.maximum(blend_mm - np.abs(first - second), 0)
    return np.minimum(first, second) - overlap * overlap / (4 * blend_mm)


def cut_smoothly(first: Array, second: Array, blend_mm: float) -> Array:
    """Return the intersection of two distances with an edge rounded over about `blend_mm`."""
    return -join_smoothly(-first, -second, blend_mm)


def rotation(roll_deg: float = 0, pitch_deg: float = 0, yaw_deg: float = 0) -> Array:
    """Return the rotation matrix about y (roll), x (pitch) and z (yaw), applied in this order."""
    cr, cp, cy = np.cos(np.deg2rad([roll_deg, pitch_deg, yaw_deg]))
    sr, sp, sy = np.sin(np.deg2rad([roll_deg, pitch_deg, yaw_deg]))
    about_y = np.array([[cr, 0, sr], [0, 1, 0], [-sr, 0, cr]])
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    about_z = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    return np.asarray(about_z @ about_x @ about_y, dtype=np.float32)


def level_distance(scaled: Sequence[Array], radii: Sequence[Any], exponent: float) -> Array:
    """Return the first-order distance to the surface where the p-norm of `scaled` is 1.

    Args:
        scaled: |offset| / radius along each axis.
        radii: radius along each axis in mm.
        exponent: p; 2 is an ellipsoid, larger values are boxier.
    """
    # A function divided by the length of its gradient approximates the distance to its zero set.
    powers = scaled if exponent == 2.0 else [v ** (exponent - 1) for v in scaled]
    norm = sum(q * v for q, v in zip(powers, scaled, strict=True))
    slope = sum((q / r) ** 2 for q, r in zip(powers, radii, strict=True))
    norm = np.sqrt(norm) if exponent == 2.0 else np.power(norm, 1 / exponent)
    norm = norm + 1e-3
    if exponent != 2.0:
        slope = slope / norm ** (2 * exponent - 4)
    return np.asarray((norm - 1) * norm / (np.sqrt(slope) + 1e-4))


def ellipsoid(
    center: Triple, radii: Triple, turn: Array | None = None, exponent: float = 2.0
) -> Solid:
    """Return a super-ellipsoid, rotated by `turn` about its centre; see `level_distance`."""
    half = radii if turn is None else (max(radii),) * 3
    sizes = [float(r) for r in radii]

    def distance(p: Points) -> Array:
        offset: list[Array] = [v - float(c) for c, v in zip(center, p, strict=True)]
        if turn is not None:
            x, y, z = offset
            offset = [turn[0, i] * x + turn[1, i] * y + turn[2, i] * z for i in range(3)]
        scaled = [np.abs(v) / r for v, r in zip(offset, sizes, strict=True)]
        return level_distance(scaled, sizes, exponent)

    return Solid(
        distance,
        (
            (center[0] - half[0], center[1] - half[1], center[2] - half[2]),
            (center[0] + half[0], center[1] + half[1], center[2] + half[2]),
        ),
    )


def cylinder(center: tuple[float, float], radii: tuple[float, float], exponent: float) -> Field:
    """Return an endless upright super-elliptic cylinder around (x, y) `center`."""

    def distance(p: Points) -> Array:
        scaled = [np.abs(p.x - center[0]) / radii[0], np.abs(p.y - center[1]) / radii[1]]
        return level_distance(scaled, radii, exponent)

    return distance


def dome(center: Triple, radii: Triple, exponent: float) -> Field:
    """Return the upper half of a super-ellipsoid on an endless cylinder (half a diaphragm)."""
    sizes = [float(r) for r in radii]

    def distance(p: Points) -> Array:
        offsets = (p.x - center[0], p.y - center[1], np.maximum(p.z - center[2], 0))
        scaled = [np.abs(v) / r for v, r in zip(offsets, sizes, strict=True)]
        return level_distance(scaled, sizes, exponent)

    return distance


def tube(path: Sequence[Triple], radii: Sequence[float], blend_mm: float = 0.0) -> Solid:
    """Return a chain of tapering round segments through `path`.

    Args:
        path: knots in mm.
        radii: radius in mm at every knot.
        blend_mm: width of the fillets between segments.
    """
    knots = np.asarray(path, dtype=np.float32)
    widths = np.asarray(radii, dtype=np.float32)

    def segment(p: Points, index: int) -> Array:
        start, axis = knots[index], knots[index + 1] - knots[index]
        along = axis / np.float32(max(float(axis @ axis), 1e-6))
        x, y, z = p.x - start[0], p.y - start[1], p.z - start[2]
        t = np.clip(x * along[0] + y * along[1] + z * along[2], 0, 1)
        gap = (x - t * axis[0]) ** 2 + (y - t * axis[1]) ** 2 + (z - t * axis[2]) ** 2
        return np.asarray(np.sqrt(gap) - (widths[index] + t * (widths[index + 1] - widths[index])))

    def join(first: Array, second: Array) -> Array:
        if blend_mm:
            return join_smoothly(first, second, blend_mm)
        return np.minimum(first, second)

    def distance(p: Points) -> Array:
        return reduce(join, (segment(p, index) for index in range(len(knots) - 1)))

    reach = float(widths.max()) + blend_mm / 4
    low, high = knots.min(axis=0) - reach, knots.max(axis=0) + reach
    return Solid(
        distance,
        (
            (float(low[0]), float(low[1]), float(low[2])),
            (float(high[0]), float(high[1]), float(high[2])),
        ),
    )


def in_front_of(level_mm: float) -> Field:
    """Return the half space in front of the plane y = `level_mm`, where gas collects."""
    return lambda p: p.y - level_mm


def waves(rng: np.random.Generator, num_waves: int, wavelength_mm: tuple[float, float]) -> Field:
    """Draw a smooth field of about unit variance: plane waves of random direction and phase.

    Args:
        rng: source of all random draws.
        num_waves: number of waves.
        wavelength_mm: shortest and longest wavelength.
    """
    direction = rng.normal(size=(num_waves, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    length = rng.uniform(*wavelength_mm, size=(num_waves, 1))
    k = (2 * np.pi * direction / length).astype(np.float32)
    phase = rng.uniform(0, 2 * np.pi, num_waves).astype(np.float32)
    gain = float(np.sqrt(2 / num_waves))

    def value(p: Points) -> Array:
        total = np.zeros(np.shape(p.x), dtype=np.float32)
        for (kx, ky, kz), shift in zip(k, phase, strict=True):
            total += np.cos(kx * p.x + ky * p.y + kz * p.z + shift)
        return total * gain

    return value


def grid_over(box: Box | Array, step_mm: float) -> Points:
    """Return a regular grid of points that fills a box, indexed [x, y, z]."""
    axes = [np.arange(a, b, step_mm, dtype=np.float32) for a, b in zip(*box, strict=True)]
    return Points(*np.meshgrid(*axes, indexing="ij"))


@dataclass(frozen=True)
class Frame:
    """Mapping from the scanner to the standard adult: roll, scale and a smooth deformation.

    Attributes:
        scale: size of the patient relative to the standard adult along x, y, z.
        roll_deg: rotation about z.
        warp: deformation along x, y, z in units of `warp_mm`.
        warp_mm: amplitude of the deformation.
    """

    scale: Triple
    roll_deg: float
    warp: tuple[Field, Field, Field]
    warp_mm: float = 5.5

    def to_standard(self, p: Points) -> Points:
        """Map positions in the scanner to positions in the standard adult."""
        cos, sin = (float(f(np.deg2rad(self.roll_deg))) for f in (np.cos, np.sin))
        q = Points(
            (cos * p.x + sin * p.y) / self.scale[0],
            (cos * p.y - sin * p.x) / self.scale[1],
            p.z / self.scale[2],
        )
        return Points(*(v + self.warp_mm * w(q) for v, w in zip(q, self.warp, strict=True)))


def fit_volume(
    make: Callable[[float], Solid],
    volume_ml: float,
    limits: tuple[float, float],
    points: Points,
    step_mm: float,
) -> Solid:
    """Find the solid of a given volume by eight bisections.

    Args:
        make: returns a solid that grows with its parameter.
        volume_ml: volume in the scanner.
        limits: lowest and highest parameter.
        points: positions of a regular scanner grid that holds the solid, in the solid's frame.
        step_mm: step of that grid; voxels at the surface count by their share.
    """
    low, high = limits

    def volume(value: float) -> float:
        inside = np.clip(0.5 - make(value).distance(points) / step_mm, 0, 1)
        return float(inside.sum(dtype=np.float64)) * step_mm**3 / 1000

    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if volume(middle) < volume_ml else (low, middle)
    return make((low + high) / 2)
