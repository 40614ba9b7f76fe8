from __future__ import annotations

import json
from dataclasses import replace

import pytest
from cohorts import write_nnunet

from fullscale.ingestion.ingest import ingest
from fullscale.runtime.errors import ScanError
from fullscale.scans.cohort import (
    check_case_name,
    parse_labels,
    read_cohort,
    read_json,
    split_names,
    write_cases,
)


@pytest.fixture
def data(tmp_path):
    ingest(write_nnunet(tmp_path / "in", 3), tmp_path / "data")
    return tmp_path / "data"


def test_read_cohort_gives_cases_by_name(data):
    cohort = read_cohort(data)
    assert cohort.name == "Made"
    assert [case.name for case in cohort.cases] == ["case_00", "case_01", "case_02"]
    case = cohort.cases[0]
    assert case.image == data / "imagesTr/case_00_0000.nii.gz"
    assert case.label == data / "labelsTr/case_00.nii.gz"
    assert len(case.image_sha256) == len(case.label_sha256) == 64
    assert case.annotated == ("liver", "spleen")
    assert case.source == "nnunet:Made"


def test_write_cases_round_trips_in_any_order(data):
    before = (data / "cases.csv").read_bytes()
    cases = read_cohort(data).cases
    write_cases(data, reversed(cases))
    assert (data / "cases.csv").read_bytes() == before
    assert read_cohort(data).cases == cases


def test_read_cohort_without_a_folder_says_dvc_pull(tmp_path):
    with pytest.raises(ScanError, match=r"data_missing: found no folder .*; run `dvc pull data"):
        read_cohort(tmp_path / "data")


@pytest.mark.parametrize("name", ["dataset.json", "cases.csv"])
def test_read_cohort_without_a_table_names_it(data, name):
    (data / name).unlink()
    with pytest.raises(ScanError, match=f"not_a_cohort: found .* without {name}"):
        read_cohort(data)


@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr"])
def test_read_cohort_without_a_file_names_case_and_file(data, folder):
    path = next(iter((data / folder).glob("case_01*")))
    path.unlink()
    with pytest.raises(ScanError, match=f"file_missing: found case case_01 .*{path.name}"):
        read_cohort(data)


def _change_table(data, old, new):
    path = data / "cases.csv"
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("case_01", "../../etc/passwd", "case_name"),
        ("case_01", "case_00", "not_a_cohort"),
        ("liver;spleen", "liver;pancreas", "annotated_unknown"),
        ("liver;spleen", "background", "annotated_unknown"),
        ("image_sha256", "image", "cases_csv"),
    ],
)
def test_read_cohort_with_a_contradicting_table_is_refused(data, old, new, code):
    _change_table(data, old, new)
    with pytest.raises(ScanError) as caught:
        read_cohort(data)
    assert caught.value.code == code


def test_read_cohort_of_an_older_table_without_later_columns(data):
    lines = (data / "cases.csv").read_text().splitlines()
    short = [",".join(line.split(",")[:6]) for line in lines]
    (data / "cases.csv").write_text("\n".join(short) + "\n")
    assert [case.source_sha256 for case in read_cohort(data).cases] == [""] * 3


def test_column_training_only_is_there_when_a_case_needs_it(data):
    before = (data / "cases.csv").read_bytes()
    cases = list(read_cohort(data).cases)
    assert not any(case.training_only for case in cases)
    cases[1] = replace(cases[1], training_only=True)
    write_cases(data, cases)
    assert [case.training_only for case in read_cohort(data).cases] == [False, True, False]
    header, *rows = (data / "cases.csv").read_text().splitlines()
    assert header.endswith(",voxels_sha256,training_only,slice_digests")
    assert [row.split(",")[-2] for row in rows] == ["false", "true", "false"]
    write_cases(data, [replace(case, training_only=False) for case in cases])
    assert (data / "cases.csv").read_bytes() == before


def test_column_training_only_with_another_word_is_refused(data):
    cases = read_cohort(data).cases
    write_cases(data, [replace(case, training_only=True) for case in cases])
    _change_table(data, ",true", ",yes")
    with pytest.raises(ScanError, match=r"training_only 'yes' for case_00, not true or false"):
        read_cohort(data)


@pytest.mark.parametrize(
    ("annotated", "expected"),
    [
        (("liver", "tumour"), ("liver",)),
        (("liver",), ("liver",)),
        (("tumour",), ()),
        (("spleen",), ("spleen",)),
        ((), ()),
    ],
)
def test_annotated_organs_go_by_the_first_label_id(data, annotated, expected):
    cohort = read_cohort(data)
    cohort = replace(cohort, labels={"background": 0, "liver": 1, "tumour": 2, "spleen": 3})
    case = replace(cohort.cases[0], annotated=annotated)
    assert cohort.annotated_organs(case, {"liver": (1, 2), "spleen": (3,)}) == expected


@pytest.mark.parametrize(
    ("found", "labels"),
    [
        ({"background": 0, "liver": 1}, {"background": 0, "liver": 1}),
        ({"spleen": 2, "liver": 1}, {"background": 0, "liver": 1, "spleen": 2}),
        ({"0": "background", "1": "liver"}, {"background": 0, "liver": 1}),
        ({"bg": 0, "liver": "3"}, {"background": 0, "liver": 3}),
    ],
)
def test_parse_labels_reads_both_ways_round(tmp_path, found, labels):
    assert parse_labels(tmp_path, {"labels": found}) == labels


def test_read_json_of_a_list_says_what_it_is(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([1]))
    with pytest.raises(ScanError, match=r"a\.json holding a list"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["a", "A-1_b", "0" * 64])
def test_check_case_name_accepts(name):
    assert check_case_name(name) == name


def test_split_names_drops_blanks():
    assert split_names(" liver; ;spleen;") == ("liver", "spleen")
