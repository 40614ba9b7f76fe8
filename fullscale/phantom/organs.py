"""The phantom's labelled organs: liver with vessels and lesions, and spleen.

Coordinates are those of `trunk`: a standard adult, mm, LPS axes, origin on the midline at mid-liver
height. Each organ is shaped by its neighbours and then scaled to a randomly drawn volume.
"""

from __future__ import annotations

import numpy as np

from fullscale.phantom.contrast import Contrast
from fullscale.phantom.neighbours import KIDNEY_FAT_MM, Neighbours
from fullscale.phantom.shapes import (
    Array,
    Box,
    Frame,
    Points,
    Solid,
    Structure,
    Triple,
    cut_smoothly,
    ellipsoid,
    fit_volume,
    grid_over,
    join_smoothly,
    remembered,
    rotation,
    tube,
    waves,
)
from fullscale.phantom.trunk import FAT_HU, Trunk

LIVER, SPLEEN = 1, 2  # label ids
# Boxes in mm that hold the organ in every patient of the standard frame.
LIVER_BOX: Box = ((-160.0, -120.0, -140.0), (110.0, 110.0, 110.0))
SPLEEN_BOX: Box = ((10.0, -80.0, -130.0), (160.0, 110.0, 100.0))
# Branches inside the liver, in mm: each begins at the portal vein or on another branch.
PORTAL_PATHS: tuple[tuple[Triple, ...], ...] = (
    ((-24.0, -6.0, 8.0), (-55.0, 4.0, 14.0), (-90.0, 18.0, 20.0), (-122.0, 30.0, 14.0)),
    ((-55.0, 4.0, 14.0), (-80.0, -25.0, 10.0), (-105.0, -50.0, 0.0)),
    ((-70.0, 10.0, 14.0), (-92.0, 24.0, -18.0), (-112.0, 28.0, -50.0)),
    ((-70.0, 10.0, 14.0), (-84.0, 30.0, 42.0), (-98.0, 40.0, 62.0)),
    ((-24.0, -6.0, 8.0), (-2.0, -28.0, 22.0), (10.0, -52.0, 28.0), (38.0, -66.0, 34.0)),
)
# Branches that drain into the vena cava at the top of the liver.
HEPATIC_PATHS: tuple[tuple[Triple, ...], ...] = (
    ((-26.0, 10.0, 60.0), (-70.0, 22.0, 48.0), (-110.0, 20.0, 16.0), (-122.0, 16.0, -20.0)),
    ((-26.0, 10.0, 60.0), (-42.0, -28.0, 44.0), (-58.0, -58.0, 14.0)),
    ((-26.0, 10.0, 60.0), (-4.0, -24.0, 54.0), (28.0, -52.0, 44.0)),
    ((-70.0, 22.0, 48.0), (-96.0, -14.0, 36.0), (-112.0, -40.0, 20.0)),
)
FIT_STEP_MM = 6.0  # grid on which a volume is measured
LESION_COUNTS = (0, 0, 1, 1, 2, 4, 7)  # equally likely


def build_liver(
    rng: np.random.Generator,
    trunk: Trunk,
    neighbours: Neighbours,
    contrast: Contrast,
    frame: Frame,
) -> list[Structure]:
    """Draw a liver with vessels and lesions, and in some patients ascites.

    Shapes do not depend on `contrast`.

    Args:
        rng: source of all random draws.
        trunk: surfaces that bound the liver.
        neighbours: organs that indent it.
        contrast: HU of the scan.
        frame: size of the patient, in which the liver has its volume.
    """
    patchy, patch_hu = waves(rng, 8, (40, 120)), float(rng.uniform(1, 7))
    ascites_mm = float(rng.uniform(4, 12)) if rng.uniform() < 0.15 else 0.0
    fissures = _fissures(rng)
    liver = _shape_liver(rng, trunk, neighbours, fissures, frame)

    def near_liver(p: Points) -> Array:
        return liver.distance(p) - 4

    coat = Solid(near_liver, LIVER_BOX).within(neighbours.stomach.distance)
    fat = [fissure.within(near_liver) for fissure in fissures]
    ascites = liver.grow(ascites_mm).within(trunk.cavity, trunk.abdomen)
    lesions = [_lesion(rng, contrast) for _ in range(int(rng.choice(LESION_COUNTS)))]
    return [
        *([Structure("ascites", ascites, 12.0)] if ascites_mm else []),
        Structure("stomach wall on the liver", coat, contrast.bowel_wall_hu),
        *(Structure("fat in a fissure", solid, FAT_HU) for solid in fat),
        Structure("liver", liver, lambda p: contrast.liver_hu + patch_hu * patchy(p), LIVER),
        *_branches(rng, PORTAL_PATHS, contrast.portal_hu),
        *_branches(rng, HEPATIC_PATHS, contrast.hepatic_vein_hu),
        *lesions,
    ]


def build_spleen(
    rng: np.random.Generator,
    trunk: Trunk,
    neighbours: Neighbours,
    contrast: Contrast,
    frame: Frame,
) -> list[Structure]:
    """Draw a spleen; arguments as for `build_liver`."""
    moire = waves(rng, 10, (18, 45))
    spleen = _shape_spleen(rng, trunk, neighbours, frame)

    def hu(p: Points) -> Array:
        return contrast.spleen_hu + contrast.spleen_moire_hu * moire(p)

    return [Structure("spleen", spleen, hu, SPLEEN)]


def _fissures(rng: np.random.Generator) -> list[Solid]:
    """Draw the fissures of the round ligament (teres) and of the venous ligament."""
    return [
        ellipsoid((float(rng.uniform(-2, 12)), -62.0, -6.0), (3.0, 30.0, 26.0)),
        ellipsoid((-6.0, -4.0, 38.0), (24.0, 2.2, 22.0), rotation(yaw_deg=-14)),
    ]


def _fitting_grid(frame: Frame, box: Box) -> Points:
    """Return the standard-frame positions of a regular scanner grid that covers `box` and a margin.

    The box is enlarged by 15 % and 14 mm, because scale and warp of `frame` move its sides.
    """
    margin = np.array([[-14.0], [14.0]])
    return frame.to_standard(grid_over(1.15 * np.array(box) + margin, FIT_STEP_MM))


def _shape_liver(
    rng: np.random.Generator,
    trunk: Trunk,
    neighbours: Neighbours,
    fissures: list[Solid],
    frame: Frame,
) -> Solid:
    """Draw a liver under the diaphragm, within the wall, and right of a slanting visceral surface.

    The visceral surface leans to the left in front and falls away to the right below, which
    leaves the thin lower tip along the right flank; the left lobe is a wedge joined to it.
    """
    target_ml = float(rng.uniform(1080, 1820))
    tilt = float(rng.uniform(0.5, 0.72))
    fall = float(rng.uniform(1.1, 1.6))
    rise = float(rng.uniform(0.2, 0.6))
    reach = float(rng.uniform(28, 82))
    ripple, fine = waves(rng, 8, (70, 150)), waves(rng, 10, (26, 60))
    lobe = ellipsoid(
        (reach - 44, -62.0 + rng.uniform(-4, 6), 24.0 + rng.uniform(-12, 12)),
        (44.0, float(rng.uniform(24, 32)), float(rng.uniform(34, 48))),
        rotation(roll_deg=-12, yaw_deg=-14),
    )
    caudate = ellipsoid((-10.0, 8.0, 34.0), (18.0, 13.0, 27.0))
    hollows = [
        ellipsoid((-20.0, -6.0, 2.0), (19.0, 11.0, 10.0)),
        *fissures,
        neighbours.kidneys[0].grow(KIDNEY_FAT_MM),
        _kidney_bed(neighbours.kidneys[0]),
        neighbours.gallbladder.grow(1.0),
        neighbours.cava.grow(0.3),
    ]

    def visceral(p: Points, shift: float) -> Array:
        above, below = np.maximum(p.z - 20, 0), np.maximum(20 - p.z, 0)
        lean = tilt - np.minimum(0.0045 * below, 0.45)
        edge = np.minimum(rise * above, 30) - fall * below + shift
        slope = np.where(p.z > 20, rise * rise, fall * fall)
        surface = (p.x + lean * p.y - edge) / np.sqrt(1 + lean * lean + slope)
        lobes = join_smoothly(lobe.distance(p), caudate.distance(p), 10)
        return join_smoothly(surface, lobes, 16) + 4 * ripple(p) + 1.6 * fine(p)

    def distance(p: Points, shift: float) -> Array:
        top = np.maximum(trunk.abdomen(p) + 3, trunk.cavity(p) + 1.5)
        front = (-p.y - (105 + 0.9 * (p.z + 10))) / 1.35
        return cut_smoothly(top, cut_smoothly(visceral(p, shift), front, 20), 9)

    def make(shift: float) -> Solid:
        whole = Solid(lambda p: distance(p, shift), LIVER_BOX)
        liver = whole.without(*(h.distance for h in hollows))
        return Solid(remembered(liver.distance), LIVER_BOX)

    return fit_volume(make, target_ml, (-80.0, 70.0), _fitting_grid(frame, LIVER_BOX), FIT_STEP_MM)


def _kidney_bed(kidney: Solid) -> Solid:
    """Return the fat around and behind the right kidney, which the liver must not fill."""
    x, y, z = ((a + b) / 2 for a, b in zip(*kidney.box, strict=True))
    return ellipsoid((x + 5, y + 18, z + 2), (34.0, 42.0, 62.0))


def _shape_spleen(
    rng: np.random.Generator, trunk: Trunk, neighbours: Neighbours, frame: Frame
) -> Solid:
    """Draw a rounded body against the left ribs, hollow towards the stomach."""
    # Log-normal with a median of 235 ml; the upper limit is a markedly enlarged spleen.
    target_ml = float(np.clip(np.exp(rng.normal(np.log(235), 0.42)), 125, 720))
    center = (
        101.0 + float(rng.uniform(-4, 4)),
        42.0 + float(rng.uniform(-10, 10)),
        22.0 + float(rng.uniform(-12, 12)),
    )
    turn = rotation(rng.uniform(-12, 12), rng.uniform(10, 35), rng.uniform(-20, 10))
    hollow = ellipsoid((center[0] - 52, center[1] - 28, center[2]), (44.0, 44.0, 75.0))
    ripple = waves(rng, 8, (35, 90))

    def make(swell: float) -> Solid:
        whole = ellipsoid(center, (34 * swell, 46 * swell, 56 * swell), turn, 2.3)

        def distance(p: Points) -> Array:
            bed = np.maximum(trunk.abdomen(p) + 3, trunk.cavity(p) + 1.5)
            side = cut_smoothly(whole.distance(p) + 2.5 * ripple(p), -hollow.distance(p), 14)
            return cut_smoothly(bed, side, 7)

        return Solid(distance, SPLEEN_BOX).without(
            neighbours.stomach.distance, neighbours.kidneys[1].grow(KIDNEY_FAT_MM).distance
        )

    return fit_volume(make, target_ml, (0.5, 2.6), _fitting_grid(frame, SPLEEN_BOX), FIT_STEP_MM)


def _branches(
    rng: np.random.Generator, paths: tuple[tuple[Triple, ...], ...], hu: float
) -> list[Structure]:
    """Draw the vessels along `paths`, tapering from 5.5 to 1.6 mm radius, with bent knots."""
    found = []
    for root, *rest in paths:
        bent = [
            (x + float(rng.uniform(-7, 7)), y + float(rng.uniform(-7, 7)), z) for x, y, z in rest
        ]
        vessel = tube([root, *bent], list(np.linspace(5.5, 1.6, len(bent) + 1)))
        found.append(Structure("liver vessel", vessel, hu, inside=LIVER))
    return found


def _lesion(rng: np.random.Generator, contrast: Contrast) -> Structure:
    """Draw a cyst, or a solid nodule with a soft rim; radius log-normal, median 11 mm."""
    radius = float(np.clip(np.exp(rng.normal(np.log(11), 0.6)), 4, 38))
    center = (
        float(rng.uniform(-125, 10)),
        float(rng.uniform(-70, 60)),
        float(rng.uniform(-30, 65)),
    )
    rx, ry, rz = (float(v) for v in rng.uniform(0.75, 1.25, 3) * radius)
    shape = ellipsoid(center, (rx, ry, rz))
    is_cyst = rng.uniform() < 0.4
    cyst_hu, depth_hu, rim_mm = (float(rng.uniform(*r)) for r in ((0, 14), (20, 50), (2, 7)))

    def solid_hu(p: Points) -> Array:
        return np.asarray(contrast.liver_hu - depth_hu * np.clip(-shape.distance(p) / rim_mm, 0, 1))

    return Structure("lesion", shape, cyst_hu if is_cyst else solid_hu, inside=LIVER)
