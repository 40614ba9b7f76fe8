"""HU of the phantom's tissues in the four usual contrast phases.

The ranges are set by hand to resemble clinical CT; they are not measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Bounds over all phases; the tests check every draw against them.
LIVER_RANGE_HU = (46.0, 143.0)
SPLEEN_RANGE_HU = (35.0, 158.0)


@dataclass(frozen=True)
class Contrast:
    """HU of all tissues that depend on contrast phase, patient or oral contrast medium.

    Moire (spleen) and mottle (stomach) are amplitudes of a texture, added to the mean HU.
    """

    phase: str
    liver_hu: float
    spleen_hu: float
    spleen_moire_hu: float
    artery_hu: float
    portal_hu: float
    hepatic_vein_hu: float
    cava_hu: float
    heart_hu: float
    myocardium_hu: float
    renal_cortex_hu: float
    renal_medulla_hu: float
    urine_hu: float
    pancreas_hu: float
    muscle_hu: float
    bowel_wall_hu: float
    bile_hu: float
    gastric_hu: float
    gastric_mottle_hu: float
    oral_hu: float
    stool_hu: float


def draw_contrast(rng: np.random.Generator) -> Contrast:
    """Draw the HU of one scan: unenhanced, arterial, portal venous (most frequent) or delayed."""
    phase = str(rng.choice(["native", "arterial", "portal", "delayed"], p=[0.22, 0.16, 0.46, 0.16]))

    def between(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    # The order of the draws is fixed: another order would change every sample scan.
    if phase == "native":
        blood = between(36, 48)
        liver, spleen, moire = between(49, 66), between(37, 52), 0.0
        artery = portal = hepatic = cava = heart = blood
        cortex = medulla = between(28, 36)
        myocardium, pancreas, wall, muscle = blood + 2, between(32, 45), between(34, 46), 52.0
        urine = 8.0
    elif phase == "arterial":  # the early spleen is patchy, veins are still dark
        liver, spleen, moire = between(62, 92), between(95, 140), between(4, 16)
        artery, portal, hepatic = between(230, 340), between(65, 130), liver - between(0, 12)
        cava, heart = between(55, 110), between(170, 280)
        cortex, medulla = between(150, 200), between(70, 110)
        myocardium, pancreas, wall, muscle = (
            between(90, 120),
            between(85, 115),
            between(60, 90),
            60.0,
        )
        urine = 8.0
    elif phase == "portal":
        liver = between(92, 138)
        spleen, moire = float(np.clip(liver + between(-8, 24), *SPLEEN_RANGE_HU)), 0.0
        artery, portal = between(140, 180), liver + between(28, 60)
        hepatic, cava, heart = portal - between(0, 14), between(115, 150), between(130, 165)
        cortex = medulla = between(160, 205)
        myocardium, pancreas, wall, muscle = (
            between(95, 125),
            between(80, 110),
            between(65, 95),
            64.0,
        )
        urine = 10.0
    else:
        liver = between(74, 108)
        spleen, moire = liver + between(-6, 12), 0.0
        artery = between(95, 125)
        portal = hepatic = cava = artery - between(-4, 8)
        heart, cortex = artery, between(110, 150)
        medulla, urine = cortex + 5, between(150, 500)
        myocardium, pancreas, wall, muscle = between(80, 95), between(60, 85), between(55, 80), 62.0
    stomach_filling = rng.uniform()
    drunk = between(120, 320) if stomach_filling < 0.25 else between(5, 60)
    mottle = between(0, 35)
    return Contrast(
        phase=phase,
        liver_hu=liver,
        spleen_hu=spleen,
        spleen_moire_hu=moire,
        artery_hu=artery,
        portal_hu=portal,
        hepatic_vein_hu=hepatic,
        cava_hu=cava,
        heart_hu=heart,
        myocardium_hu=myocardium,
        renal_cortex_hu=cortex,
        renal_medulla_hu=medulla,
        urine_hu=urine,
        pancreas_hu=pancreas,
        muscle_hu=muscle + between(-4, 4),
        bowel_wall_hu=wall,
        bile_hu=between(2, 16),
        gastric_hu=drunk,
        gastric_mottle_hu=mottle,
        oral_hu=drunk if stomach_filling < 0.35 else between(10, 45),
        stool_hu=between(5, 50) if rng.uniform() < 0.7 else between(60, 180),
    )
