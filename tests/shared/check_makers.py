"""Register and help the makers of inputs for the checks of fullscale/scans/checks.py.

A maker writes an input into an empty folder and yields; then it does what the cure says. It yields
a function to look with where `fullscale validate FOLDER` is not what finds the problem. The maker
of a note has no second part: its cure is to do nothing.
"""

from __future__ import annotations

import nibabel as nib
import numpy as np
from cohorts import write_nnunet

from fullscale.ingestion.ingest import ingest
from fullscale.ingestion.validate import validate
from fullscale.scans.cohort import read_cohort
from fullscale.scans.slice_writer import SliceRecipe, write_case

MAKERS = {}
RECIPE = SliceRecipe({"liver": (1,), "spleen": (2,)}, 40, 10.0, (-160.0, 240.0), -300.0)


def makes(code, found):
    """Register the maker of an input for a check, and a text that the finding must have."""

    def register(maker):
        assert code not in MAKERS
        MAKERS[code] = maker, found
        return maker

    return register


def validated(folder):
    """Return a function that returns the findings of `fullscale validate FOLDER`."""

    def look():
        report = validate(folder)
        return [*report.findings, *(finding for row in report.rows for finding in row.findings)]

    return look


def ingested(source, data, **options):
    def look():
        report = ingest(source, data, **options)
        return [*report.refused, *report.warnings]

    return look


def cohort_of(data):
    def look():
        read_cohort(data)
        return []

    return look


def sliced(data, root, recipe):
    def look():
        for case in read_cohort(data).cases:
            write_case(root, case, ("liver", "spleen"), recipe)
        return []

    return look


def pair(folder):
    """Write one case of nnU-Net; return the paths of image and label."""
    write_nnunet(folder, 1)
    return folder / "imagesTr/case_00_0000.nii.gz", folder / "labelsTr/case_00.nii.gz"


def rewrite(path, change=None, affine=None, dtype=None):
    """Write a NIfTI file again with other voxels, in Z, Y, X, or another affine."""
    image = nib.load(path)
    values = np.asarray(image.dataobj)
    if change is not None:
        values = np.ascontiguousarray(np.asarray(change(values.T)).T)
    if dtype is not None:
        values = values.astype(dtype)
    nib.save(nib.Nifti1Image(values, image.affine if affine is None else affine), path)
