"""Organs next to the phantom's liver and spleen, often with nearly their HU.

Coordinates are those of `trunk`: a standard adult, mm, LPS axes, origin on the midline at mid-liver
height. Positions and sizes are set by hand to look plausible on CT; they are not measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fullscale.phantom.contrast import Contrast
from fullscale.phantom.shapes import (
    Array,
    Box,
    Points,
    Solid,
    Structure,
    Triple,
    ellipsoid,
    in_front_of,
    rotation,
    tube,
    waves,
)
from fullscale.phantom.trunk import FAT_HU, Trunk

KIDNEY_FAT_MM = 4.0
GAS_HU = -950.0  # gas in the gut is blurred with its wall, so a little above air
BOWEL_BOX: Box = ((-72.0, -72.0, -300.0), (86.0, -8.0, -22.0))
"""Space of the small bowel, in mm: below stomach and pancreas, in front of the spine."""


@dataclass(frozen=True)
class Neighbours:
    """The neighbouring organs: shapes that indent liver and spleen, and structures to paint.

    Attributes:
        kidneys: right and left kidney.
        stomach: outer surface of the stomach.
        gallbladder: inner surface of the gallbladder.
        cava: inferior vena cava.
        beneath: structures to paint before liver and spleen.
        above: structures to paint after them.
    """

    kidneys: tuple[Solid, Solid]
    stomach: Solid
    gallbladder: Solid
    cava: Solid
    beneath: list[Structure]
    above: list[Structure]


def build_neighbours(rng: np.random.Generator, trunk: Trunk, contrast: Contrast) -> Neighbours:
    """Draw the neighbouring organs of one patient; their shapes do not depend on `contrast`."""
    kidneys = (_kidney(rng, -1.0, -46.0), _kidney(rng, 1.0, -32.0))
    stomach = _stomach(rng, trunk)
    gallbladder = ellipsoid(
        (-46.0 + float(rng.uniform(-8, 6)), -42.0, -26.0 + float(rng.uniform(-8, 8))),
        (12.0 + float(rng.uniform(-3, 4)), 13.0 + float(rng.uniform(-3, 4)), 27.0),
        rotation(roll_deg=12, pitch_deg=-25),
    )
    cava = tube(
        [
            (-20.0, 16.0, -300.0),
            (-20.0, 14.0, -40.0),
            (-25.0, 20.0, 25.0),
            (-26.0, 8.0, 62.0),
            (-28.0, -14.0, 95.0),
        ],
        [10.5, 11.0, 12.0, 12.5, 13.0],
    )
    beneath = [
        *_vessels(cava, contrast),
        *_pancreas(rng, contrast),
        *_small_bowel(rng, contrast),
        *_colon(rng, trunk, contrast),
        *_paint_stomach(rng, stomach, contrast),
        *_paint_kidneys(kidneys, contrast),
        *_heart(rng, trunk, contrast),
    ]
    above = [
        Structure("gallbladder wall", gallbladder.grow(1.5), contrast.bowel_wall_hu),
        Structure("gallbladder", gallbladder, contrast.bile_hu),
    ]
    return Neighbours(kidneys, stomach, gallbladder, cava, beneath, above)


def _kidney(rng: np.random.Generator, side: float, height_mm: float) -> Solid:
    """Draw a kidney; `side` is -1 for the right and 1 for the left, `height_mm` its centre."""
    x, y, z = (float(rng.uniform(-r, r)) for r in (4.5, 5, 8))
    size = float(rng.uniform(0.88, 1.1))
    turn = rotation(side * 10, -10, side * 25)
    center = (side * 62 + x, 44 + y, height_mm + z)
    return ellipsoid(center, (25 * size, 29 * size, 54 * size), turn, 2.2)


def _paint_kidneys(kidneys: tuple[Solid, Solid], contrast: Contrast) -> list[Structure]:
    """Return cortex, medulla, sinus and pelvis of both kidneys, in their perirenal fat."""
    found = []
    for side, kidney in zip((-1.0, 1.0), kidneys, strict=True):
        x, y, z = ((a + b) / 2 for a, b in zip(*kidney.box, strict=True))
        hilum = (x - side * 15, y - 6, z)
        sinus = ellipsoid(hilum, (15.0, 9.0, 24.0), rotation(yaw_deg=side * 25))
        pelvis = ellipsoid((hilum[0] - side * 4, hilum[1], hilum[2]), (11.0, 5.0, 9.0))
        found += [
            Structure("perirenal fat", kidney.grow(KIDNEY_FAT_MM), FAT_HU),
            Structure("renal cortex", kidney, contrast.renal_cortex_hu),
            Structure("renal medulla", kidney.grow(-6.5), contrast.renal_medulla_hu),
            Structure("renal sinus", sinus, -70.0),
            Structure("renal pelvis", pelvis, contrast.urine_hu),
        ]
    return found


def _stomach(rng: np.random.Generator, trunk: Trunk) -> Solid:
    """Draw a stomach from fundus to pylorus, with random filling and sag."""
    swell = float(rng.uniform(0.85, 1.3))
    sag, shift = float(rng.uniform(-20, 10)), float(rng.uniform(-8, 8))
    path: list[Triple] = [
        (52.0 + shift, 18.0, 64.0),
        (58.0 + shift, -2.0, 35.0),
        (53.0 + shift, -30.0, 6.0),
        (40.0, -52.0, -22.0 + sag),
        (8.0, -48.0, -28.0 + sag / 2),
        (-22.0, -32.0, -22.0),
    ]
    radii = [r * swell for r in (28.0, 33.0, 29.0, 22.0, 16.0)]
    bag = tube(path, [*radii, 10.0], blend_mm=30).roughen(waves(rng, 10, (35, 90)), 3.0)
    return bag.within(lambda p: trunk.abdomen(p) + 3, lambda p: trunk.cavity(p) + 1)


def _paint_stomach(rng: np.random.Generator, stomach: Solid, contrast: Contrast) -> list[Structure]:
    # The patient lies on the back: gas rises to the front, y below a level.
    content = stomach.grow(-float(rng.uniform(4, 7)))
    gas = content.within(in_front_of(float(rng.uniform(-60, -5))))
    clumps = waves(rng, 12, (12, 40))

    def food(p: Points) -> Array:
        return contrast.gastric_hu + contrast.gastric_mottle_hu * clumps(p)

    return [
        Structure("stomach wall", stomach, contrast.bowel_wall_hu),
        Structure("stomach content", content, food),
        Structure("stomach gas", gas, GAS_HU),
    ]


def _wander(rng: np.random.Generator, num_knots: int, stride_mm: float) -> list[Triple]:
    """Return the knots of a random walk that keeps some of its direction within `BOWEL_BOX`."""
    low, high = np.array(BOWEL_BOX)
    knots = [rng.uniform(low, high)]
    heading = rng.normal(size=3)
    for _ in range(num_knots - 1):
        heading = 0.6 * heading + rng.normal(size=3)
        step = knots[-1] + stride_mm * heading / np.linalg.norm(heading)
        knots.append(  # reflected at the sides of the box
            np.where((step < low) | (step > high), 2 * np.clip(step, low, high) - step, step)
        )
    return [(float(x), float(y), float(z)) for x, y, z in knots]


def _small_bowel(rng: np.random.Generator, contrast: Contrast) -> list[Structure]:
    """Draw 26 to 39 loops, some with oral contrast medium or gas."""
    folds = waves(rng, 8, (20, 45))
    found = []
    for _ in range(int(rng.integers(26, 40))):
        path = _wander(rng, 6, 26.0)
        radii = [float(r) for r in rng.uniform(8, 14, len(path))]
        is_filled, has_gas = rng.uniform() < 0.5, rng.uniform() < 0.25
        loop = tube(path, radii, blend_mm=10).roughen(folds, 1.5)
        hu = contrast.oral_hu if is_filled else contrast.bowel_wall_hu - 25
        found += [
            Structure("small bowel wall", loop, contrast.bowel_wall_hu),
            Structure("small bowel content", loop.grow(-3.0), hu),
        ]
        if has_gas:
            line = float(np.mean([y for _, y, _ in path])) - 2
            gas = loop.grow(-3.5).within(in_front_of(line))
            found.append(Structure("small bowel gas", gas, GAS_HU))
    return found


def _colon(rng: np.random.Generator, trunk: Trunk, contrast: Contrast) -> list[Structure]:
    """Draw ascending, transverse and descending colon with stool and gas.

    `hepatic` and `splenic` are its flexures next to liver and spleen. Each course is a path in mm,
    a radius in mm, and the probability of gas.
    """
    sag, lift = float(rng.uniform(-30, 15)), float(rng.uniform(-15, 30))
    hepatic: Triple = (-84.0, -22.0, -92.0)
    splenic: Triple = (98.0, -24.0, -18.0 + lift)
    courses: list[tuple[list[Triple], float, float]] = [
        ([(-96.0, 14.0, -320.0), (-100.0, 12.0, -150.0), hepatic], rng.uniform(19, 26), 0.35),
        (
            [
                hepatic,
                (-35.0, -70.0, -78.0 + sag),
                (15.0, -76.0, -72.0 + sag),
                (62.0, -66.0, -45.0 + sag / 2 + lift / 2),
                splenic,
            ],
            rng.uniform(15, 24),
            0.8,
        ),
        ([splenic, (112.0, 26.0, -60.0), (106.0, 30.0, -300.0)], rng.uniform(10, 18), 0.4),
    ]
    haustra, stool = waves(rng, 8, (25, 55)), waves(rng, 10, (8, 26))

    def stool_hu(p: Points) -> Array:
        return np.asarray(contrast.stool_hu - 130 * np.maximum(stool(p) - 0.2, 0) + 25 * haustra(p))

    found = []
    for path, radius, gas_share in courses:
        bag = tube(path, [float(radius)] * len(path), blend_mm=20).roughen(haustra, 2.2)
        bag = bag.within(lambda p: trunk.cavity(p) + 1, lambda p: trunk.abdomen(p) + 4)
        found += [
            Structure("colon wall", bag, contrast.bowel_wall_hu),
            Structure("stool", bag.grow(-3.0), stool_hu),
        ]
        if rng.uniform() < gas_share:
            line = float(np.mean([y for _, y, _ in path]) + rng.uniform(-8, 4))
            gas = bag.grow(-4.0).within(in_front_of(line))
            found.append(Structure("colon gas", gas, GAS_HU))
    return found


def _vessels(cava: Solid, contrast: Contrast) -> list[Structure]:
    """Return the large vessels and the esophagus; they are the same in every patient."""
    artery, portal = contrast.artery_hu, contrast.portal_hu
    aorta = tube(
        [(4.0, 14.0, -165.0), (10.0, 13.0, -20.0), (14.0, 18.0, 70.0), (24.0, 30.0, 300.0)],
        [8.5, 10.0, 11.5, 12.5],
    )
    iliac = [
        tube([(4.0, 14.0, -165.0), (side * 45, 16.0, -290.0)], [6.5, 6.0]) for side in (-1.0, 1.0)
    ]
    renal = [
        tube([(side * 5 - 3, 13.0, -30.0), (side * 46, 36.0, -36.0)], [4.5, 4.0])
        for side in (-1.0, 1.0)
    ]
    superior_artery = tube(
        [(10.0, 6.0, -8.0), (6.0, -10.0, -40.0), (0.0, -22.0, -190.0)], [4.0, 4.0, 2.5]
    )
    superior_vein = tube(
        [(-12.0, -12.0, -22.0), (-8.0, -14.0, -60.0), (-12.0, -26.0, -190.0)], [6.0, 5.5, 3.0]
    )
    splenic_vein = tube(
        [(-12.0, -12.0, -22.0), (30.0, -2.0, -6.0), (86.0, 28.0, 14.0)], [5.0, 4.5, 3.5]
    )
    celiac = tube([(10.0, 4.0, 4.0), (-8.0, -10.0, 4.0), (-20.0, -8.0, 2.0)], [4.0, 3.0, 2.5])
    portal_vein = tube(
        [(-12.0, -12.0, -22.0), (-16.0, -6.0, -6.0), (-24.0, -6.0, 8.0)], [7.0, 7.5, 7.0]
    )
    esophagus = tube(
        [(6.0, 12.0, 260.0), (8.0, 4.0, 110.0), (24.0, 0.0, 78.0), (46.0, 8.0, 60.0)],
        [9.0, 9.0, 9.0, 8.0],
    )
    return [
        *(Structure("iliac artery", solid, artery) for solid in iliac),
        Structure("aorta", aorta, artery),
        Structure("vena cava", cava, contrast.cava_hu),
        Structure("esophagus", esophagus, contrast.bowel_wall_hu - 5),
        *(Structure("renal vein", solid, contrast.cava_hu + 8) for solid in renal),
        Structure("superior mesenteric artery", superior_artery, artery),
        Structure("superior mesenteric vein", superior_vein, portal),
        Structure("splenic vein", splenic_vein, portal),
        Structure("celiac trunk", celiac, artery),
        Structure("portal vein", portal_vein, portal),
    ]


def _pancreas(rng: np.random.Generator, contrast: Contrast) -> list[Structure]:
    """Draw a lobulated pancreas from head to tail, and the duodenum around its head."""
    head_to_tail: list[Triple] = [
        (-34.0, -8.0, -46.0),
        (-20.0, -18.0, -26.0),
        (16.0, -20.0, -12.0),
        (56.0, 6.0, 4.0),
        (82.0, 26.0, 14.0),
    ]
    gland = tube(head_to_tail, [14.0, 11.0, 9.0, 10.0, 7.0], blend_mm=10)
    duodenum = tube(
        [
            (-24.0, -32.0, -24.0),
            (-46.0, -14.0, -34.0),
            (-46.0, 8.0, -74.0),
            (-18.0, 4.0, -92.0),
            (20.0, 2.0, -84.0),
        ],
        [11.0, 13.0, 13.0, 11.0, 11.0],
        blend_mm=12,
    )
    lobes, fill = waves(rng, 12, (10, 24)), waves(rng, 8, (20, 50))

    def gland_hu(p: Points) -> Array:
        return np.asarray(contrast.pancreas_hu - 55 * np.maximum(lobes(p) - 0.7, 0))

    return [
        Structure("duodenum wall", duodenum, contrast.bowel_wall_hu),
        Structure("duodenum content", duodenum.grow(-3.5), lambda p: 20 + 15 * fill(p)),
        Structure("pancreas", gland.roughen(lobes, 2.0), gland_hu),
    ]


def _heart(rng: np.random.Generator, trunk: Trunk, contrast: Contrast) -> list[Structure]:
    """Draw the heart on the diaphragm; only this thin muscle separates it from the liver."""
    size, height = float(rng.uniform(0.92, 1.12)), float(rng.uniform(102, 110))
    turn = rotation(roll_deg=-22, pitch_deg=8, yaw_deg=-28)

    def floor(p: Points) -> Array:
        return trunk.abdomen(p) - 0.5

    def part(x: float, y: float, z: float, radii: Triple) -> Solid:
        grown = (radii[0] * size, radii[1] * size, radii[2] * size)
        return ellipsoid((x, y, height + z), grown, turn).without(floor)

    sac = part(20.0, -36.0, 0.0, (65.0, 50.0, 51.0))
    muscle = part(20.0, -35.0, 0.0, (62.0, 46.0, 50.0)).roughen(waves(rng, 8, (30, 70)), 2.5)
    inside = muscle.grow(-4.0).distance
    chambers = [
        part(45.0, -26.0, -8.0, (25.0, 19.0, 32.0)),
        part(8.0, -58.0, -6.0, (32.0, 17.0, 28.0)),
        part(-26.0, -28.0, 0.0, (20.0, 24.0, 27.0)),
        part(18.0, -4.0, 18.0, (28.0, 18.0, 24.0)),
    ]
    outflow = tube(
        [(10.0, -30.0, 140.0), (-8.0, -30.0, 190.0), (10.0, 10.0, 220.0)], [15.0, 16.0, 14.0]
    )
    return [
        Structure("epicardial fat", sac, FAT_HU + 20),
        Structure("myocardium", muscle, contrast.myocardium_hu),
        *(Structure("chamber", c.within(inside), contrast.heart_hu) for c in chambers),
        Structure("ascending aorta", outflow, contrast.artery_hu),
    ]
