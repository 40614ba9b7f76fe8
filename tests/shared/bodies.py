"""Make small bodies in HU with liver and spleen, in any orientation, for tests."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

ORGANS = {"liver": (1,), "spleen": (2,)}
LABELS = {"background": 0, "liver": 1, "spleen": 2}
TRUNK_SHAPE, TRUNK_MM = (40, 40, 48), (6.0, 7.0, 7.0)


def make_body(shape_ZYX=(16, 40, 48), spacing_mm=(8.0, 7.0, 7.0), seed=0):
    """Return HU int16 and labels uint8, (Z, Y, X) in LPS; the liver is at low x, the right side."""
    rng = np.random.default_rng(seed)
    steps = np.array(spacing_mm)
    middle = (np.array(shape_ZYX) - 1) / 2
    axes_mm = [
        (np.arange(n) - m) * step for n, m, step in zip(shape_ZYX, middle, steps, strict=True)
    ]

    def ball(centre, radii):
        parts = zip(axes_mm, centre, radii, strict=True)
        z, y, x = (((mm - middle_mm) / radius) ** 2 for mm, middle_mm, radius in parts)
        return z[:, None, None] + y[:, None] + x < 1

    extent = middle * steps
    hu = np.full(shape_ZYX, -1000.0)
    hu[ball((0, 0, 0), (1e6, 0.75 * extent[1], 0.8 * extent[2]))] = -90
    hu[ball((0, 0, 0), (1e6, 0.68 * extent[1], 0.73 * extent[2]))] = 45
    labels = np.zeros(shape_ZYX, np.uint8)
    labels[ball((0, 0, -0.35 * extent[2]), (0.7 * extent[0], 0.4 * extent[1], 0.3 * extent[2]))] = 1
    labels[ball((0, 0, 0.45 * extent[2]), (0.5 * extent[0], 0.25 * extent[1], 0.2 * extent[2]))] = 2
    hu[labels == 1] = 110
    hu[labels == 2] = 125
    hu[ball((0, 0.5 * extent[1], 0), (1e6, 0.15 * extent[1], 0.12 * extent[2]))] = 500
    hu += rng.normal(0, 8, shape_ZYX)
    return np.rint(hu).clip(-1024, 3000).astype(np.int16), labels


def make_trunk(lungs=True):
    """Return HU and labels of a body with bowel gas in front, lungs in the upper third or none."""
    hu, labels = make_body(TRUNK_SHAPE, TRUNK_MM)
    hu[8:14, 10:13, 20:30] = -1000
    if lungs:
        labels[28:] = 0
        hu[28:, 13:28, 11:37] = -850
        hu[28:, 13:25, 22:34] = 45  # the heart, left of the middle
    return hu, labels


def lps_affine(shape_ZYX, spacing_mm, origin_mm=(120.0, 90.0, -40.0)):
    """Return the RAS+ affine of canonical voxels (x, y, z)."""
    dz, dy, dx = spacing_mm
    affine = np.diag([-dx, -dy, dz, 1.0])
    affine[:3, 3] = origin_mm
    return affine


def turn(values_ZYX, affine, codes):
    """Return canonical voxels and their affine reordered to the axes `codes`."""
    turned = ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(codes))
    values = nib.apply_orientation(values_ZYX.transpose(2, 1, 0), turned)
    return values, affine @ inv_ornt_aff(turned, values_ZYX.transpose(2, 1, 0).shape)


def save_nifti(path: Path, values_ZYX, spacing_mm, codes="LPS", dtype=None):
    """Write a NIfTI file with nibabel's writer, independent of the code under test."""
    values, affine = turn(values_ZYX, lps_affine(values_ZYX.shape, spacing_mm), codes)
    image = nib.Nifti1Image(np.ascontiguousarray(values), affine)
    if dtype is not None:
        image.set_data_dtype(dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path
