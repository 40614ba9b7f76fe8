"""The phantom's arms beside the trunk: skin, fat, muscle, vessels and bones.

Coordinates are those of `trunk`: a standard adult, mm, LPS axes, origin on the midline at mid-liver
height. The arms hang from the shoulders, far above every scan, past the elbow at about the height
of the lower ribs to the wrist. Sizes are set by hand to be an adult's; they are not measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fullscale.phantom.contrast import Contrast
from fullscale.phantom.shapes import (
    Array,
    Box,
    Field,
    Points,
    Solid,
    Structure,
    Triple,
    ellipsoid,
    level_distance,
    tube,
    waves,
)
from fullscale.phantom.trunk import FAT_HU, bone_hu

ArmPosition = Literal["none", "beside", "touching"]
UPPER_ARM_MM, FOREARM_MM = (86.0, 104.0), (64.0, 82.0)
"""Smallest and largest mean diameter at mid upper arm, and of the forearm below the elbow."""
GAP_MM = (14.0, 34.0)
"""Smallest and largest gap of air between trunk and an arm beside it."""
PRESSED_MM = 4.0  # how deep the skin of a touching arm lies in the trunk, which flattens it
SKIN_MM = 2.0
SCANNED_MM = 220.0  # no scan reaches this far above or below the origin
# Cross-sections: height above the elbow in mm, and the diameter relative to that of the upper arm
# (above the elbow) or of the forearm (below it).
UPPER_COURSE = ((600.0, 1.06), (250.0, 1.06), (150.0, 1.0), (60.0, 0.92), (15.0, 0.85))
LOWER_COURSE = ((-15.0, 1.02), (-55.0, 1.0), (-130.0, 0.86), (-220.0, 0.66), (-270.0, 0.62))

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Arms:
    """Both arms.

    Attributes:
        structures: structures in the standard frame, to paint before the trunk.
        reach_mm: largest |x| of an arm in the standard frame, at the heights of a scan.
    """

    structures: list[Structure]
    reach_mm: float


class Course(NamedTuple):
    """Elliptic cross-sections of a limb along z, which rises; five arrays of one length, in mm."""

    z: Floats
    x: Floats
    y: Floats
    half_x: Floats
    half_y: Floats


def build_arms(
    rng: np.random.Generator,
    position: ArmPosition,
    skin: Field,
    contrast: Contrast,
    fat_mm: float,
    scale: Triple,
) -> Arms:
    """Draw both arms; shapes do not depend on `contrast`.

    Args:
        rng: source of all random draws; their number is the same for both positions.
        position: "beside" leaves air between trunk and arms along their whole length, "touching"
            presses them to the trunk over a part of it.
        skin: outer surface of the trunk.
        contrast: HU of the scan.
        fat_mm: thickness of the trunk's subcutaneous fat: arms are thick when it is.
        scale: size of the patient; diameters and gaps are those in the scanner.
    """
    plump = float(np.clip(0.75 * (fat_mm - 8) / 19 + rng.uniform(0, 0.25), 0, 1))
    upper_mm, lower_mm = (a + plump * (b - a) for a, b in (UPPER_ARM_MM, FOREARM_MM))
    arm_fat_mm = 4.0 + 6.0 * plump
    structures: list[Structure] = []
    reach = 0.0
    for side in (-1.0, 1.0):
        elbow_mm, depth_mm = float(rng.uniform(-45, 5)), float(rng.uniform(5, 30))
        gap_mm = _gap(rng, position)
        course = _course(skin, side, elbow_mm, depth_mm, (upper_mm, lower_mm), gap_mm, scale)
        structures += _paint_arm(rng, course, side, elbow_mm, arm_fat_mm, contrast)
        is_scanned = np.abs(course.z) < SCANNED_MM
        reach = max(reach, float(np.max((np.abs(course.x) + course.half_x)[is_scanned])))
    return Arms(structures, reach)


def _gap(rng: np.random.Generator, position: ArmPosition) -> Callable[[float], float]:
    """Draw the distance of one arm from the trunk in mm, as a function of z in mm."""
    low, high = (float(v) for v in rng.uniform(*GAP_MM, 2))
    middle, half = float(rng.uniform(-20, 60)), float(rng.uniform(45, 75))
    if position == "beside":
        return lambda z: float(np.interp(z, (-200, 200), (low, high)))
    return lambda z: min(0.2 * max(abs(z - middle) - half, 0) - PRESSED_MM, low)


def _course(
    skin: Field,
    side: float,
    elbow_mm: float,
    depth_mm: float,
    diameters_mm: tuple[float, float],
    gap_mm: Callable[[float], float],
    scale: Triple,
) -> Course:
    """Return the cross-sections of an arm, from the wrist up, at `gap_mm` from the trunk.

    Args:
        skin: outer surface of the trunk.
        side: -1 for the right arm, 1 for the left.
        elbow_mm: z of the elbow.
        depth_mm: y of the arm's axis; forearm and shoulder lie further in front.
        diameters_mm: diameter of upper arm and forearm in the scanner.
        gap_mm: distance from the trunk in the scanner, at every z.
        scale: size of the patient.
    """
    upper, lower = diameters_mm
    knots = [
        *((z, share * lower) for z, share in reversed(LOWER_COURSE)),
        *((z, share * upper) for z, share in reversed(UPPER_COURSE)),
    ]
    # More sections than knots, so that the axis follows the trunk's outline.
    heights = np.unique([*np.arange(-270.0, 300.0, 30.0), *(z for z, _ in knots)])
    diameter = np.interp(heights, *np.array(knots).T)
    z = heights + elbow_mm
    y = depth_mm - 0.10 * np.maximum(-heights, 0) - 0.05 * np.clip(heights, 0, 300)
    half_x, half_y = 0.48 * diameter / scale[0], 0.52 * diameter / scale[1]
    x = [
        side * _beside(skin, side, (y[i], z[i]), (half_x[i], half_y[i]), gap_mm(z[i]) / scale[0])
        for i in range(len(z))
    ]
    return Course(z, np.array(x), y, half_x, half_y)


def _beside(
    skin: Field,
    side: float,
    at_mm: tuple[float, float],
    radii_mm: tuple[float, float],
    gap_mm: float,
) -> float:
    """Return the |x| at which an upright ellipse at (y, z) has a distance of `gap_mm` to `skin`."""
    turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    y = (at_mm[0] + radii_mm[1] * np.sin(turn)).astype(np.float32)
    z = np.full_like(y, at_mm[1])
    low, high = 0.0, 500.0
    for _ in range(16):
        middle = (low + high) / 2
        x = (side * (middle + radii_mm[0] * np.cos(turn))).astype(np.float32)
        is_near = float(skin(Points(x, y, z)).min()) < gap_mm
        low, high = (middle, high) if is_near else (low, middle)
    return (low + high) / 2


def _limb(course: Course) -> Solid:
    """Return the solid with the given elliptic cross-sections, cut off at its ends."""
    low, high = float(course.z[0]), float(course.z[-1])

    def distance(p: Points) -> Array:
        x, y, half_x, half_y = (np.interp(p.z, course.z, v).astype(np.float32) for v in course[1:])
        scaled = [np.abs(p.x - x) / half_x, np.abs(p.y - y) / half_y]
        side = level_distance(scaled, (half_x, half_y), 2.0)
        return np.asarray(np.maximum(side, np.maximum(low - p.z, p.z - high)))

    box: Box = (
        (float((course.x - course.half_x).min()), float((course.y - course.half_y).min()), low),
        (float((course.x + course.half_x).max()), float((course.y + course.half_y).max()), high),
    )
    return Solid(distance, box)


def _paint_arm(
    rng: np.random.Generator,
    course: Course,
    side: float,
    elbow_mm: float,
    fat_mm: float,
    contrast: Contrast,
) -> list[Structure]:
    """Draw the tissues of one arm, from the skin inwards; arguments as for `build_arms`."""
    arm = _limb(course)
    muscle = arm.grow(-SKIN_MM - fat_mm)
    mottle, marbling = (waves(rng, 8, reach) for reach in ((16, 50), (8, 24)))
    turn = float(np.deg2rad(rng.uniform(-40, 40)))
    bulk = float(rng.uniform(0.92, 1.08))

    def at(height_mm: float, inwards_mm: float = 0.0, back_mm: float = 0.0) -> Triple:
        """Return a point beside the axis, at a height above the elbow."""
        z = height_mm + elbow_mm
        x, y = (float(np.interp(z, course.z, v)) for v in (course.x, course.y))
        return (x - side * inwards_mm, y + back_mm, z)

    def muscle_hu(p: Points) -> Array:
        return np.asarray(contrast.muscle_hu - 30 * np.maximum(marbling(p) - 0.6, 0))

    def septum(p: Points) -> Array:
        # Between the flexors in front and the extensors at the back, through the bone's axis.
        y = np.interp(p.z, course.z, course.y).astype(np.float32)
        return np.asarray(np.abs(p.y - y - 5) - 1.2)

    def shaft(knots: list[Triple], radii: list[float]) -> Solid:
        return tube(knots, [r * bulk for r in radii], blend_mm=4)

    humerus = shaft(
        [at(590, 0, 4), at(250, 0, 4), at(120, 0, 4), at(45, 0, 6), at(12, 0, 7)],
        [12.5, 12.0, 11.0, 11.5, 14.0],
    )
    condyles = ellipsoid(at(4, 0, 6), (28 * bulk, 12 * bulk, 15 * bulk))
    across, along = 12 * float(np.cos(turn)), 12 * float(np.sin(turn))
    ulna = shaft(
        [at(8, 4, 20), at(-25, 0.8 * across, 10), at(-120, across, along), at(-250, across, along)],
        [11.0, 10.5, 7.5, 6.0],
    )
    radius = shaft(
        [
            at(-14, -14, 2),
            at(-40, -across, 2),
            at(-130, -across, -along),
            at(-250, -across, -along),
        ],
        [10.5, 8.0, 7.5, 10.0],
    )
    artery = tube([at(590, 24, -2), at(100, 21, -4), at(0, 6, -16), at(-120, -4, -10)], [2.6] * 4)
    vein = tube([at(590, 29, 3), at(100, 27, 2), at(0, 14, -12)], [2.4] * 3)
    bones = [
        Structure(name, solid, bone_hu(solid.distance, 180.0, cortical_hu, 3.0))
        for name, solid, cortical_hu in (
            ("humerus", humerus, 1150.0),
            ("humerus", condyles, 650.0),
            ("ulna", ulna, 1100.0),
            ("radius", radius, 1100.0),
        )
    ]
    return [
        Structure("skin of the arm", arm, 5.0),
        Structure("fat of the arm", arm.grow(-SKIN_MM), lambda p: FAT_HU + 6 * mottle(p)),
        Structure("muscle of the arm", muscle, muscle_hu),
        Structure("septum of the arm", muscle.grow(-2.0).within(septum), -35.0),
        Structure("fat about the vessels", artery.grow(4.0), -60.0),
        Structure("brachial vein", vein, contrast.muscle_hu - 10),
        Structure("brachial artery", artery, contrast.artery_hu),
        *bones,
    ]
