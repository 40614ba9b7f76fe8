"""Makers of scans, labels, series and segmentations with one fault each."""

from __future__ import annotations

import shutil

import nibabel as nib
import numpy as np
import pydicom
from bodies import LABELS, TRUNK_MM, lps_affine, make_body, make_trunk, save_nifti
from check_makers import (
    makes,
    pair,
    rewrite,
)
from cohorts import (
    SPACING_MM,
    leave_unjudged,
    save_structure_set,
    structure_set,
    write_chaos,
    write_dataset_json,
    write_dicom_seg,
    write_seg,
    write_series,
    write_totalsegmentator,
)
from scipy.ndimage import zoom


def changes_image(code, found, change, **kwargs):
    """Register a maker: the voxels of the image are changed, and the cure is to export it again."""

    @makes(code, found)
    def _(folder):
        path, _ = pair(folder)
        kept = path.read_bytes()
        rewrite(path, change, **kwargs)
        yield
        path.write_bytes(kept)


def changes_label(code, found, change, **kwargs):
    """Register a maker: the voxels of the label are changed, and the cure is to export it again."""

    @makes(code, found)
    def _(folder):
        _, path = pair(folder)
        kept = path.read_bytes()
        rewrite(path, change, **kwargs)
        yield
        path.write_bytes(kept)


def changes_series(code, found, change):
    """Register a maker: the slices of a series are changed, and the cure is to export it again."""

    @makes(code, found)
    def _(folder):
        write_chaos(folder, 1)
        series = folder / "CT/1/DICOM_anon"
        shutil.copytree(series, folder.with_name("kept"))
        for k, path in enumerate(sorted(series.iterdir(), reverse=True)):
            ds = pydicom.dcmread(path)
            change(ds, k)
            ds.save_as(path)
        yield
        shutil.rmtree(series)
        shutil.copytree(folder.with_name("kept"), series)


def moved(ds, k, mm):
    ds.ImagePositionPatient = [*ds.ImagePositionPatient[:2], 30 + 8 * k + mm]


def compress_badly(ds, k):
    if k == 3:
        ds.file_meta.TransferSyntaxUID = pydicom.uid.JPEGExtended12Bit
        ds.PixelData = pydicom.encaps.encapsulate([b"\0" * 64])
        ds["PixelData"].is_undefined_length = True


def halve(ds, k):
    if k % 2:
        ds.Rows, ds.Columns = ds.Rows // 2, ds.Columns // 2
        ds.PixelData = ds.PixelData[: len(ds.PixelData) // 4]


def tilt(ds, k):
    x, y, z = ds.ImagePositionPatient
    ds.ImagePositionPatient = [x, float(y) + 3 * k, z]


changes_series("compressed", "JPEG Extended", compress_badly)
changes_series("slices_twice", "38", lambda ds, k: moved(ds, k, -8 if k == 2 else 0))
changes_series(
    "slices_mixed",
    "2 values of AcquisitionNumber",
    lambda ds, k: setattr(ds, "AcquisitionNumber", str(k % 2)),
)
changes_series("slices_missing", "2 slices missing", lambda ds, k: moved(ds, k, 16 * (k > 4)))
changes_series("slices_uneven", "steps of 8 mm", lambda ds, k: moved(ds, k, 3 * (k > 4)))
changes_series("slices_differ", "chaos_1", halve)
changes_series("gantry_tilt", "tilt of 20.6 degrees", tilt)

changes_image("not_hu", "values from 0 to", lambda hu: hu + 1024)
changes_image("slices_repeated", "", lambda hu: np.repeat(hu[::2], 2, axis=0))
changes_image("not_finite", "NaN", lambda hu: np.where(hu > 400, np.nan, hu), dtype=np.float32)
changes_image("voxel_type", "complex", None, dtype=np.complex64)
changes_image("not_3d", "(48, 40, 16, 2)", lambda hu: np.stack([hu, hu]))

changes_label("shape_differs", "(48, 40, 15)", lambda ids: ids[:15])
changes_label("label_not_integer", "not whole", lambda ids: ids * 0.5, dtype=np.float32)
changes_label("label_range", "0 to 300", lambda ids: ids.astype(int) * 150, dtype=np.int16)
changes_label("label_unknown", "[7]", lambda ids: np.where(ids == 2, 7, ids), dtype=np.uint8)
changes_label("label_full", "100%", lambda ids: np.ones_like(ids))
changes_label("label_empty", "no voxel of liver, spleen", lambda ids: ids * 0)

TURNED = lps_affine((16, 40, 48), SPACING_MM)
changes_label("spacing_differs", "off by", None, affine=TURNED * np.diag([1, 1, 1.2, 1]))
changes_label("direction_differs", "LPI", None, affine=TURNED @ np.diag([1, 1, -1, 1]))
changes_label("origin_differs", "off by 1.00 mm", None, affine=TURNED + np.eye(4)[:, [3, 3, 3, 0]])


@makes("unreadable", "case_00_0000.nii.gz")
def _(folder):
    image, _ = pair(folder)
    whole = image.read_bytes()
    image.write_bytes(whole[:-100])
    yield
    image.write_bytes(whole)


@makes("affine", "from orthogonal")
def _(folder):
    image, label = pair(folder)
    sheared = TURNED.copy()
    sheared[0, 1] = 3
    for path in (image, label):
        rewrite(path, affine=sheared)
    yield
    for path in (image, label):
        rewrite(path, affine=TURNED)


@makes("spacing", "7, 7, 80 mm")
def _(folder):
    image, label = pair(folder)
    for path in (image, label):
        rewrite(path, affine=TURNED @ np.diag([1, 1, 10, 1]))
    yield
    for path in (image, label):
        rewrite(path, affine=TURNED)


@makes("segment_unnamed", "segment 1")
def _(folder):
    hu, labels = make_body()
    write_series(folder / "s/ct", hu)
    write_seg(folder / "s/seg.dcm", folder / "s/ct", (labels == 1).astype(np.uint8), ["Segment_1"])
    yield
    write_seg(folder / "s/seg.dcm", folder / "s/ct", (labels == 1).astype(np.uint8), ["Liver"])


@makes("contour", "on every 2. slice only")
def _(folder):
    write_series(folder / "subject/ct", make_body()[0])
    drawn = structure_set(folder)
    region = drawn.ROIContourSequence[0]
    whole = list(region.ContourSequence)
    region.ContourSequence = whole[::2]
    save_structure_set(folder, drawn)
    yield
    region.ContourSequence = whole
    save_structure_set(folder, drawn)


@makes("label_interpolated", "id 1 as a seam")
def _(folder):
    image, label = pair(folder)
    steps, finer = (1, 1.5, 1.5), TURNED @ np.diag([1 / 1.5, 1 / 1.5, 1, 1])
    rewrite(image, lambda hu: zoom(hu.astype(np.float32), steps, order=1), finer, np.int16)
    spleen = np.where(make_body()[1] == 2, 2.0, 0)
    rewrite(label, lambda _: np.rint(zoom(spleen, steps, order=1)), finer, np.uint8)
    yield
    rewrite(label, lambda _: zoom(spleen, steps, order=0), finer, np.uint8)


@makes("mask_values", "5, 9")
def _(folder):
    write_totalsegmentator(folder, 1)
    _, labels = make_body(seed=300)
    mask = folder / "s0000/segmentations/liver.nii.gz"
    save_nifti(mask, np.choose(labels, [0, 5, 9]).astype(np.uint8), SPACING_MM)
    yield
    save_nifti(mask, (labels == 1).astype(np.uint8), SPACING_MM)


@makes("label_twice", "liver in subject-1/second.dcm, subject-1/seg.dcm")
def _(folder):
    write_dicom_seg(folder, 1)
    second = folder / "subject-1/second.dcm"
    liver = np.roll(make_body(seed=600)[1] == 1, 1, axis=1)
    write_seg(second, folder / "subject-1/ct", liver.astype(np.uint8), ["Liver"])
    yield
    second.rename(folder.with_name("second.dcm"))


@makes("label_joined", "lesion in 2 segments")
def _(folder):
    hu, labels = make_body()
    write_series(folder / "s/ct", hu)
    both = np.stack([labels == 1, labels == 2], axis=-1).astype(np.uint8)
    write_seg(folder / "s/seg.dcm", folder / "s/ct", both, ["Lesion", "lesion "])
    yield
    write_seg(folder / "s/seg.dcm", folder / "s/ct", both, ["Lesion", "other lesion"])


@makes("label_overlap", "voxels went to spleen")
def _(folder):
    write_totalsegmentator(folder, 1)
    _, labels = make_body(seed=300)
    liver = (labels > 0).astype(np.uint8)
    save_nifti(folder / "s0000/segmentations/liver.nii.gz", liver, SPACING_MM)
    yield


@makes("region_empty", "heart of plan.dcm")
def _(folder):
    write_series(folder / "subject/ct", make_body()[0])
    save_structure_set(folder, structure_set(folder, ("liver", "spleen", "heart")))
    yield


@makes("label_ignored", "25.0% of the voxels with the id 3")
def _(folder):
    _, label = pair(folder)
    leave_unjudged(label, 3)
    write_dataset_json(folder, labels={**LABELS, "ignore": 3})
    yield


def cuts_both(code, found, box):
    """Register a maker: image and label are cut, and the cure is to export the whole scan."""

    @makes(code, found)
    def _(folder):
        kept = {path: path.read_bytes() for path in pair(folder)}
        for path in kept:
            rewrite(path, lambda values: values[box])
        yield
        for path, content in kept.items():
            path.write_bytes(content)


cuts_both("few_slices", "7 axial slices", np.s_[4:11])
cuts_both("no_air", "values from -1", np.s_[:, 6:33, 22:26])


@makes("orientation_missing", "sform_code 0 and qform_code 0")
def _(folder):
    for path in pair(folder):
        volume = nib.load(path)
        volume.set_sform(TURNED, 0)
        volume.set_qform(TURNED, 0)
        nib.save(volume, path)
    yield
    pair(folder)


@makes("forms_differ", "in its qform")
def _(folder):
    image, _ = pair(folder)
    scan = nib.load(image)
    right = scan.affine
    scan.set_qform(right @ np.diag([-1, 1, 1, 1]), 1)
    nib.save(scan, image)
    yield
    scan.set_qform(right, 1)
    nib.save(scan, image)


@makes("label_mirrored", "mirrored from left to right")
def _(folder):
    image, label = pair(folder)
    mask = np.zeros((16, 40, 48), dtype=bool)
    mask[10:15, 22:34, 8:18] = True
    hu = np.where(mask, 110, make_body()[0])
    hu[~mask & (hu > 0)] = -80
    rewrite(image, lambda _: hu, dtype=np.int16)
    rewrite(label, lambda _: mask[..., ::-1], dtype=np.uint8)
    yield
    rewrite(label, lambda ids: ids[..., ::-1])


@makes("content_alike", "with slices of")
def _(folder):
    pair(folder)
    for part, end in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        shutil.copy(folder / part / f"case_00{end}", folder / part / f"cut{end}")
        rewrite(folder / part / f"cut{end}", lambda values: values[2:])
    yield
    for path in folder.glob("*/cut*"):
        path.unlink()


@makes("series_split", "chaos_1, chaos_2")
def _(folder):
    write_chaos(folder, 1)
    first, second = folder / "CT/1", folder / "CT/2"
    for part in ("DICOM_anon", "Ground"):
        (second / part).mkdir(parents=True)
        for path in sorted((first / part).iterdir())[8:]:
            path.rename(second / part / path.name)
    yield
    for path in second.glob("*/*"):
        path.rename(first / path.relative_to(second))
    shutil.rmtree(second)


def mirrored_trunk(folder, axis):
    hu, labels = make_trunk()
    for path, values in zip(pair(folder), (hu, labels), strict=True):
        save_nifti(path, np.flip(values, axis), TRUNK_MM)
    yield
    for path, values in zip(pair(folder), (hu, labels), strict=True):
        save_nifti(path, values, TRUNK_MM)


@makes("axis", "head and feet look swapped")
def _(folder):
    yield from mirrored_trunk(folder, 0)


@makes("liver_on_left", "left and right look swapped")
def _(folder):
    yield from mirrored_trunk(folder, 2)


@makes("private_text", "PatientName")
def _(folder):
    write_chaos(folder, 1)
    yield
