"""The phantom's trunk: body wall, skeleton, muscles, diaphragm and lungs.

Coordinates are those of a standard adult, in mm, LPS axes, origin on the midline at mid-liver
height, half-way between belly and back. Landmarks: x = 0 midline, y = 40 vertebral column, z = 85
top of the right half of the diaphragm, z = -150 iliac crest. Sizes and HU are set by hand to look
plausible on CT; they are not measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fullscale.phantom.shapes import (
    Array,
    Box,
    Field,
    Points,
    Solid,
    Structure,
    cut_smoothly,
    cylinder,
    dome,
    ellipsoid,
    join_smoothly,
    level_distance,
    remembered,
    rotation,
    tube,
    waves,
)

BODY_BOX: Box = ((-215.0, -215.0, -2000.0), (215.0, 215.0, 2000.0))
FAT_HU = -105.0
VERTEBRA_PITCH_MM = 34.0  # one vertebra and one disc
RIB_PITCH_MM = 29.0  # one rib and one gap, along z


@dataclass(frozen=True)
class Trunk:
    """The trunk; its surfaces, which bound the organs, are distances in mm (negative inside).

    Attributes:
        skin: outer surface of the trunk.
        wall: outer surface of the muscles.
        cavity: space within ribs and muscles, lungs included.
        abdomen: everything below the diaphragm.
        fat_mm: thickness of the subcutaneous fat.
        structures: structures of the trunk, in painting order.
    """

    skin: Field
    wall: Field
    cavity: Field
    abdomen: Field
    fat_mm: float
    structures: list[Structure]


def build_trunk(rng: np.random.Generator, muscle_hu: float) -> Trunk:
    """Draw a trunk; the random draws do not depend on `muscle_hu`."""
    fat_mm = float(rng.uniform(8, 27))
    lean = float(np.clip(rng.normal(0.5, 0.3), 0, 1))
    wall = remembered(_wall(float(rng.uniform(-8, 8))))
    back = [cylinder((side * 34.0, 77.0), (31.0, 19.0), 2.3) for side in (-1, 1)]
    column = cylinder((0.0, 40.0), (22.0, 17.5), 2.3)
    abdomen = remembered(_diaphragm(rng))
    mottle, strands, marbling = (waves(rng, 8, reach) for reach in ((16, 50), (10, 30), (8, 24)))

    def inner_wall(p: Points) -> Array:
        below_ribs = _step((-p.z - 20) / 60)
        front = np.clip(-p.y / 90, 0, 1)
        return wall(p) + (13.0 - below_ribs * (1 + 3 * front))

    @remembered
    def cavity(p: Points) -> Array:
        inside = inner_wall(p)
        for bulge in (*back, column):
            inside = cut_smoothly(inside, -bulge(p), 8)
        return inside

    def fat_hu(p: Points) -> Array:
        return FAT_HU + 6 * mottle(p)

    def mesentery_hu(p: Points) -> Array:
        return np.asarray(fat_hu(p) + 100 * np.clip(strands(p) - 1.05, 0, 1.3))

    def muscle_texture(p: Points) -> Array:
        return np.asarray(muscle_hu - (20 + 40 * lean) * np.maximum(marbling(p) - 0.6, 0))

    def skin(p: Points) -> Array:
        belly = _step((80 - p.z) / 200)
        side = np.abs(p.x) / 150
        front = np.clip(-p.y / 100, 0, 1)
        return wall(p) - fat_mm * (0.75 + belly * (0.25 + 0.3 * front) - 0.2 * side)

    def body(distance: Field) -> Solid:
        return Solid(distance, BODY_BOX)

    def shell(depth_mm: float, half_mm: float) -> Field:
        return lambda p: np.abs(wall(p) + depth_mm) - half_mm

    septa = [
        *(body(m).grow(1.5) for m in back),
        *(body(cylinder((side * 19.0, 80.0), (1.5, 13.0), 2.0)) for side in (-1, 1)),
    ]
    structures = [
        Structure("skin", body(skin), 5.0),
        Structure("subcutaneous fat", body(skin).grow(-2.0), fat_hu),
        Structure("muscle wall", body(wall), muscle_texture),
        Structure("fat in the flank", body(shell(5.5, 0.7)).within(lambda p: p.z + 40), -50.0),
        Structure("fat on the ribs", body(shell(2.8, 0.9)).within(lambda p: -30 - p.z), -70.0),
        Structure(
            "midline of the belly",
            body(inner_wall)
            .grow(14.0)
            .within(lambda p: np.abs(p.x) - 2.5, lambda p: p.y + 60, lambda p: p.z + 10),
            -30.0,
        ),
        Structure("visceral fat", body(inner_wall), mesentery_hu),
        *_lungs(rng, cavity, abdomen, muscle_hu),
        Structure(
            "diaphragm",
            body(lambda p: np.abs(abdomen(p) + 1.5) - 1.5).within(cavity, lambda p: -20 - p.z),
            muscle_hu,
        ),
        *(Structure("fat about the back muscles", s, -55.0) for s in septa[:2]),
        *_muscles(rng, back, muscle_texture),
        *(Structure("septum in the back", s, -40.0) for s in septa[2:]),
        *_spine(column, float(rng.uniform(110, 220))),
        *_cage(rng, wall, muscle_hu),
    ]
    return Trunk(skin, wall, cavity, abdomen, fat_mm, structures)


def _step(value: Array) -> Array:
    """Return a smooth step from 0 (value <= 0) to 1 (value >= 1)."""
    t = np.clip(value, 0, 1)
    return t * t * (3 - 2 * t)


def _wall(waist_mm: float) -> Field:
    """Return the outer surface of the muscles: a super-elliptic tube, narrower at waist and top."""

    def distance(p: Points) -> Array:
        half_x = 148 - 16 * _step((p.z - 60) / 140) - waist_mm * np.exp(-(((p.z + 110) / 55) ** 2))
        half_y = np.where(p.y < 0, 100 - 6 * _step((-p.z - 40) / 150), 101)
        furrow = 7 * np.exp(-((p.x / 15) ** 2)) * np.clip(p.y / 90, 0, 1)
        scaled = [np.abs(p.x) / half_x, np.abs(p.y) / half_y]
        return np.asarray(level_distance(scaled, (half_x, half_y), 2.4) + furrow)

    return distance


def _diaphragm(rng: np.random.Generator) -> Field:
    """Draw the diaphragm: a right, a left and a middle dome at a random height of breathing."""
    rise = float(rng.uniform(-18, 14))
    left_rise = rise + float(rng.uniform(-8, 6))
    right = dome((-70.0, -8.0, -15.0), (74.0, 96.0, 100.0 + rise), 2.15)
    left = dome((74.0, -2.0, -15.0), (72.0, 94.0, 90.0 + left_rise), 2.15)
    middle = dome((0.0, -22.0, -15.0), (85.0, 82.0, 80.0 + rise), 2.3)

    def distance(p: Points) -> Array:
        return join_smoothly(join_smoothly(right(p), left(p), 16), middle(p), 22)

    return distance


def _lungs(
    rng: np.random.Generator, cavity: Field, abdomen: Field, muscle_hu: float
) -> list[Structure]:
    """Draw both lungs; some are collapsed above the diaphragm or have fluid at the back."""
    mediastinum = cylinder((6.0, 12.0), (30.0, 70.0), 2.2)
    vessels = waves(rng, 14, (14, 45))
    lung = Solid(cavity, BODY_BOX).without(abdomen, mediastinum).within(lambda p: -12 - p.z)

    def hu(p: Points) -> Array:
        return np.asarray(-845 + 1100 * np.clip(vessels(p) - 1.35, 0, 0.8) - 0.6 * (60 - p.y))

    found = [Structure("lungs", lung, hu)]
    for side in (-1, 1):
        is_collapsed, has_fluid = rng.uniform(size=2) < 0.2
        height_mm, front, level = (float(rng.uniform(*r)) for r in ((6, 30), (-20, 40), (30, 66)))
        half = lung.within(lambda p, side=side: -side * p.x)  # type: ignore[misc]
        if is_collapsed:
            base = half.within(_base_of_lung(abdomen, height_mm, front))
            found.append(Structure("collapsed lung", base, muscle_hu + 25))
        if has_fluid:
            found.append(Structure("pleural fluid", half.within(_at_the_back(level)), 12.0))
    return found


def _base_of_lung(abdomen: Field, height_mm: float, front_mm: float) -> Field:
    """Return a wedge on the diaphragm that thickens to the back, behind y = `front_mm`."""

    def field(p: Points) -> Array:
        depth = p.y - front_mm
        wedge = abdomen(p) - height_mm - 0.9 * np.maximum(depth, 0)
        return np.asarray(np.maximum(wedge, -depth))

    return field


def _at_the_back(level_mm: float) -> Field:
    return lambda p: level_mm - p.y


def _muscles(rng: np.random.Generator, back: list[Field], hu: Field) -> list[Structure]:
    """Draw the back muscles, psoas, quadratus lumborum and the crura of the diaphragm."""
    found = [Structure("back muscles", Solid(m, BODY_BOX), hu) for m in back]
    bulk = float(rng.uniform(0.85, 1.15))
    for side in (-1.0, 1.0):
        psoas = tube(
            [(side * 25, 42.0, -25.0), (side * 34, 38.0, -90.0), (side * 55, 25.0, -260.0)],
            [5 * bulk, 17 * bulk, 25 * bulk],
        )
        quadratus = tube(
            [(side * 52, 60.0, -20.0), (side * 66, 60.0, -140.0)], [8 * bulk, 11 * bulk]
        )
        crus = tube(
            [(side * 17, 18.0, 58.0), (side * 15, 24.0, -30.0), (side * 8, 30.0, -70.0)],
            [4.5, 5.5, 2.5],
        )
        found += [
            Structure("psoas", psoas, hu),
            Structure("fat about quadratus lumborum", quadratus.grow(1.5), -60.0),
            Structure("quadratus lumborum", quadratus, hu),
            Structure("crus", crus, hu),
        ]
    return found


def bone_hu(
    distance: Field, trabecular_hu: float, cortical_hu: float, cortex_mm: float = 2.0
) -> Field:
    """Return the HU of a bone: cortical at the surface, trabecular from twice `cortex_mm` depth."""

    def hu(p: Points) -> Array:
        depth = np.minimum(distance(p), 0)
        return trabecular_hu + (cortical_hu - trabecular_hu) * np.exp(-((depth / cortex_mm) ** 2))

    return hu


def _spine(column: Field, trabecular_hu: float) -> list[Structure]:
    """Return the spine: vertebrae every `VERTEBRA_PITCH_MM`, with discs of 9 mm between them."""
    pitch = VERTEBRA_PITCH_MM
    canal = cylinder((0.0, 65.0), (9.0, 8.0), 2.0)
    ring = cylinder((0.0, 66.0), (14.0, 13.0), 2.0)
    spinous = ellipsoid((0.0, 86.0, -4.0), (3.6, 15.0, 11.0), exponent=2.6)
    transverse = tube([(13.0, 62.0, 2.0), (38.0, 72.0, 3.0)], [6.0, 4.0])
    facet = ellipsoid((14.0, 68.0, -8.0), (7.0, 7.0, 12.0))

    def vertebra(p: Points) -> Array:
        phase = np.mod(p.z, pitch)
        waist = 2.0 * np.cos(2 * np.pi * p.z / pitch) - 2.0
        return np.asarray(np.maximum(column(p) - waist, 4.5 - np.minimum(phase, pitch - phase)))

    def arch(p: Points) -> Array:
        q = Points(np.abs(p.x), p.y, np.mod(p.z, pitch) - pitch / 2)
        lamina = np.maximum(ring(q), np.abs(q.z) - 10)
        parts = (spinous.distance(q), transverse.distance(q), facet.distance(q))
        return np.asarray(np.minimum.reduce([lamina, *parts]))

    box: Box = ((-50.0, 15.0, -2000.0), (50.0, 105.0, 2000.0))
    return [
        Structure("disc", Solid(column, box), 85.0),
        Structure("vertebra", Solid(vertebra, box), bone_hu(vertebra, trabecular_hu, 400.0)),
        Structure("vertebral arch", Solid(arch, box), bone_hu(arch, trabecular_hu + 100, 520.0)),
        Structure("spinal canal", Solid(canal, box), 18.0),
    ]


def _cage(rng: np.random.Generator, wall: Field, muscle_hu: float) -> list[Structure]:
    """Draw ribs that run around the chest and down, their cartilage, sternum and iliac wing."""
    offset = float(rng.uniform(0, RIB_PITCH_MM))
    slope = float(rng.uniform(200, 260))

    def around(p: Points) -> Array:
        return np.abs(np.arctan2(p.x, p.y)) / np.pi

    def rib(p: Points) -> Array:
        turn = around(p)
        height = p.z + offset + slope * turn - 1.6 * slope * np.maximum(turn - 0.74, 0)
        away = np.mod(height, RIB_PITCH_MM) - RIB_PITCH_MM / 2
        ring = np.sqrt(((wall(p) + 8) / 3.6) ** 2 + (away / 6.0) ** 2)
        flank = np.sin(np.pi * np.minimum(turn / 0.9, 1))
        edge = -32 - 45 * flank + 115 * _step((turn - 0.5) / 0.5)
        return np.asarray(np.maximum((ring - 1) * 3.6, (edge - p.z) * 0.5))

    def bony(p: Points) -> Array:
        return (around(p) - 0.73) * 120

    solid = Solid(remembered(rib), BODY_BOX)
    sternum = ellipsoid((0.0, -92.0, 165.0), (17.0, 5.5, 105.0), rotation(pitch_deg=4), 3.0)
    crest = Solid(lambda p: np.abs(wall(p) + 24) - 5, BODY_BOX).within(
        lambda p: p.z + 150 + 0.006 * (p.y - 20) ** 2, lambda p: 60 - np.abs(p.x)
    )
    return [
        Structure("costal cartilage", solid, muscle_hu + 45),
        Structure("ribs", solid.within(bony), bone_hu(rib, 200.0, 520.0)),
        Structure("sternum", sternum, 170.0),
        Structure("iliac wing", crest, bone_hu(crest.distance, 200.0, 600.0)),
    ]
