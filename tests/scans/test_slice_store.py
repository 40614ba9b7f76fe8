from __future__ import annotations

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from cohorts import write_nnunet

from fullscale.ingestion.ingest import ingest
from fullscale.runtime.errors import ScanError
from fullscale.runtime.files import file_sha256
from fullscale.scans.cohort import IGNORED_ID, read_cohort
from fullscale.scans.slice_store import SliceStore
from fullscale.scans.slice_writer import SliceRecipe, slices_key, write_case, write_tables

RECIPE = SliceRecipe({"liver": (1,), "spleen": (2,)}, 40, 10.0, (-160.0, 240.0), -300.0)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    ingest(write_nnunet(folder / "in", 2), folder / "data")
    return read_cohort(folder / "data")


@pytest.fixture
def store(cohort, tmp_path):
    for case in cohort.cases:
        write_case(tmp_path, case, ("liver", "spleen"), RECIPE)
    write_tables(tmp_path, [case.name for case in cohort.cases], RECIPE)
    return SliceStore(tmp_path)


def test_store_says_what_it_was_made_with(store):
    assert store.organs == ("liver", "spleen")
    assert store.window_hu == (-160.0, 240.0)
    assert store.size_px == 40
    assert list(store.index.columns) == ["case", "patient", "z", "liver", "spleen"]
    assert store.index["liver"].dtype == float


def test_store_loads_a_case_with_its_way_back(store, cohort):
    sliced = store.load("case_01")
    assert sliced.patient == "case_01"
    assert sliced.image.shape == (16, 40, 40)
    assert sliced.image.min() >= -160
    assert sliced.image.max() <= 240
    assert sliced.grid.shape_ZYX == (16, 40, 48)
    assert sliced.num_lost == {"liver": 0, "spleen": 0}
    assert not sliced.image.flags.writeable
    about = json.loads((store.root / "case_01/case.json").read_text())
    assert about["image_sha256"] == cohort.cases[1].image_sha256


def test_store_counts_organs_beside_what_nobody_judged(cohort, tmp_path):
    case = cohort.cases[0]
    drawn = nib.load(case.label)
    values = np.asarray(drawn.dataobj).copy()
    values[..., ::2] = IGNORED_ID
    path = tmp_path / "label.nii.gz"
    nib.save(nib.Nifti1Image(values, drawn.affine), path)
    sparse = replace(case, name="sparse", label=path, label_sha256=file_sha256(path))
    for each in (case, sparse):
        write_case(tmp_path / "s", each, ("liver", "spleen"), RECIPE)
    write_tables(tmp_path / "s", [case.name, "sparse"], RECIPE)
    store = SliceStore(tmp_path / "s")
    index = store.index.set_index(["case", "z"])
    whole, part = index.loc[case.name], index.loc["sparse"]
    label_ZHW = store.load("sparse").label
    judged_Z = (label_ZHW != IGNORED_ID).all(axis=(1, 2))
    assert 0 < judged_Z.sum() < len(judged_Z)
    pd.testing.assert_frame_equal(whole[judged_Z], part[judged_Z])
    assert not part.loc[~judged_Z, ["liver", "spleen"]].to_numpy().any()
    assert set(np.unique(label_ZHW[~judged_Z])) <= {0, IGNORED_ID}  # 0 is beyond the scan


def test_store_of_an_unknown_case_is_refused(store):
    with pytest.raises(ScanError, match=r"no case '\.\./x'"):
        store.load("../x")


@pytest.mark.parametrize("name", ["store.json", "index.csv", "cases.csv"])
def test_store_without_a_table_says_how_to_make_it(store, name):
    (store.root / name).unlink()
    with pytest.raises(ScanError, match=rf"no file .*{name}; .*dvc repro slice"):
        SliceStore(store.root)


def test_store_of_another_version_is_refused(store):
    path = store.root / "store.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 0}))
    with pytest.raises(ScanError, match="of version 0, not 3"):
        SliceStore(store.root)


def test_write_case_leaves_no_half_folder_behind(cohort, tmp_path):
    case = replace(cohort.cases[0], label=tmp_path / "absent.nii.gz")
    with pytest.raises(ScanError, match="file_missing"):
        write_case(tmp_path / "s", case, ("liver",), RECIPE)
    write_case(tmp_path / "s", cohort.cases[0], ("liver",), RECIPE)
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["case_00"]


def test_write_case_refuses_a_file_that_is_not_the_one_ingested(cohort, tmp_path):
    case = replace(cohort.cases[0], image_sha256="0" * 64)
    with pytest.raises(ScanError, match=r"checksum_differs.*not 000000000000"):
        write_case(tmp_path, case, ("liver",), RECIPE)


@pytest.mark.parametrize(
    "change",
    [
        {"size_px": 41},
        {"window_hu": (-160.0, 241.0)},
        {"organs": {"spleen": (2,), "liver": (1,)}},
        {"organs": {"liver": (1, 2)}},
        {"body_threshold_hu": -200.0},
        {"pixel_mm": 11.0},
    ],
)
def test_slices_key_depends_on_all_of_the_recipe(cohort, change):
    case = cohort.cases[0]
    key = slices_key(case, ("liver",), RECIPE)
    assert key == slices_key(case, ("liver",), replace(RECIPE))
    assert key != slices_key(case, ("liver",), replace(RECIPE, **change))


@pytest.mark.parametrize("name", ["name", "patient", "image_sha256", "label_sha256"])
def test_slices_key_depends_on_all_of_the_case(cohort, name):
    case = cohort.cases[0]
    changed = replace(case, **{name: "other"})
    assert slices_key(case, ("liver",), RECIPE) != slices_key(changed, ("liver",), RECIPE)
    assert slices_key(case, ("liver",), RECIPE) != slices_key(case, (), RECIPE)


def test_label_pixels_in_the_index_are_those_of_the_arrays(store):
    for case in ("case_00", "case_01"):
        label = np.asarray(store.load(case).label)
        rows = store.index[store.index["case"] == case]
        for number, organ in enumerate(store.organs, start=1):
            np.testing.assert_array_equal(rows[organ], (label == number).sum(axis=(1, 2)))
        assert list(rows["z"]) == list(range(len(label)))
