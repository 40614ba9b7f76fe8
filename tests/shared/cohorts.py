"""Write small cohorts in every layout, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pydicom
from bodies import LABELS, make_body, save_nifti
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from fullscale.formats.rtstruct import Region, Slices, make_structure_set
from fullscale.scans.dicom import order_series

SPACING_MM = (8.0, 7.0, 7.0)
ORIENTATIONS = ("LPS", "RAS", "LAS", "PSR")


def write_nnunet(folder: Path, num_cases: int = 3, *, prefix="case", seed=0, cases_csv=None):
    """Write nnU-Net raw, each case in another orientation."""
    for number in range(num_cases):
        hu, labels = make_body(seed=seed + number)
        codes = ORIENTATIONS[number % len(ORIENTATIONS)]
        name = f"{prefix}_{number:02d}"
        save_nifti(folder / "imagesTr" / f"{name}_0000.nii.gz", hu, SPACING_MM, codes)
        save_nifti(folder / "labelsTr" / f"{name}.nii.gz", labels, SPACING_MM, codes)
    write_dataset_json(folder)
    if cases_csv is not None:
        (folder / "cases.csv").write_text("case,patient,annotated\n" + cases_csv)
    return folder


def write_dataset_json(folder: Path, **changes):
    content = {
        "name": "Made",
        "labels": LABELS,
        "channel_names": {"0": "CT"},
        "file_ending": ".nii.gz",
        **changes,
    }
    (folder / "dataset.json").write_text(json.dumps(content))


def leave_unjudged(path, marked):
    """Give the uppermost quarter of a label map, whose third axis runs to the head, another id."""
    values = np.asarray(nib.load(path).dataobj).copy()
    values[..., 12:] = marked
    nib.save(nib.Nifti1Image(values, nib.load(path).affine), path)


def write_msd(folder: Path, num_cases: int = 2):
    """Write the Medical Segmentation Decathlon layout: ids as keys, pairs listed."""
    training = []
    for number in range(num_cases):
        hu, labels = make_body(seed=100 + number)
        name = f"spleen_{number}.nii.gz"
        save_nifti(folder / "imagesTr" / name, hu, SPACING_MM, "RAS")
        save_nifti(folder / "labelsTr" / name, (labels == 2).astype(np.uint8), SPACING_MM, "RAS")
        training.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    content = {
        "name": "Spleen",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "spleen"},
        "licence": "CC-BY-SA 4.0",
        "training": training,
        "test": [],
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def write_lits(folder: Path, numbers=(0, 27)):
    """Write LiTS: two folders of plain and of gzipped NIfTI, mixed orientations."""
    for number in numbers:
        hu, labels = make_body(seed=200 + number)
        labels = (labels == 1).astype(np.uint8)
        labels[labels.shape[0] // 2, 20, 16] = 2
        ending = "nii.gz" if number % 2 else "nii"
        codes = ORIENTATIONS[number % len(ORIENTATIONS)]
        save_nifti(folder / f"batch 1/volume-{number}.{ending}", hu, SPACING_MM, codes)
        save_nifti(folder / f"batch 1/segmentation-{number}.{ending}", labels, SPACING_MM, codes)
    return folder


def write_totalsegmentator(folder: Path, num_cases: int = 2):
    """Write one folder per case, one mask per organ; the second case has no spleen mask."""
    for number in range(num_cases):
        hu, labels = make_body(seed=300 + number)
        case = folder / f"s{number:04d}"
        codes = ORIENTATIONS[number % len(ORIENTATIONS)]
        save_nifti(case / "ct.nii.gz", hu, SPACING_MM, codes)
        for organ in ("liver", "spleen")[: 2 - number % 2]:
            mask = (labels == LABELS[organ]).astype(np.uint8)
            save_nifti(case / f"segmentations/{organ}.nii.gz", mask, SPACING_MM, codes)
    return folder


def write_series(
    folder: Path,
    hu_ZYX,
    spacing_mm=SPACING_MM,
    *,
    positions_mm=None,
    tilt_mm=0.0,
    name="i{:05d}.dcm",
    order=None,
    **tags,
):
    """Write a CT series; by default the file names are in reverse order of position."""
    folder.mkdir(parents=True, exist_ok=True)
    num = len(hu_ZYX)
    dz, dy, dx = spacing_mm
    positions_mm = [dz * k for k in range(num)] if positions_mm is None else positions_mm
    order = list(reversed(range(num))) if order is None else order
    series, study, frame = generate_uid(), generate_uid(), generate_uid()
    for number, k in enumerate(order):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds = pydicom.Dataset()
        ds.file_meta = meta
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        ds.Modality, ds.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.PatientName, ds.PatientID = "Doe^Jane", "ID-17"
        ds.PatientBirthDate, ds.PatientSex = "19500101", "F"
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, frame
        ds.StudyID, ds.SeriesNumber, ds.InstanceNumber = "1", "1", str(number + 1)
        ds.StudyDate, ds.StudyTime, ds.AccessionNumber = "20200101", "120000", "A1"
        ds.ReferringPhysicianName, ds.Manufacturer = "Roe^Rick", "Maker"
        ds.PositionReferenceIndicator = ""
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.ImagePositionPatient = [-100.0, -80.0 + tilt_mm * k, 30.0 + positions_mm[k]]
        ds.PixelSpacing, ds.SliceThickness = [dy, dx], dz
        ds.Rows, ds.Columns = hu_ZYX.shape[1:]
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = "1", "-1024", "HU"
        ds.PixelData = (hu_ZYX[k].astype(np.int32) + 1024).astype(np.uint16).tobytes()
        for tag, value in tags.items():
            setattr(ds, tag, value)
        ds.save_as(folder / name.format(number), enforce_file_format=True)
    return folder


def write_ircadb(folder: Path, num_cases: int = 2):
    """Write PATIENT_DICOM and MASKS_DICOM; the second case has no spleen, the first two tumours."""
    for number in range(num_cases):
        hu, labels = make_body(seed=400 + number)
        case = folder / f"3Dircadb1.{number + 1}"
        write_series(case / "PATIENT_DICOM", hu, name="image_{}")
        masks = {"liver": labels == 1, "spleen": labels == 2}
        tumours = {"livertumor01": np.zeros_like(masks["liver"])}
        tumours["livertumor02"] = tumours["livertumor01"].copy()
        middle = len(hu) // 2
        tumours["livertumor01"][middle, 18:21, 14:17] = True
        tumours["livertumor02"][middle, 23:25, 14:17] = True
        masks = masks | tumours if number == 0 else {"liver": masks["liver"]}
        for organ, mask in masks.items():
            drawn = np.where(mask, 255, 0) - 1024
            write_series(case / "MASKS_DICOM" / organ, drawn, name="image_{}", RescaleIntercept="0")
    return folder


def write_chaos(folder: Path, num_cases: int = 2):
    """Write DICOM_anon and Ground, pictures numbered as the files of the slices."""
    for number in range(num_cases):
        hu, labels = make_body(seed=500 + number)
        case = folder / "CT" / str(number + 1)
        write_series(case / "DICOM_anon", hu)
        (case / "Ground").mkdir()
        for picture, k in enumerate(reversed(range(len(hu)))):
            pixels = np.where(labels[k] == 1, 255, 0).astype(np.uint8)
            Image.fromarray(pixels).save(case / "Ground" / f"liver_GT_{picture:03d}.png")
    return folder


def write_dicom_seg(folder: Path, num_cases: int = 2):
    """Write CT series and DICOM SEG made by highdicom; both cases are of one patient."""
    for number in range(num_cases):
        hu, labels = make_body(seed=600 + number)
        case = folder / f"subject-{number + 1}"
        write_series(case / "ct", hu)
        masks = np.stack([labels == 1, labels == 2], axis=-1).astype(np.uint8)
        write_seg(case / "seg.dcm", case / "ct", masks)
    return folder


def write_seg(path: Path, series: Path, masks, names=("Liver", "Spleen"), kind="BINARY"):
    """Write a DICOM SEG of a series; masks (Z, Y, X, segment), from 0 to 1 if FRACTIONAL."""
    sources = [pydicom.dcmread(each) for each in sorted(series.iterdir())]
    sources.sort(key=lambda ds: ds.ImagePositionPatient[2])
    organ = pydicom.sr.codedict.codes.SCT.Organ
    segments = [
        highdicom.seg.SegmentDescription(
            segment_number=index,
            segment_label=label,
            segmented_property_category=organ,
            segmented_property_type=organ,
            algorithm_type="MANUAL",
        )
        for index, label in enumerate(names, start=1)
    ]
    segmentation = highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=masks,
        segmentation_type=kind,
        segment_descriptions=segments,
        series_instance_uid=generate_uid(),
        series_number=2,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="Maker",
        manufacturer_model_name="Model",
        software_versions="1",
        device_serial_number="1",
    )
    segmentation.save_as(path)


def structure_set(folder, names=("liver", "spleen"), labels=None):
    """Return the structure set of the series subject/ct and of label ids 1, 2, ... (Z, Y, X)."""
    order = order_series(sorted((folder / "subject/ct").iterdir()), "subject")
    slices = Slices(
        pydicom.dcmread(order.files[0]),
        order.instance_uids,
        order.frames,
        np.diag([-1.0, -1.0, 1.0, 1.0]) @ order.geometry.own_affine,
    )
    labels = make_body()[1] if labels is None else labels
    own = order.geometry.to_own_grid(labels)
    regions = [Region(name, (9, 9, 9), own == k) for k, name in enumerate(names, start=1)]
    return make_structure_set(slices, regions, maker="model", version="1")


def save_structure_set(folder, made, name="subject/plan.dcm"):
    made.save_as(folder / name, enforce_file_format=True)
