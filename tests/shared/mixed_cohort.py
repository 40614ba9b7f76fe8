"""Write a cohort of small simulated scans with mixed spacing, as several clinics would send them.

    python tests/shared/mixed_cohort.py OUT --cases 300

The bodies are of the size of adults. Slices are 1 to 10 mm apart, voxels in a slice 2.5 to 5 mm;
every fourth scan annotates the liver only.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from bodies import make_body, save_nifti
from cohorts import write_dataset_json

SPACINGS_MM = (1.0, 2.0, 2.5, 3.0, 5.0, 7.5, 10.0)
HEIGHT_MM, DEPTH_MM, WIDTH_MM = 160, 320, 420


def write_mixed(folder: Path, num_cases: int) -> None:
    """Write the scans in the nnU-Net raw layout."""
    rng = np.random.default_rng(0)
    rows = ["case,patient,annotated"]
    for number in range(num_cases):
        slice_mm = SPACINGS_MM[number % len(SPACINGS_MM)]
        pixel_mm = float(np.round(rng.uniform(2.5, 5), 2))
        scale = rng.uniform(0.85, 1.15)
        extent_mm = (HEIGHT_MM, DEPTH_MM * scale, WIDTH_MM * scale)
        spacing_mm = (slice_mm, pixel_mm, pixel_mm)
        shape = tuple(round(mm / step) for mm, step in zip(extent_mm, spacing_mm, strict=True))
        hu, labels = make_body(shape, spacing_mm, seed=number)
        annotated = "liver" if number % 4 == 0 else "liver;spleen"
        if annotated == "liver":
            labels[labels == 2] = 0
        name = f"mixed_{number:03d}"
        save_nifti(folder / "imagesTr" / f"{name}_0000.nii.gz", hu, spacing_mm)
        save_nifti(folder / "labelsTr" / f"{name}.nii.gz", labels, spacing_mm)
        rows.append(f"{name},{name},{annotated}")
    write_dataset_json(folder)
    (folder / "cases.csv").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", type=int, default=300)
    given = parser.parse_args()
    write_mixed(given.out, given.cases)
