"""The phantom's trunk: body wall, skeleton, muscles, diaphragm, lungs and great vessels.

Coordinates are a standard adult's, in mm, LPS axes, origin on the midline at mid-liver height,
half-way between belly and back. Names of levels follow: x = 0 midline, y = 40 vertebral column,
z = 85 top of the right half of the diaphragm, z = -150 iliac crest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scans.phantom_shapes import (
    Array,
    Box,
    Field,
    Points,
    Solid,
    Structure,
    cylinder,
    dome,
    ellipsoid,
    join_smoothly,
    rotation,
    tube,
    waves,
)

BODY_BOX: Box = ((-400.0, -400.0, -2000.0), (400.0, 400.0, 2000.0))
FAT_HU = -105.0
VERTEBRA_PITCH_MM = 34.0
RIB_PITCH_MM = 29.0


def _step(value: Array) -> Array:
    """Smooth step from 0 (value <= 0) to 1 (value >= 1)."""
    t = np.clip(value, 0, 1)
    return np.asarray(t * t * (3 - 2 * t), dtype=np.float32)


@dataclass(frozen=True)
class Trunk:
    """Surfaces that the organs lean on, as distances in mm (negative inside)."""

    wall: Field
    cavity: Field
    abdomen: Field
    """Everything below the diaphragm."""
    fat_mm: float
    structures: list[Structure]


def build_trunk(rng: np.random.Generator, muscle_hu: float) -> Trunk:
    """Draws one trunk. The draws do not depend on `muscle_hu`."""
    fat_mm = float(rng.uniform(7, 24))
    wall = _wall(float(rng.uniform(-6, 8)))
    trabecular_hu = float(rng.uniform(110, 220))
    back_muscles = [cylinder((side * 34.0, 77.0), (31.0, 20.0), 2.3) for side in (-1, 1)]
    column = cylinder((0.0, 40.0), (22.0, 17.5), 2.3)

    def cavity(p: Points) -> Array:
        inside = wall(p) + np.float32(13)
        for muscle in (*back_muscles, column):
            inside = np.maximum(inside, -muscle(p))
        return inside

    abdomen = _diaphragm(rng)
    mottle, strands, marbling = (waves(rng, 10, reach) for reach in ((14, 40), (9, 30), (8, 24)))

    def fat_hu(p: Points) -> Array:
        return FAT_HU + 5 * mottle(p) + 26 * np.maximum(strands(p) - np.float32(1.1), 0)

    def muscle_texture(p: Points) -> Array:
        return muscle_hu - 30 * np.maximum(marbling(p) - np.float32(0.6), 0)

    def fat_layer(p: Points) -> Array:
        belly = _step((80 - p.z) / 200)
        side = np.abs(p.x) / 150
        return np.asarray(fat_mm * (0.65 + 0.6 * belly - 0.35 * side), dtype=np.float32)

    def skin(p: Points) -> Array:
        return wall(p) - fat_layer(p)

    def body(distance: Field) -> Solid:
        return Solid(distance, BODY_BOX)

    structures = [
        Structure("skin", body(skin), 15.0),
        Structure("subcutaneous fat", body(skin).grow(-2.0), fat_hu),
        Structure("muscle wall", body(wall), muscle_texture),
        Structure(
            "fat between muscles",
            body(lambda p: np.abs(wall(p) + 6) - 0.7).within(lambda p: p.z + 40),
            -60.0,
        ),
        Structure("visceral fat", body(cavity), fat_hu),
        *_lungs(rng, cavity, abdomen),
        Structure(
            "diaphragm",
            body(lambda p: np.abs(abdomen(p) + np.float32(1.5)) - np.float32(1.5)).within(
                cavity, lambda p: -20 - p.z
            ),
            muscle_hu,
        ),
        *_muscles(rng, back_muscles, muscle_texture),
        *_spine(column, trabecular_hu),
        *_cage(rng, wall, muscle_hu),
    ]
    return Trunk(wall, cavity, abdomen, fat_mm, structures)


def _wall(waist_mm: float) -> Field:
    """Outer surface of the muscles: a super-elliptic tube, narrower at the waist and the top."""

    def distance(p: Points) -> Array:
        half_x = 148 - 16 * _step((p.z - 60) / 140) - waist_mm * np.exp(-(((p.z + 110) / 55) ** 2))
        half_y = np.where(p.y < 0, 100 - 6 * _step((-p.z - 40) / 150), 101)
        u, v = np.abs(p.x) / half_x, np.abs(p.y) / half_y
        norm = (u**2.4 + v**2.4) ** np.float32(1 / 2.4) + 1e-3
        slope = np.sqrt((u**1.4 / half_x) ** 2 + (v**1.4 / half_y) ** 2) / norm**0.4
        furrow = 7 * np.exp(-((p.x / 15) ** 2)) * np.clip(p.y / 90, 0, 1)
        return np.asarray((norm - 1) * norm / (slope + 1e-4) + furrow, dtype=np.float32)

    return distance


def _diaphragm(rng: np.random.Generator) -> Field:
    rise = rng.uniform(-10, 8)
    right = dome((-70.0, -8.0, -15.0), (74.0, 96.0, 100.0 + rise))
    left = dome((74.0, -2.0, -15.0), (72.0, 94.0, 88.0 + rise + rng.uniform(-8, 6)))
    middle = dome((0.0, -22.0, -15.0), (85.0, 82.0, 80.0 + rise))

    def distance(p: Points) -> Array:
        return join_smoothly(join_smoothly(right(p), left(p), 16), middle(p), 22)

    return distance


def _lungs(rng: np.random.Generator, cavity: Field, abdomen: Field) -> list[Structure]:
    mediastinum = cylinder((6.0, 12.0), (33.0, 75.0), 2.2)
    vessels = waves(rng, 12, (14, 40))
    lung = Solid(cavity, BODY_BOX).without(abdomen, mediastinum).within(lambda p: -12 - p.z)

    def hu(p: Points) -> Array:
        return -845 + 380 * np.maximum(vessels(p) - np.float32(1.3), 0) - 0.6 * (p.y - 90)

    return [Structure("lungs", lung, hu)]


def _muscles(rng: np.random.Generator, back: list[Field], hu: Field) -> list[Structure]:
    found = [Structure("back muscles", Solid(m, BODY_BOX), hu) for m in back]
    bulk = float(rng.uniform(0.85, 1.15))
    for side in (-1, 1):
        psoas = [
            (side * 25.0, 42.0, -25.0),
            (side * 34.0, 38.0, -90.0),
            (side * 55.0, 25.0, -260.0),
        ]
        quadratus = [(side * 52.0, 62.0, -20.0), (side * 64.0, 62.0, -140.0)]
        crus = [(side * 17.0, 18.0, 58.0), (side * 15.0, 24.0, -30.0), (side * 8.0, 30.0, -70.0)]
        found += [
            Structure("psoas", tube(psoas, [5 * bulk, 17 * bulk, 25 * bulk]), hu),
            Structure("quadratus lumborum", tube(quadratus, [8 * bulk, 12 * bulk]), hu),
            Structure("crus", tube(crus, [4.5, 5.5, 2.5]), hu),
        ]
    return found


def _bone_hu(distance: Field, trabecular_hu: float, cortical_hu: float) -> Field:
    def hu(p: Points) -> Array:
        depth = np.minimum(distance(p), 0)
        return trabecular_hu + (cortical_hu - trabecular_hu) * np.exp(-((depth / 2.0) ** 2))

    return hu


def _spine(column: Field, trabecular_hu: float) -> list[Structure]:
    pitch = np.float32(VERTEBRA_PITCH_MM)

    def level(p: Points) -> Points:
        return Points(np.abs(p.x), p.y, np.mod(p.z, pitch) - pitch / 2)

    def from_disc(p: Points) -> Array:
        return np.minimum(np.mod(p.z, pitch), pitch - np.mod(p.z, pitch))

    def vertebra(p: Points) -> Array:
        waist = 2.0 * np.cos(2 * np.pi * p.z / pitch) - 2.0
        return np.maximum(column(p) - waist, np.float32(4.5) - from_disc(p))

    arch_ring = cylinder((0.0, 66.0), (14.0, 13.0), 2.0)
    canal = cylinder((0.0, 65.0), (9.0, 8.0), 2.0)
    spinous = ellipsoid((0.0, 86.0, -4.0), (3.6, 15.0, 11.0), exponent=2.6)
    transverse = tube([(13.0, 62.0, 2.0), (38.0, 72.0, 3.0)], [6.0, 4.0])
    facet = ellipsoid((14.0, 68.0, -8.0), (7.0, 7.0, 12.0))

    def arch(p: Points) -> Array:
        q = level(p)
        lamina = np.maximum(arch_ring(q), np.abs(q.z) - 10)
        parts = (lamina, spinous.distance(q), transverse.distance(q), facet.distance(q))
        return np.minimum.reduce(parts)

    box: Box = ((-50.0, 15.0, -2000.0), (50.0, 105.0, 2000.0))
    return [
        Structure("disc", Solid(column, box), 85.0),
        Structure("vertebra", Solid(vertebra, box), _bone_hu(vertebra, trabecular_hu, 430.0)),
        Structure("vertebral arch", Solid(arch, box), _bone_hu(arch, trabecular_hu + 120, 560.0)),
        Structure("spinal canal", Solid(canal, box), 18.0),
    ]


def _cage(rng: np.random.Generator, wall: Field, muscle_hu: float) -> list[Structure]:
    """Ribs run around the chest and downwards; in front of the bony ends lies cartilage."""
    offset = float(rng.uniform(0, RIB_PITCH_MM))
    slope = float(rng.uniform(180, 230))

    def around(p: Points) -> Array:
        return np.asarray(np.abs(np.arctan2(p.x, p.y)) / np.pi, dtype=np.float32)

    def rib(p: Points) -> Array:
        turn = around(p)
        height = p.z + offset + slope * turn - 2.2 * slope * np.maximum(turn - 0.72, 0)
        dz = np.mod(height, RIB_PITCH_MM) - RIB_PITCH_MM / 2
        ring = np.sqrt(((wall(p) + 7.5) / 3.6) ** 2 + (dz / 6.2) ** 2)
        edge = (
            -32 - 45 * np.sin(np.pi * np.minimum(turn / 0.9, 1)) + 115 * _step((turn - 0.5) / 0.5)
        )
        return np.asarray(np.maximum((ring - 1) * 3.6, (edge - p.z) * 0.5), dtype=np.float32)

    def bony(p: Points) -> Array:
        return (around(p) - np.float32(0.73)) * np.float32(120)

    solid = Solid(rib, BODY_BOX)
    sternum = ellipsoid((0.0, -92.0, 165.0), (17.0, 5.5, 105.0), rotation(pitch_deg=4), 3.0)
    crest = Solid(lambda p: np.abs(wall(p) + 24) - np.float32(5), BODY_BOX).within(
        lambda p: p.z + 150 + 0.006 * (p.y - 20) ** 2, lambda p: 60 - np.abs(p.x)
    )
    return [
        Structure("costal cartilage", solid, muscle_hu + 45),
        Structure("ribs", solid.within(bony), _bone_hu(rib, 220.0, 620.0)),
        Structure("sternum", sternum, 170.0),
        Structure("iliac wing", crest, _bone_hu(crest.distance, 200.0, 600.0)),
    ]
