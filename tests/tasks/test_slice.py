from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from fullscale.params import Params, load_params
from fullscale.runtime.errors import StageError
from fullscale.runtime.files import file_sha256, write_json
from fullscale.scans.cohort import (
    Case,
    image_path,
    label_path,
    read_cohort,
    write_cases,
)
from fullscale.scans.slice_store import SliceStore
from fullscale.scans.volume import write_volume
from tasks.slice import slice_cohort

ROOT = Path(__file__).parents[2]
NUM_CASES = 4


def write_scan(data: Path, name: str, seed: int, annotated=("liver", "spleen")) -> Case:
    rng = np.random.default_rng(seed)
    image = np.full((40, 36, 10), -1000, np.int16)
    image[6:34, 6:30] = rng.integers(20, 80, (28, 24, 10))
    label = np.zeros(image.shape, np.uint8)
    label[8:16, 10:20, 2:8], label[24:30, 12:20, 3:7] = 1, 2
    for folder in ("imagesTr", "labelsTr"):
        (data / folder).mkdir(parents=True, exist_ok=True)
    affine = np.diag([-8.0, -8.0, 5.0, 1.0])
    write_volume(image_path(data, name), image, affine)
    write_volume(label_path(data, name), label, affine)
    return Case(
        name,
        f"p_{name}",
        tuple(annotated),
        "test",
        image_path(data, name),
        label_path(data, name),
        file_sha256(image_path(data, name)),
        file_sha256(label_path(data, name)),
    )


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "data"
    cases = [write_scan(folder, f"c{n}", seed=n) for n in range(NUM_CASES - 1)]
    cases.append(write_scan(folder, "liver_only", seed=99, annotated=("liver",)))
    labels = {"background": 0, "liver": 1, "spleen": 2}
    write_json(folder / "dataset.json", {"name": "Test", "labels": labels})
    write_cases(folder, cases)
    return folder


@pytest.fixture(scope="module")
def content() -> dict:
    return yaml.safe_load((ROOT / "params.yaml").read_text())


def make_params(content: dict, **compute) -> Params:
    changed = {**content, "compute": {"num_workers": 1, **compute}}
    changed["slice"] = {**content["slice"], "size_px": 48, "pixel_mm": 8}
    return Params.model_validate(changed)


def tree_digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def replace_scan(data: Path, name: str) -> None:
    cases = {case.name: case for case in read_cohort(data).cases}
    cases[name] = write_scan(data, name, seed=1234)
    write_cases(data, cases.values())


def test_slice_cohort_fills_a_store_that_reads_back(data, tmp_path, content):
    summary = slice_cohort(data, tmp_path / "slices", make_params(content))
    store = SliceStore(tmp_path / "slices")
    assert summary.num_cases == NUM_CASES
    assert summary.num_slices == len(store.index) == NUM_CASES * 10
    assert summary.num_lost == {}
    assert store.organs == ("liver", "spleen")
    assert store.size_px == 48
    assert list(store.cases["case"]) == ["c0", "c1", "c2", "liver_only"]
    sliced = store.load("c1")
    assert sliced.image.shape == sliced.label.shape == (10, 48, 48)
    assert isinstance(sliced.image, np.memmap)
    assert sliced.image.dtype == np.int16
    rows = store.index[store.index["case"] == "c1"]
    counted = [(plane == 1).sum() for plane in sliced.label]
    np.testing.assert_array_equal(rows["liver"], counted)
    assert max(counted) > 0


def test_slice_cohort_leaves_unannotated_organs_empty(data, tmp_path, content):
    slice_cohort(data, tmp_path / "slices", make_params(content))
    store = SliceStore(tmp_path / "slices")
    rows = store.index[store.index["case"] == "liver_only"]
    assert rows["spleen"].isna().all()
    assert rows["liver"].notna().all()
    assert store.load("liver_only").annotated == ("liver",)
    assert dict(zip(store.cases["case"], store.cases["annotated"], strict=True)) == {
        "c0": "liver;spleen",
        "c1": "liver;spleen",
        "c2": "liver;spleen",
        "liver_only": "liver",
    }


def test_slice_cohort_gives_the_same_bytes_for_any_number_of_workers(data, tmp_path, content):
    slice_cohort(data, tmp_path / "one", make_params(content))
    slice_cohort(data, tmp_path / "two", make_params(content, num_workers=2), tmp_path / "cache")
    assert tree_digest(tmp_path / "one") == tree_digest(tmp_path / "two")


def test_slice_cohort_slices_only_the_scan_that_changed(data, tmp_path, content):
    params, cache = make_params(content), tmp_path / "cache"
    first = slice_cohort(data, tmp_path / "slices", params, cache)
    assert first.num_sliced == NUM_CASES
    before = tree_digest(tmp_path / "slices")
    assert slice_cohort(data, tmp_path / "again", params, cache).num_sliced == 0
    assert tree_digest(tmp_path / "again") == before
    replace_scan(data, "c1")
    assert slice_cohort(data, tmp_path / "slices", params, cache).num_sliced == 1
    after = tree_digest(tmp_path / "slices")
    changed = {name for name in after if after[name] != before[name]}
    assert {name.split("/")[0] for name in changed if "/" in name} == {"c1"}
    slice_cohort(data, tmp_path / "fresh", params)
    assert tree_digest(tmp_path / "fresh") == after


def test_slice_cohort_does_not_trust_a_damaged_cache(data, tmp_path, content):
    params, cache = make_params(content), tmp_path / "cache"
    slice_cohort(data, tmp_path / "slices", params, cache)
    before = tree_digest(tmp_path / "slices")
    victim = sorted(cache.glob("*/image.npy"))[0]
    content_bytes = bytearray(victim.read_bytes())
    content_bytes[-1] ^= 0xFF
    victim.unlink()
    victim.write_bytes(content_bytes)
    assert slice_cohort(data, tmp_path / "slices", params, cache).num_sliced == 1
    assert tree_digest(tmp_path / "slices") == before


@pytest.mark.parametrize("change", [{"size_px": 40}, {"window_hu": [-100, 200]}, {"pixel_mm": 9}])
def test_slice_cohort_slices_again_when_the_recipe_changes(data, tmp_path, content, change):
    cache = tmp_path / "cache"
    slice_cohort(data, tmp_path / "slices", make_params(content), cache)
    changed = make_params({**content})
    recipe = changed.slice.model_copy(update={k: _frozen(v) for k, v in change.items()})
    changed = changed.model_copy(update={"slice": recipe})
    assert slice_cohort(data, tmp_path / "slices", changed, cache).num_sliced == NUM_CASES


def _frozen(value):
    return tuple(value) if isinstance(value, list) else value


def test_slice_cohort_finishes_good_cases_and_names_every_bad_one(data, tmp_path, content):
    params, cache = make_params(content), tmp_path / "cache"
    for name in ("c0", "c2"):
        path = image_path(data, name)
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StageError, match=r"2 of 4 cases .*c0: .*checksum_differs.*c2: ") as caught:
        slice_cohort(data, tmp_path / "slices", params, cache)
    assert "c1: " not in str(caught.value)
    assert (tmp_path / "slices" / "c1" / "image.npy").is_file()
    assert not (tmp_path / "slices" / "store.json").exists()
    for name in ("c0", "c2"):
        replace_scan(data, name)
    assert slice_cohort(data, tmp_path / "slices", params, cache).num_sliced == 2


def test_slice_cohort_drops_cases_that_are_no_longer_in_the_cohort(data, tmp_path, content):
    params = make_params(content)
    slice_cohort(data, tmp_path / "slices", params)
    write_cases(data, [case for case in read_cohort(data).cases if case.name != "c2"])
    slice_cohort(data, tmp_path / "slices", params)
    assert not (tmp_path / "slices" / "c2").exists()
    assert len(SliceStore(tmp_path / "slices").cases) == NUM_CASES - 1


def test_slice_cohort_tells_the_split_what_is_for_training_only(data, tmp_path, content):
    output = tmp_path / "out"
    slice_cohort(data, output, make_params(content), tmp_path / "cache")
    assert "training_only" not in (output / "cases.csv").read_text()
    cases = read_cohort(data).cases
    write_cases(data, [replace(case, training_only=case.name == "c1") for case in cases])
    summary = slice_cohort(data, output, make_params(content), tmp_path / "cache")
    assert summary.num_sliced == 0
    table = SliceStore(output).cases.set_index("case")["training_only"]
    assert table.dtype == bool
    assert dict(table) == {"c0": False, "c1": True, "c2": False, "liver_only": False}


def test_slice_cohort_names_an_organ_without_a_label(data, tmp_path, content):
    params = make_params({**content, "organs": {"liver": [1], "pancreas": [7]}})
    with pytest.raises(StageError, match=r"organs.pancreas in params.yaml names 7, and no label"):
        slice_cohort(data, tmp_path / "slices", params)


def test_slice_cohort_finds_labels_by_name_and_stores_their_ids(data, tmp_path, content):
    params = make_params({**content, "organs": {"milt": ["spleen"], "liver": ["hepatic"]}})
    slice_cohort(data, tmp_path / "slices", params)
    assert SliceStore(tmp_path / "slices").label_ids == {"milt": (2,), "liver": (1,)}


def test_slice_cohort_refuses_a_number_that_is_another_organ(data, tmp_path, content):
    params = make_params({**content, "organs": {"spleen": [1]}})
    with pytest.raises(StageError, match="names 1, which is the label 'liver'"):
        slice_cohort(data, tmp_path / "slices", params)


def test_slice_cohort_without_cases_says_how_to_get_some(data, tmp_path, content):
    write_cases(data, [])
    with pytest.raises(StageError, match="has no case; bring scans in with `fullscale ingest"):
        slice_cohort(data, tmp_path / "slices", make_params(content))


def test_slice_cohort_counts_the_voxels_of_each_organ_outside_the_slices(data, tmp_path, content):
    for name in ("c0", "c2"):
        _label_a_corner(data, name, organ_id=2)
    params = _with_slice(make_params(content), pixel_mm=4.8)
    summary = slice_cohort(data, tmp_path / "slices", params)
    expected = {"liver": 0, "spleen": 3 * 3 * 2}
    assert summary.num_lost == {"c0": expected, "c2": expected}
    lost = SliceStore(tmp_path / "slices").cases.set_index("case")["num_lost"]
    assert lost.to_dict() == {"c0": 18, "c1": 0, "c2": 18, "liver_only": 0}


def test_slice_cohort_names_the_cases_whose_trunk_is_larger_than_a_slice(data, tmp_path, content):
    params = _with_slice(make_params(content), pixel_mm=4.0)
    found = r"c1: a trunk of \d+ x \d+ mm, but slices of 192 mm \(48 pixels of 4 mm\)"
    with pytest.raises(StageError, match=r"4 of 4 cases cannot be sliced: .*" + found) as error:
        slice_cohort(data, tmp_path / "slices", params)
    assert "enlarge slice.size_px or slice.pixel_mm" in str(error.value)


def _with_slice(params: Params, **changes) -> Params:
    return params.model_copy(update={"slice": params.slice.model_copy(update=changes)})


def _label_a_corner(data: Path, name: str, organ_id: int) -> None:
    cases = {case.name: case for case in read_cohort(data).cases}
    label = np.zeros((40, 36, 10), np.uint8)
    label[:3, :3, 2:4] = organ_id
    write_volume(label_path(data, name), label, np.diag([-8.0, -8.0, 5.0, 1.0]))
    case = cases[name]
    changed = Case(**{**vars(case), "label_sha256": file_sha256(case.label)})
    write_cases(data, [*(c for c in cases.values() if c.name != name), changed])


def test_slice_cohort_slices_one_scan_of_many_again(tmp_path, content):
    data, cache = tmp_path / "data", tmp_path / "cache"
    cases = [write_scan(data, f"c{n:03d}", seed=n) for n in range(20)]
    labels = {"background": 0, "liver": 1, "spleen": 2}
    write_json(data / "dataset.json", {"name": "Test", "labels": labels})
    write_cases(data, cases)
    params = make_params(content)
    assert slice_cohort(data, tmp_path / "slices", params, cache).num_sliced == 20
    replace_scan(data, "c012")
    assert slice_cohort(data, tmp_path / "slices", params, cache).num_sliced == 1


def test_slice_cohort_clears_what_a_killed_run_left(data, tmp_path, content):
    output, cache = tmp_path / "slices", tmp_path / "cache"
    for folder in (output / ".c0.part", output / ".gone.part", cache / ".part-x/entry"):
        folder.mkdir(parents=True)
        (folder / "image.npy").write_bytes(b"half")
    slice_cohort(data, output, make_params(content), cache)
    slice_cohort(data, tmp_path / "fresh", make_params(content))
    assert tree_digest(output) == tree_digest(tmp_path / "fresh")
    assert not list(cache.glob(".part-*"))


@pytest.mark.slow
def test_slice_cohort_killed_at_any_moment_ends_in_the_same_store(data, tmp_path, content):
    slice_cohort(data, tmp_path / "whole", make_params(content))
    (tmp_path / "params.yaml").write_text(
        yaml.safe_dump(
            {
                **content,
                "slice": {**content["slice"], "size_px": 48, "pixel_mm": 8},
                "compute": {"num_workers": 1},
            }
        )
    )
    output, num_killed = tmp_path / "artifacts/slices", 0
    for attempt in range(6):
        process = subprocess.Popen(
            [sys.executable, "-m", "tasks.slice"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
        )
        before = output.stat().st_mtime_ns if output.exists() else 0
        while process.poll() is None and (
            not output.exists() or output.stat().st_mtime_ns == before
        ):
            time.sleep(0.001)
        time.sleep(0.012 * attempt)
        if process.poll() is None:
            process.kill()
            num_killed += 1
        if process.wait() == 0:
            break
    assert num_killed >= 3
    subprocess.run(
        [sys.executable, "-m", "tasks.slice"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert tree_digest(output) == tree_digest(tmp_path / "whole")


@pytest.mark.slow
def test_slice_cohort_on_a_dask_cluster_gives_the_same_bytes(data, tmp_path, content):
    distributed = pytest.importorskip("distributed", reason="the extra dask is not installed")
    slice_cohort(data, tmp_path / "local", make_params(content))
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None
    ) as cluster:
        params = make_params(content, backend="dask", address=cluster.scheduler_address)
        slice_cohort(data, tmp_path / "dask", params)
    assert tree_digest(tmp_path / "local") == tree_digest(tmp_path / "dask")


def test_main_shows_one_line_when_data_are_missing(tmp_path):
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    load_params(tmp_path / "params.yaml")
    result = subprocess.run(
        [sys.executable, "-m", "tasks.slice"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert "dvc pull" in result.stderr
