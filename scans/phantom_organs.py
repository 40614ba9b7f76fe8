"""The phantom's organs: liver, spleen and the neighbours they are mistaken for.

Same standard adult as the trunk: mm, LPS axes, origin on the midline at mid-liver height.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from scans.phantom_contrast import Contrast
from scans.phantom_shapes import (
    Array,
    Box,
    Field,
    Points,
    Solid,
    Structure,
    Triple,
    ellipsoid,
    join_smoothly,
    rotation,
    tube,
    waves,
)
from scans.phantom_trunk import FAT_HU, Trunk

LIVER, SPLEEN = 1, 2
LIVER_BOX: Box = ((-160.0, -120.0, -140.0), (110.0, 110.0, 110.0))
SPLEEN_BOX: Box = ((10.0, -80.0, -110.0), (160.0, 110.0, 100.0))
KIDNEY_FAT_MM = 4.0


def build_organs(rng: np.random.Generator, trunk: Trunk, contrast: Contrast) -> list[Structure]:
    """Draws one set of organs in painting order. The draws do not depend on `contrast`."""
    kidneys = _kidneys(rng)
    stomach = _stomach(rng)
    gallbladder = ellipsoid(
        (-46.0 + rng.uniform(-8, 6), -42.0, -26.0 + rng.uniform(-8, 8)),
        (12.0 + rng.uniform(-3, 4), 13.0 + rng.uniform(-3, 4), 27.0),
        rotation(roll_deg=12, pitch_deg=-25),
    )
    liver = _liver(rng, trunk, kidneys, gallbladder)
    spleen = _spleen(rng, trunk, kidneys, stomach)
    return [
        *_vessels(contrast),
        *_pancreas(rng, contrast),
        *_small_bowel(rng, trunk, contrast),
        *_colon(rng, trunk, contrast),
        *_paint_stomach(rng, stomach, trunk, contrast),
        *_paint_kidneys(kidneys, contrast),
        *_heart(rng, trunk, contrast),
        *_paint_spleen(rng, spleen, contrast),
        *_paint_liver(rng, liver, contrast),
        Structure("gallbladder wall", gallbladder.grow(1.5), contrast.bowel_wall_hu),
        Structure("gallbladder", gallbladder, contrast.bile_hu),
    ]


def volume_ml(solid: Solid, step_mm: float = 4.0) -> float:
    """Volume of a solid, by counting the points of a regular grid over its box."""
    axes = [np.arange(a, b, step_mm, dtype=np.float32) for a, b in zip(*solid.box, strict=True)]
    grid = np.meshgrid(*axes, indexing="ij")
    inside = np.clip(0.5 - solid.distance(Points(*grid)) / step_mm, 0, 1)
    return float(inside.sum(dtype=np.float64)) * step_mm**3 / 1000


def _fit_volume(make: Callable[[float], Solid], target_ml: float, low: float, high: float) -> Solid:
    """Bisects the one parameter of `make`, which must grow the solid, to a volume."""
    for _ in range(9):
        middle = (low + high) / 2
        if volume_ml(make(middle)) < target_ml:
            low = middle
        else:
            high = middle
    return make((low + high) / 2)


def _liver(
    rng: np.random.Generator, trunk: Trunk, kidneys: list[Solid], gallbladder: Solid
) -> Solid:
    """Under the diaphragm, within the wall, and right of the slanting visceral surface."""
    target_ml = float(rng.uniform(1080, 1820))
    tilt = float(rng.uniform(0.5, 0.72))
    fall = float(rng.uniform(1.0, 1.4))
    left_reach = float(rng.uniform(0.35, 0.75))
    ripple, fine = waves(rng, 8, (70, 150)), waves(rng, 10, (28, 60))
    cuts = [
        ellipsoid((-20.0, -6.0, 2.0), (19.0, 11.0, 10.0)),
        ellipsoid((4.0 + rng.uniform(-6, 8), -62.0, -4.0), (3.2, 30.0, 28.0)),
        ellipsoid((-6.0, -4.0, 38.0), (24.0, 2.2, 22.0), rotation(yaw_deg=-14)),
    ]

    def visceral(p: Points, shift: float) -> Array:
        above, below = np.maximum(p.z - 20, 0), np.maximum(20 - p.z, 0)
        lean = tilt - np.minimum(0.0045 * below, 0.45)
        edge = np.minimum(left_reach * above, 36) - fall * below
        slant = np.where(p.z > 20, left_reach**2, fall**2)
        surface = (p.x + lean * p.y - edge - shift) / np.sqrt(1 + lean * lean + slant)
        return np.asarray(surface + 4 * ripple(p) + 1.6 * fine(p), dtype=np.float32)

    def distance(p: Points, shift: float) -> Array:
        top = np.maximum(trunk.abdomen(p) + 3, trunk.cavity(p) + 1.5)
        front = (-p.y - (105 + 0.9 * (p.z + 10))) / np.float32(1.35)
        side = -join_smoothly(-visceral(p, shift), -front, 20)
        return -join_smoothly(-top, -side, 9)

    hollows = [c.distance for c in cuts]
    hollows += [k.grow(KIDNEY_FAT_MM).distance for k in kidneys[:1]]
    hollows += [gallbladder.grow(1.0).distance, _cava().grow(0.3).distance]

    def make(shift: float) -> Solid:
        return Solid(lambda p: distance(p, shift), LIVER_BOX).without(*hollows)

    return _fit_volume(make, target_ml, -60.0, 60.0)


def _spleen(rng: np.random.Generator, trunk: Trunk, kidneys: list[Solid], stomach: Solid) -> Solid:
    target_ml = float(np.clip(np.exp(rng.normal(np.log(235), 0.42)), 125, 720))
    center = (101.0 + rng.uniform(-4, 4), 42.0 + rng.uniform(-10, 10), 22.0 + rng.uniform(-12, 12))
    turn = rotation(rng.uniform(-12, 12), rng.uniform(10, 35), rng.uniform(-20, 10))
    hollow = ellipsoid((center[0] - 52, center[1] - 28, center[2]), (44.0, 44.0, 75.0))
    ripple = waves(rng, 8, (35, 90))

    def make(size: float) -> Solid:
        whole = ellipsoid(center, (34 * size, 46 * size, 56 * size), turn, 2.3)

        def distance(p: Points) -> Array:
            inner = np.maximum(trunk.abdomen(p) + 3, trunk.cavity(p) + 1.5)
            side = -join_smoothly(-whole.distance(p) - 2.5 * ripple(p), hollow.distance(p), 14)
            return -join_smoothly(-inner, -side, 7)

        return Solid(distance, SPLEEN_BOX).without(
            stomach.distance, kidneys[1].grow(KIDNEY_FAT_MM).distance
        )

    return _fit_volume(make, target_ml, 0.5, 2.6)


def _kidneys(rng: np.random.Generator) -> list[Solid]:
    """Right, left."""
    found = []
    for side, height in ((-1, -46.0), (1, -32.0)):
        shift = rng.uniform(-8, 8)
        center = (side * (62.0 + rng.uniform(-4, 5)), 44.0 + rng.uniform(-5, 5), height + shift)
        size = rng.uniform(0.88, 1.1)
        turn = rotation(side * 10, -10, side * 25)
        found.append(ellipsoid(center, (25.0 * size, 29.0 * size, 54.0 * size), turn, 2.2))
    return found


def _paint_kidneys(kidneys: list[Solid], contrast: Contrast) -> list[Structure]:
    found = []
    for side, kidney in zip((-1, 1), kidneys, strict=True):
        (x0, y0, z0), (x1, y1, z1) = kidney.box
        hilum = ((x0 + x1) / 2 - side * 15, (y0 + y1) / 2 - 6, (z0 + z1) / 2)
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


def _stomach(rng: np.random.Generator) -> Solid:
    swell = rng.uniform(0.8, 1.2)
    path: list[Triple] = [
        (58.0, 22.0, 62.0),
        (62.0, 4.0, 35.0),
        (56.0, -28.0, 5.0),
        (38.0, -52.0, -22.0 + rng.uniform(-20, 10)),
        (8.0, -48.0, -30.0 + rng.uniform(-12, 6)),
        (-22.0, -32.0, -24.0),
    ]
    radii = [r * swell for r in (27.0, 33.0, 29.0, 22.0, 16.0)]
    bag = tube(path, [*radii, 10.0])
    ripple = waves(rng, 10, (30, 80))
    return Solid(lambda p: bag.distance(p) + 3.0 * ripple(p), bag.box)


def _paint_stomach(
    rng: np.random.Generator, stomach: Solid, trunk: Trunk, contrast: Contrast
) -> list[Structure]:
    inner = stomach.within(lambda p: trunk.abdomen(p) + 3, lambda p: trunk.cavity(p) + 1)
    wall_mm = float(rng.uniform(4, 7))
    content = inner.grow(-wall_mm)
    level = float(rng.uniform(-60, 0))
    clumps = waves(rng, 12, (12, 40))

    def food(p: Points) -> Array:
        return contrast.gastric_hu + contrast.gastric_mottle_hu * clumps(p)

    return [
        Structure("stomach wall", inner, contrast.bowel_wall_hu),
        Structure("stomach content", content, food),
        Structure("stomach gas", content.within(lambda p: p.y - level), -960.0),
    ]


def _wander(
    rng: np.random.Generator, start: Triple, num_knots: int, box: Box, stride_mm: float
) -> list[Triple]:
    low, high = np.array(box[0]), np.array(box[1])
    knots = [np.array(start)]
    heading = rng.normal(size=3)
    for _ in range(num_knots - 1):
        heading = 0.5 * heading + rng.normal(size=3)
        step = knots[-1] + stride_mm * heading / np.linalg.norm(heading)
        knots.append(np.clip(step, low, high))
    return [(float(x), float(y), float(z)) for x, y, z in knots]


def _small_bowel(rng: np.random.Generator, trunk: Trunk, contrast: Contrast) -> list[Structure]:
    box: Box = ((-72.0, -82.0, -300.0), (85.0, 8.0, -48.0))
    found = []
    for top in np.linspace(-52, -290, 22):
        start = (float(rng.uniform(-70, 80)), float(rng.uniform(-75, 5)), float(top))
        path = _wander(rng, start, 6, box, 34.0)
        loop = tube(path, list(rng.uniform(9, 15, 6))).within(lambda p: trunk.cavity(p) + 1)
        filled = rng.uniform() < 0.5
        hu = contrast.oral_hu if filled else contrast.bowel_wall_hu - 25
        found += [
            Structure("small bowel wall", loop, contrast.bowel_wall_hu),
            Structure("small bowel content", loop.grow(-3.0), hu),
        ]
        if rng.uniform() < 0.3:
            line = float(np.mean([k[1] for k in path])) - 2
            gas = loop.grow(-3.5).within(lambda p, line=line: p.y - line)
            found.append(Structure("small bowel gas", gas, -900.0))
    return found


def _colon(rng: np.random.Generator, trunk: Trunk, contrast: Contrast) -> list[Structure]:
    ascending: list[Triple] = [(-96.0, 14.0, -320.0), (-100.0, 12.0, -150.0), (-84.0, -22.0, -92.0)]
    sag = float(rng.uniform(-30, 15))
    transverse: list[Triple] = [
        (-84.0, -22.0, -92.0),
        (-35.0, -70.0, -78.0 + sag),
        (15.0, -76.0, -72.0 + sag),
        (62.0, -66.0, -45.0 + sag / 2),
        (98.0, -22.0, -18.0),
    ]
    descending: list[Triple] = [(98.0, -22.0, -18.0), (112.0, 26.0, -60.0), (106.0, 30.0, -300.0)]
    haustra, stool = waves(rng, 14, (25, 55)), waves(rng, 16, (8, 26))
    found = []
    for path, radius, gassy in (
        (ascending, rng.uniform(19, 26), 0.35),
        (transverse, rng.uniform(15, 24), 0.8),
        (descending, rng.uniform(10, 18), 0.4),
    ):
        bag = tube(path, [float(radius)] * len(path))
        lumpy = Solid(lambda p, bag=bag: bag.distance(p) + 2.2 * haustra(p), bag.box).within(
            lambda p: trunk.cavity(p) + 1, lambda p: trunk.abdomen(p) + 4
        )
        found += [
            Structure("colon wall", lumpy, contrast.bowel_wall_hu),
            Structure(
                "stool",
                lumpy.grow(-3.0),
                lambda p: 15 - 130 * np.maximum(stool(p) - np.float32(0.2), 0) + 25 * haustra(p),
            ),
        ]
        if rng.uniform() < gassy:
            line = float(np.mean([k[1] for k in path])) + rng.uniform(-8, 4)
            gas = lumpy.grow(-4.0).within(lambda p, line=line: p.y - line)
            found.append(Structure("colon gas", gas, -940.0))
    return found


def _cava() -> Solid:
    path: list[Triple] = [
        (-20.0, 16.0, -300.0),
        (-20.0, 14.0, -40.0),
        (-25.0, 20.0, 25.0),
        (-26.0, 8.0, 62.0),
        (-28.0, -14.0, 95.0),
    ]
    return tube(path, [10.5, 11.0, 12.0, 12.5, 13.0])


def _vessels(contrast: Contrast) -> list[Structure]:
    aorta = tube(
        [(4.0, 14.0, -165.0), (10.0, 13.0, -20.0), (14.0, 18.0, 70.0), (24.0, 30.0, 300.0)],
        [8.5, 10.0, 11.5, 12.5],
    )
    mesenteric = [
        tube([(10.0, 6.0, -8.0), (6.0, -10.0, -40.0), (0.0, -22.0, -190.0)], [4.0, 4.0, 2.5]),
        tube(
            [(-12.0, -12.0, -22.0), (-8.0, -14.0, -60.0), (-12.0, -26.0, -190.0)], [6.0, 5.5, 3.0]
        ),
        tube([(-12.0, -12.0, -22.0), (30.0, -2.0, -6.0), (86.0, 28.0, 14.0)], [5.0, 4.5, 3.5]),
        tube([(10.0, 4.0, 4.0), (-8.0, -10.0, 4.0), (-20.0, -8.0, 2.0)], [4.0, 3.0, 2.5]),
    ]
    hus = (contrast.artery_hu, contrast.portal_hu, contrast.portal_hu, contrast.artery_hu)
    esophagus = tube(
        [(6.0, 12.0, 260.0), (8.0, 4.0, 110.0), (24.0, 0.0, 78.0), (46.0, 8.0, 60.0)],
        [9.0, 9.0, 9.0, 8.0],
    )
    renal = [
        tube([(side * 5.0 - 3, 13.0, -30.0), (side * 46.0, 36.0, -36.0)], [4.5, 4.0])
        for side in (-1, 1)
    ]
    return [
        Structure("aorta", aorta, contrast.artery_hu),
        Structure("vena cava", _cava(), contrast.cava_hu),
        Structure("esophagus", esophagus, contrast.bowel_wall_hu - 5),
        *(Structure("renal vein", r, contrast.cava_hu + 8) for r in renal),
        *(Structure("mesenteric vessel", v, h) for v, h in zip(mesenteric, hus, strict=True)),
        Structure("portal vein", _portal_trunk(), contrast.portal_hu),
    ]


def _portal_trunk() -> Solid:
    return tube([(-12.0, -12.0, -22.0), (-16.0, -6.0, -6.0), (-24.0, -6.0, 8.0)], [7.0, 7.5, 7.0])


def _pancreas(rng: np.random.Generator, contrast: Contrast) -> list[Structure]:
    gland = tube(
        [
            (-34.0, -8.0, -46.0),
            (-20.0, -18.0, -26.0),
            (16.0, -20.0, -12.0),
            (56.0, 6.0, 4.0),
            (82.0, 26.0, 14.0),
        ],
        [14.0, 11.0, 9.0, 10.0, 7.0],
    )
    duodenum = tube(
        [
            (-24.0, -32.0, -24.0),
            (-46.0, -14.0, -34.0),
            (-46.0, 8.0, -74.0),
            (-18.0, 4.0, -92.0),
            (20.0, 2.0, -84.0),
        ],
        [11.0, 13.0, 13.0, 11.0, 11.0],
    )
    lobes, fill = waves(rng, 12, (10, 24)), waves(rng, 8, (20, 50))

    def hu(p: Points) -> Array:
        return contrast.pancreas_hu - 55 * np.maximum(lobes(p) - np.float32(0.7), 0)

    return [
        Structure("duodenum wall", duodenum, contrast.bowel_wall_hu),
        Structure("duodenum content", duodenum.grow(-3.5), lambda p: 20 + 15 * fill(p)),
        Structure("pancreas", Solid(lambda p: gland.distance(p) + 2 * lobes(p), gland.box), hu),
    ]


def _heart(rng: np.random.Generator, trunk: Trunk, contrast: Contrast) -> list[Structure]:
    size = rng.uniform(0.92, 1.12)
    turn = rotation(roll_deg=-22, pitch_deg=8, yaw_deg=-28)

    def part(center: Triple, radii: Triple) -> Solid:
        grown = (radii[0] * size, radii[1] * size, radii[2] * size)
        return ellipsoid(center, grown, turn).without(lambda p: trunk.abdomen(p) - 0.5)

    sac = part((20.0, -36.0, 112.0), (66.0, 50.0, 54.0))
    muscle = part((20.0, -35.0, 112.0), (62.0, 46.0, 50.0))
    ripple = waves(rng, 8, (30, 70))
    lumpy = Solid(lambda p: muscle.distance(p) + 2.5 * ripple(p), muscle.box)
    inside = lumpy.grow(-4.0)
    chambers = [
        part((45.0, -26.0, 104.0), (25.0, 19.0, 32.0)),
        part((8.0, -58.0, 106.0), (32.0, 17.0, 28.0)),
        part((-26.0, -28.0, 112.0), (20.0, 24.0, 27.0)),
        part((18.0, -4.0, 130.0), (28.0, 18.0, 24.0)),
    ]
    trunk_of_aorta = tube(
        [(10.0, -30.0, 140.0), (-8.0, -30.0, 190.0), (10.0, 10.0, 220.0)], [15.0, 16.0, 14.0]
    )
    return [
        Structure("epicardial fat", sac, FAT_HU + 20),
        Structure("myocardium", lumpy, contrast.myocardium_hu),
        *(Structure("chamber", c.within(inside.distance), contrast.heart_hu) for c in chambers),
        Structure("ascending aorta", trunk_of_aorta, contrast.artery_hu),
    ]


def _paint_spleen(rng: np.random.Generator, spleen: Solid, contrast: Contrast) -> list[Structure]:
    moire = waves(rng, 10, (18, 45))

    def hu(p: Points) -> Array:
        return contrast.spleen_hu + contrast.spleen_moire_hu * moire(p)

    return [Structure("spleen", spleen, hu, SPLEEN)]


def _paint_liver(rng: np.random.Generator, liver: Solid, contrast: Contrast) -> list[Structure]:
    patchy = waves(rng, 8, (40, 120))

    def hu(p: Points) -> Array:
        return contrast.liver_hu + 2.5 * patchy(p)

    inner = liver.grow(-1.5).distance
    portal: list[list[Triple]] = [
        [(-24.0, -6.0, 8.0), (-55.0, 4.0, 14.0), (-90.0, 18.0, 20.0), (-122.0, 30.0, 14.0)],
        [(-55.0, 4.0, 14.0), (-80.0, -25.0, 10.0), (-105.0, -50.0, 0.0)],
        [(-70.0, 10.0, 14.0), (-92.0, 24.0, -18.0), (-112.0, 28.0, -50.0)],
        [(-70.0, 10.0, 14.0), (-84.0, 30.0, 42.0), (-98.0, 40.0, 62.0)],
        [(-24.0, -6.0, 8.0), (-2.0, -28.0, 22.0), (10.0, -52.0, 28.0), (38.0, -66.0, 34.0)],
    ]
    hepatic: list[list[Triple]] = [
        [(-26.0, 10.0, 60.0), (-70.0, 22.0, 48.0), (-110.0, 20.0, 16.0), (-122.0, 16.0, -20.0)],
        [(-26.0, 10.0, 60.0), (-42.0, -28.0, 44.0), (-58.0, -58.0, 14.0)],
        [(-26.0, 10.0, 60.0), (-4.0, -24.0, 54.0), (28.0, -52.0, 44.0)],
        [(-70.0, 22.0, 48.0), (-96.0, -14.0, 36.0), (-112.0, -40.0, 20.0)],
    ]
    found = [Structure("liver", liver, hu, LIVER)]
    for paths, vessel_hu in ((portal, contrast.portal_hu), (hepatic, contrast.hepatic_vein_hu)):
        for path in paths:
            bent = [
                (x + rng.uniform(-7, 7), y + rng.uniform(-7, 7), z + rng.uniform(-7, 7))
                for x, y, z in path[1:]
            ]
            radii = list(np.linspace(5.5, 1.6, len(path)))
            vessel = tube([path[0], *bent], radii).within(inner)
            found.append(Structure("liver vessel", vessel, vessel_hu, None))
    for _ in range(int(rng.choice([0, 0, 0, 1, 2, 3, 5]))):
        found.append(_lesion(rng, inner, contrast))
    return found


def _lesion(rng: np.random.Generator, inner: Field, contrast: Contrast) -> Structure:
    radius = float(np.clip(np.exp(rng.normal(np.log(10), 0.5)), 4, 26))
    center = (rng.uniform(-125, 10), rng.uniform(-70, 60), rng.uniform(-30, 65))
    stretch = rng.uniform(0.75, 1.25, 3) * radius
    shape = ellipsoid(center, (stretch[0], stretch[1], stretch[2])).within(inner)
    kind, depth, cyst_hu = rng.uniform(), rng.uniform(20, 50), rng.uniform(0, 14)
    rim = float(rng.uniform(2, 7))

    def hu(p: Points) -> Array:
        if kind < 0.4:
            return np.full(p.x.shape, cyst_hu, dtype=np.float32)
        fade = np.clip(-shape.distance(p) / rim, 0, 1)
        return contrast.liver_hu - np.float32(depth) * fade

    return Structure("lesion", shape, hu, None)
