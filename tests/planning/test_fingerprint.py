import json
import os
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from bodies import make_body, save_nifti

from fullscale.planning import fingerprint
from fullscale.planning.fingerprint import (
    MAX_CASES,
    MIN_CASES,
    PERCENTILES,
    choose_sample,
    measure_cohort,
    measure_organ,
    read_fingerprint,
    write_fingerprint,
)
from fullscale.planning.fingerprint_page import PAGE, fingerprint_section, write_page
from fullscale.runtime.errors import StageError
from fullscale.scans.cohort import IGNORED_ID, Case, Cohort
from fullscale.scans.volume import read_image, read_labels, write_volume

ORGANS = {"liver": (1,), "spleen": (2,)}


@pytest.fixture(scope="module")
def reading(tiny_cohort):
    return measure_cohort(tiny_cohort, ORGANS, ["case_00", "case_07"], "abc.dir")


def test_fingerprint_holds_what_the_scans_measure(reading, tiny_cohort):
    found = reading.fingerprint
    assert (found.num_cases, found.num_patients, found.num_tested) == (8, 8, 2)
    assert [case.case for case in found.cases] == [f"case_{n:02d}" for n in range(1, 7)]
    assert found.measured == found.cases
    assert (found.annotated["liver"].num_cases, found.annotated["spleen"].num_patients) == (7, 7)
    case = found.cases[0]
    assert (case.shape_ZYX, case.spacing_mm, case.height_mm) == ((16, 40, 48), (8, 7, 7), 128)
    hu, labels = make_body(seed=1)
    has_organ = labels.any(axis=(1, 2))
    assert case.num_organ_free == np.count_nonzero(~has_organ)
    liver = case.organs["liver"]
    assert liver.volume_ml == pytest.approx(np.count_nonzero(labels == 1) * 8 * 49 / 1000, abs=0.01)
    np.testing.assert_allclose(
        liver.inside_hu, np.percentile(hu[labels == 1], PERCENTILES), atol=0.1
    )
    assert found.cases[5].organs.keys() == {"liver"}  # the spleen of case_06 was not drawn


def test_slices_that_nobody_judged_are_not_organ_free(tiny_cohort, tmp_path):
    case = tiny_cohort.cases[1]
    labels = read_labels(case.label)
    free_Z = ~labels.values_ZYX.any(axis=(1, 2))
    ids_ZYX = labels.values_ZYX.copy()
    ids_ZYX[np.flatnonzero(free_Z)[1:]] = IGNORED_ID
    write_volume(tmp_path / "label.nii.gz", labels.to_own_grid(ids_ZYX), labels.geometry.own_affine)
    cohort = replace(tiny_cohort, cases=(replace(case, label=tmp_path / "label.nii.gz"),))
    (facts,) = measure_cohort(cohort, ORGANS, [], "abc.dir").fingerprint.measured
    assert facts.num_organ_free == 1


def test_surroundings_are_soft_tissue_within_a_centimetre(tmp_path):
    hu = np.full((9, 21, 21), -1000, np.int16)
    hu[:, 3:18, 3:18] = -80  # 7 px of 2 mm on each side of the organ: the last 2 are too far
    hu[:, 4:17, 4:17] = 40
    hu[:, 10, 10] = 100
    hu[:, 10, 14] = 1200  # dense bone
    mask = np.zeros(hu.shape, bool)
    mask[:, 10, 10] = True
    scan = read_image(save_nifti(tmp_path / "a.nii.gz", hu, (2.0, 2.0, 2.0)))
    facts = measure_organ(scan, mask)
    assert (facts.num_slices, facts.volume_ml) == (9, 0.07)
    assert set(facts.inside_hu) == {100.0}
    assert set(facts.around_hu) == {40.0}


def test_test_scans_are_not_opened(tiny_cohort, tmp_path):
    cases = [
        Case(**{**vars(case), "image": tmp_path / "gone.nii.gz", "label": tmp_path / "gone.nii.gz"})
        if case.name == "case_03" else case
        for case in tiny_cohort.cases
    ]  # fmt: skip
    cohort = Cohort(tiny_cohort.root, tiny_cohort.name, tiny_cohort.labels, tuple(cases))
    found = measure_cohort(cohort, ORGANS, ["case_03"], "none").fingerprint
    assert "case_03" not in {case.case for case in found.cases}
    with pytest.raises(OSError, match="gone"):
        measure_cohort(cohort, ORGANS, ["case_04"], "none")


def test_the_same_scans_give_the_same_bytes(reading, tiny_cohort, tmp_path):
    again = measure_cohort(tiny_cohort, ORGANS, ["case_07", "case_00"], "abc.dir")
    for name, each in (("a", reading), ("b", again)):
        write_fingerprint(tmp_path / name, each.fingerprint)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_fingerprint(tmp_path / "a") == reading.fingerprint
    assert read_fingerprint(tmp_path / "none") is None


@pytest.mark.parametrize("content", ["no json", json.dumps({"cases": 3})])
def test_damaged_fingerprint_is_refused(content, tmp_path):
    (tmp_path / "fingerprint.json").write_text(content)
    with pytest.raises(StageError, match=r"is not a fingerprint .* `fullscale plan`"):
        read_fingerprint(tmp_path / "fingerprint.json")


def test_five_hundred_scans_are_read_once_and_only_a_sample_of_their_voxels(
    tiny_cohort, tmp_path, monkeypatch
):
    first, cases = tiny_cohort.cases[0], []
    for number in range(500):
        name = f"scan_{number:03d}"
        links = {kind: tmp_path / f"{kind}_{name}.nii.gz" for kind in ("image", "label")}
        for kind, path in links.items():
            os.link(getattr(first, kind), path)
        cases.append(replace(first, name=name, patient=name, **links))
    cohort = Cohort(tmp_path, "many", tiny_cohort.labels, tuple(cases))
    tested = [case.name for case in cases[::4]]
    opened = {"read_geometry": Counter(), "read_image": Counter(), "read_labels": Counter()}

    def count(name):
        function = getattr(fingerprint, name)

        def counting(path):
            opened[name][path.name] += 1
            return function(path)

        monkeypatch.setattr(fingerprint, name, counting)

    for name in opened:
        count(name)
    monkeypatch.setattr(fingerprint, "MAX_CASES", 10)
    reading = measure_cohort(cohort, ORGANS, tested, "none")
    numbers = {"read_geometry": 375, "read_image": 10, "read_labels": 10}
    assert {name: len(files) for name, files in opened.items()} == numbers
    assert {number for files in opened.values() for number in files.values()} == {1}
    # The page needs no scan again: its pictures are drawn when the voxels are read.
    assert len(reading.pictures) == 10


@pytest.mark.parametrize(
    ("num_voxels", "number"),
    [
        ([10**6] * 20, 20),
        ([10**6] * 500, MAX_CASES),
        ([512 * 512 * 300] * 500, 19),
        ([512 * 512 * 300] * 2, 2),
        ([10**9] * 50, MIN_CASES),
        ([], 0),
    ],
)
def test_sample_of_voxels_is_limited(num_voxels, number):
    places = choose_sample(num_voxels)
    assert len(places) == len(set(places)) == number
    if number > 1:
        assert (places[0], places[-1]) == (0, len(num_voxels) - 1)


def test_section_shows_tables_and_histograms(reading):
    section = fingerprint_section(reading.fingerprint, "abc.dir")
    assert "8 scans of 8 patients. Measured without the 2 test scans" in section.text[0]
    rows = {row[0]: row[1:] for table in section.tables for row in table.rows}
    assert rows["slice spacing, mm"] == ("8", "8", "8")
    assert rows["spleen"][0] == "7 scans, 7 patients"
    assert len(section.pictures) == 4
    assert section.pictures[3].alt.startswith("Histogram: Median HU of organs; median liver 110")
    assert section.notes == ()


def test_section_says_where_the_fingerprint_is_missing_or_old(reading):
    assert fingerprint_section(None, "x").notes == ("No fingerprint: run `fullscale plan`.",)
    old = fingerprint_section(reading.fingerprint, "other.dir")
    assert old.notes == ("The fingerprint is of other scans: run `fullscale plan`.",)


def test_page_has_a_picture_of_each_measured_scan_and_none_of_test_patients(reading, tmp_path):
    write_page(tmp_path, reading, "tiny")
    page = (tmp_path / PAGE).read_text()
    assert page.count("data:image/png") == 6
    assert "<figcaption>case_01</figcaption>" in page
    assert "case_00" not in page
