"""Makers of folders, tables, names and cohorts with one fault each."""

from __future__ import annotations

import json
import shutil

import numpy as np
from bodies import LABELS
from check_makers import (
    RECIPE,
    cohort_of,
    ingested,
    makes,
    pair,
    rewrite,
    sliced,
    validated,
)
from cohorts import (
    write_dataset_json,
    write_ircadb,
    write_msd,
    write_nnunet,
    write_totalsegmentator,
)

from fullscale.ingestion.ingest import ingest
from fullscale.ingestion.validate import validate
from fullscale.label_names import resolve_organs
from fullscale.scans.parallel import Compute, map_cases
from fullscale.scans.slice_store import SliceStore
from fullscale.scans.slice_writer import SliceRecipe, write_tables


@makes("data_missing", "no folder")
def _(folder):
    yield cohort_of(folder / "data")
    ingest(write_nnunet(folder / "source", 1), folder / "data")


@makes("not_a_cohort", "without cases.csv")
def _(folder):
    (folder / "data").mkdir()
    write_dataset_json(folder / "data")
    yield cohort_of(folder / "data")
    ingest(write_nnunet(folder / "source", 1), folder / "data")


@makes("cohort_incomplete", "2 cases, 1 outcomes")
def _(folder):
    write_nnunet(folder / "source", 2)
    lose_one = ingested(
        folder / "source", folder / "data", progress=lambda items, *_: list(items)[:1]
    )
    yield lose_one
    yield ingested(folder / "source", folder / "data")


@makes("source_missing", "no folder")
def _(folder):
    yield validated(folder / "sorce")
    write_nnunet(folder / "source", 1)
    yield validated(folder / "source")


@makes("layout_unknown", "files *.nii.gz")
def _(folder):
    image, _ = pair(folder / "made")
    image.rename(folder / "scan.nii.gz")
    shutil.rmtree(folder / "made")
    yield
    write_nnunet(folder, 1)


@makes("dataset_json_missing", "imagesTr")
def _(folder):
    pair(folder)
    (folder / "dataset.json").unlink()
    yield
    write_dataset_json(folder)


@makes("folder_above", "layout nnunet")
def _(folder):
    pair(folder / "one/source")
    yield
    yield validated(folder / "one/source")


@makes("folder_below", "layout nnunet")
def _(folder):
    pair(folder)
    yield validated(folder / "imagesTr")
    yield validated(folder)


@makes("still_packed", "3Dircadb1.1/MASKS_DICOM.zip, 3Dircadb1.1/PATIENT_DICOM.zip")
def _(folder):
    write_ircadb(folder, 1)
    for path in list((folder / "3Dircadb1.1").iterdir()):
        shutil.make_archive(str(path), "zip", path.parent, path.name)
        shutil.rmtree(path)
    yield
    for path in list((folder / "3Dircadb1.1").iterdir()):
        shutil.unpack_archive(path, path.parent)
        path.unlink()


@makes("dataset_json", "'liver': 'one'")
def _(folder):
    pair(folder)
    write_dataset_json(folder, labels={**LABELS, "liver": "one"})
    yield
    write_dataset_json(folder)


@makes("cases_csv", "without columns case")
def _(folder):
    pair(folder)
    table = "case;patient;annotated\ncase_00;p1;liver\n"
    (folder / "cases.csv").write_text(table)
    yield
    (folder / "cases.csv").write_text(table.replace(";", ","))


@makes("label_regions", "'whole': [1, 2]")
def _(folder):
    pair(folder)
    regions = {"background": 0, "whole": [1, 2], "spleen": 2}
    write_dataset_json(folder, labels=regions)
    yield
    write_dataset_json(folder, labels=regions, regions_class_order=[1, 2])


@makes("labels_too_many", "255 labels")
def _(folder):
    pair(folder / "source")
    many = {f"organ {k}": k for k in range(3, 256)}
    write_dataset_json(folder / "source", labels=LABELS | many)
    yield ingested(folder / "source", folder / "data")
    del many["organ 255"]
    write_dataset_json(folder / "source", labels=LABELS | many)


@makes("modality", "'T1'")
def _(folder):
    pair(folder)
    write_dataset_json(folder, channel_names={"0": "T1"})
    yield
    write_dataset_json(folder, channel_names={"0": "CT"})


@makes("file_missing", "case_00.nii.gz")
def _(folder):
    _, label = pair(folder)
    label.rename(folder.with_name("moved"))
    yield
    folder.with_name("moved").rename(label)


@makes("path_outside", "'../out.nii.gz'")
def _(folder):
    write_msd(folder, 1)
    table = folder / "dataset.json"
    content = json.loads(table.read_text())
    image = content["training"][0]["image"]
    content["training"][0]["image"] = "../out.nii.gz"
    shutil.copy(folder / image, folder.parent / "out.nii.gz")
    table.write_text(json.dumps(content))
    yield
    content["training"][0]["image"] = image
    table.write_text(json.dumps(content))


@makes("file_twice", "case_00_0000.NII.GZ")
def _(folder):
    image, _ = pair(folder)
    other = image.with_name("case_00_0000.NII.GZ")
    shutil.copy(image, other)
    rewrite(image, lambda hu: hu + 1)
    yield
    other.unlink()


@makes("label_region", "whole: [whole, spleen]")
def _(folder):
    pair(folder)
    regions = {"background": 0, "whole": [1, 2], "spleen": 2}
    write_dataset_json(folder, labels=regions, regions_class_order=[1, 2])
    yield
    labels = validate(folder).labels

    def used():
        """The finding stays, and the organ has the voxels of its region."""
        assert resolve_organs({"whole": ["whole", "spleen"]}, labels) == {"whole": (1, 2)}
        return []

    yield used


@makes("label_spelling", "'Liver', which is 'liver' here")
def _(folder):
    ingest(write_nnunet(folder / "first", 1), folder / "data")
    other = write_nnunet(folder / "second", 1, prefix="other", seed=5)
    write_dataset_json(other, labels={"background": 0, "Liver": 1, "spleen": 2})
    yield ingested(other, folder / "data")


@makes("content_twice", "case_00")
def _(folder):
    pair(folder)
    for part, end in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        shutil.copy(folder / part / f"case_00{end}", folder / part / f"again{end}")
    yield
    for path in folder.glob("*/again*"):
        path.unlink()


@makes("label_not_annotated", "spleen; annotated are ['liver']")
def _(folder):
    pair(folder)
    (folder / "cases.csv").write_text("case,patient,annotated\ncase_00,p,liver\n")
    yield
    (folder / "cases.csv").write_text("case,patient,annotated\ncase_00,p,liver;spleen\n")


@makes("patient_shared", "patient p with cases case_00, case_01")
def _(folder):
    write_nnunet(folder, 2, cases_csv="case_00,p,liver;spleen\ncase_01,p,liver;spleen\n")
    yield


@makes("case_name", "'../case'")
def _(folder):
    ingest(write_nnunet(folder / "source", 1), folder / "data")
    table = folder / "data/cases.csv"
    kept = table.read_text()
    table.write_text(kept.replace("case_00", "../case", 1))
    yield cohort_of(folder / "data")
    table.write_text(kept)


@makes("file_unused", "more.nrrd")
def _(folder):
    pair(folder)
    more = folder / "imagesTr/more.nrrd"
    more.write_bytes(b"NRRD0004")
    yield
    more.rename(folder.with_name("more.nrrd"))


@makes("file_ignored", "README.txt")
def _(folder):
    pair(folder)
    (folder / "README.txt").write_text("About these scans.")
    yield


@makes("row_twice", "2 rows of case case_00 that differ")
def _(folder):
    write_nnunet(folder, 1, cases_csv="case_00,p,liver;spleen\ncase_00,q,liver;spleen\n")
    yield
    (folder / "cases.csv").write_text("case,patient,annotated\ncase_00,p,liver;spleen\n")


@makes("row_missing", "case case_01 without a row")
def _(folder):
    row = "case_00,p,liver;spleen\n"
    write_nnunet(folder, 2, cases_csv=row)
    yield
    more = "case_01,q,liver;spleen\n"
    (folder / "cases.csv").write_text(f"case,patient,annotated\n{row}{more}")


@makes("row_unused", "'case_0'")
def _(folder):
    rows = "case_00,p,liver;spleen\ncase_0,q,liver;spleen\n"
    write_nnunet(folder, 1, cases_csv=rows)
    yield
    (folder / "cases.csv").write_text("case,patient,annotated\ncase_00,p,liver;spleen\n")


@makes("name_twice", "'S0000' and 's0000'")
def _(folder):
    write_totalsegmentator(folder)
    (folder / "s0001").rename(folder / "S0000")
    yield
    (folder / "S0000").rename(folder / "s0001")


@makes("case_renamed", "'patient 1', here patient_1_")
def _(folder):
    write_nnunet(folder, 1, prefix="patient 1")
    for path in folder.glob("*Tr/*"):
        path.rename(path.with_name(path.name.replace("_00", "", 1)))
    yield


@makes("case_exists", "case_00")
def _(folder):
    ingest(write_nnunet(folder / "first", 1), folder / "data")
    other = write_nnunet(folder / "second", 1, seed=5)
    yield ingested(other, folder / "data")
    for path in other.glob("*Tr/*"):
        path.rename(path.with_name(path.name.replace("case", "other")))


@makes("annotated_unknown", "kidney")
def _(folder):
    write_nnunet(folder, 1, cases_csv="case_00,p,liver;kidney\n")
    yield
    (folder / "cases.csv").write_text("case,patient,annotated\ncase_00,p,liver;spleen\n")


@makes("no_body", "no part of the scan above 4000 HU")
def _(folder):
    ingest(write_nnunet(folder / "source", 1), folder / "data")
    high = SliceRecipe(RECIPE.organs, 40, 10.0, RECIPE.window_hu, 4000.0)
    yield sliced(folder / "data", folder / "slices", high)
    yield sliced(folder / "data", folder / "slices", RECIPE)


@makes("trunk_too_large", "slices of 160 mm")
def _(folder):
    ingest(write_nnunet(folder / "source", 1), folder / "data")
    small = SliceRecipe(RECIPE.organs, 16, 10.0, RECIPE.window_hu, -300.0)
    yield sliced(folder / "data", folder / "slices", small)
    yield sliced(folder / "data", folder / "slices", RECIPE)


@makes("checksum_differs", "case_00.nii.gz")
def _(folder):
    ingest(write_nnunet(folder / "source", 1), folder / "data")
    label = folder / "data/labelsTr/case_00.nii.gz"
    kept = label.read_bytes()
    rewrite(label, lambda ids: np.roll(ids, 1, axis=0))
    yield validated(folder / "data")
    label.write_bytes(kept)


@makes("case_unlisted", "files of other_00")
def _(folder):
    ingest(write_nnunet(folder / "source", 1), folder / "data")
    other = write_nnunet(folder / "other", 1, prefix="other", seed=5)
    for path in other.glob("*Tr/*"):
        shutil.copy(path, folder / "data" / path.relative_to(other))
    yield validated(folder / "data")
    ingest(other, folder / "data")


@makes("cluster", "no answer from a scheduler at tcp")
def _(folder):
    yield lambda: list(map_cases(str, [1, 2], Compute("dask", "tcp")))


@makes("store_missing", "store.json")
def _(folder):
    ingest(write_nnunet(folder / "source", 1), folder / "data")
    yield lambda: SliceStore(folder / "slices") and []
    sliced(folder / "data", folder / "slices", RECIPE)()
    write_tables(folder / "slices", ["case_00"], RECIPE)
