from __future__ import annotations

import io
import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from bodies import LABELS, lps_affine, make_body, save_nifti, turn
from cohorts import ORIENTATIONS, SPACING_MM, write_chaos, write_dataset_json, write_nnunet
from PIL import Image

from fullscale.ingestion.html_report import render_html
from fullscale.ingestion.ingest import ingest
from fullscale.ingestion.validate import (
    COLOURS,
    HEADERS,
    THUMBNAIL_SIZE_PX,
    draw_thumbnail,
    validate,
)
from fullscale.runtime.errors import ScanError
from fullscale.scans.checks import CHECKS, Finding
from fullscale.scans.cohort import image_path
from fullscale.scans.geometry import Geometry
from fullscale.scans.volume import Volume


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three sound cases, one unreadable, one with a warning."""
    folder = write_nnunet(tmp_path_factory.mktemp("in"), 4)
    image = folder / "imagesTr/case_01_0000.nii.gz"
    image.write_bytes(image.read_bytes()[:-30])
    _, labels = make_body(seed=3)
    save_nifti(folder / "labelsTr/case_03.nii.gz", labels * 0, SPACING_MM, "PSR")
    return folder


@pytest.fixture(scope="module")
def report(folder):
    return validate(folder, with_thumbnails=True)


def test_validate_gives_one_row_per_case_with_a_verdict(report):
    assert [(row.case, row.verdict) for row in report.rows] == [
        ("case_00", "good"),
        ("case_01", "refused"),
        ("case_02", "good"),
        ("case_03", "warning"),
    ]
    assert report.num_refused == 1
    assert [f.code for f in report.rows[1].findings] == ["unreadable"]
    assert [f.code for f in report.rows[3].findings] == ["label_empty"]


def test_validate_cells_fit_the_headers(report):
    for row in report.rows:
        assert len(row.to_cells()) == len(HEADERS)
    cells = dict(zip(HEADERS, report.rows[2].to_cells(), strict=True))
    assert cells["size (Z Y X)"] == "16 x 40 x 48"
    assert cells["spacing mm"] == "8 7 7"
    assert cells["axes"] == "LAS"
    assert cells["organs ml"].startswith("liver ")


def test_validate_writes_nothing(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    validate(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.slow
def test_validate_gives_the_same_for_any_number_of_workers(folder, report):
    assert validate(folder, with_thumbnails=True, num_workers=2) == report


def test_validate_to_json_holds_findings_and_facts(report):
    content = json.loads(json.dumps(report.to_json()))
    assert content["num_cases"] == 4
    assert content["num_refused"] == 1
    by_case = {case["case"]: case for case in content["cases"]}
    assert by_case["case_01"]["facts"] is None
    assert by_case["case_01"]["findings"][0]["cure"] == CHECKS["unreadable"].cure
    assert by_case["case_00"]["facts"]["spacing_mm"] == pytest.approx(SPACING_MM)


def test_validate_agrees_with_ingest(folder, report, tmp_path):
    taken = ingest(folder, tmp_path / "data")
    refused = [row.case for row in report.rows if row.verdict == "refused"]
    assert refused == [finding.case for finding in taken.refused]
    assert taken.accepted == [row.case for row in report.rows if row.verdict != "refused"]


def test_validate_compares_cases(tmp_path):
    folder = write_nnunet(
        tmp_path, 2, cases_csv="case_00,p1,liver;spleen\ncase_01,p1,liver;spleen\n"
    )
    hu, labels = make_body(seed=0)
    save_nifti(folder / "imagesTr/twin_0000.nii.gz", hu, SPACING_MM, "SAL")
    save_nifti(folder / "labelsTr/twin.nii.gz", labels, SPACING_MM, "SAL")
    rows = {row.case: row for row in validate(folder).rows}
    assert [f.code for f in rows["twin"].findings] == ["row_missing", "content_twice"]
    assert [f.code for f in rows["case_01"].findings] == ["patient_shared"]


def test_validate_of_the_cohort_tries_its_checksums(tmp_path):
    ingest(write_nnunet(tmp_path / "in", 3), tmp_path / "data")
    data = tmp_path / "data"
    assert [row.verdict for row in validate(data).rows] == ["good"] * 3
    first, second = (image_path(data, name) for name in ("case_00", "case_01"))
    hu, _ = make_body(seed=77)
    save_nifti(first, hu, SPACING_MM, "LPS")
    extra = data / "imagesTr/new_0000.nii.gz"
    hu, labels = make_body(seed=78)
    save_nifti(extra, hu, SPACING_MM)
    save_nifti(data / "labelsTr/new.nii.gz", labels, SPACING_MM)
    rows = {row.case: row for row in validate(data).rows}
    assert "checksum_differs" in [f.code for f in rows["case_00"].findings]
    assert rows["case_01"].verdict == "good"
    assert [f.code for f in rows["new"].findings] == ["case_unlisted"]
    assert second.is_file()


def test_validate_names_what_it_does_not_read(tmp_path):
    folder = write_nnunet(tmp_path, 1)
    (folder / "imagesTr/more_0000.nrrd").write_bytes(b"NRRD0004")
    report = validate(folder)
    assert [row.verdict for row in report.rows] == ["good"]
    (finding,) = report.to_json()["findings"]
    assert (finding["case"], finding["code"]) == ("imagesTr", "file_unused")
    assert "more_0000.nrrd" in render_html(report)


def test_validate_of_an_unknown_folder_is_refused(tmp_path):
    with pytest.raises(ScanError, match="layout_unknown"):
        validate(tmp_path)


def test_validate_of_dicom_lists_private_fields(tmp_path):
    rows = validate(write_chaos(tmp_path)).rows
    assert all(row.verdict == "good" for row in rows)
    assert all("PatientName" in row.findings[0].found for row in rows)


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href")]


def test_html_shows_every_case_and_loads_nothing(report):
    page = render_html(report)
    parsed = Links()
    parsed.feed(page)
    assert len([link for link in parsed.links if link.startswith("data:image/png")]) == 3
    assert all(link.startswith("data:") for link in parsed.links)
    assert "script" not in parsed.tags
    for row in report.rows:
        assert row.case in page
    assert CHECKS["unreadable"].title in page
    assert "2 good" in page


def test_html_escapes_what_comes_from_files(report):
    evil = Finding.from_check("<script>x</script>", "unreadable", "<img src=http://x>")
    row = replace(report.rows[0], case="<script>x</script>", findings=(evil,))
    changed = replace(report, rows=(row,), labels={"<b>": 1}, folder="<i>")
    parsed = Links()
    parsed.feed(render_html(changed))
    assert "script" not in parsed.tags
    assert "i" not in parsed.tags
    assert not any("http" in link for link in parsed.links)


def test_thumbnail_has_true_proportions_and_outlines():
    spacing_mm = (5.0, 2.0, 1.0)
    hu = np.full((9, 50, 80), 40, np.int16)
    labels = np.zeros(hu.shape, np.uint8)
    labels[6, 10:30, 20:60] = 1
    own, affine = turn(hu, lps_affine(hu.shape, spacing_mm), "LPS")
    geometry = Geometry(own.shape, affine)
    picture = Image.open(io.BytesIO(draw_thumbnail(Volume(hu, geometry), labels)))
    assert picture.size == (round(THUMBNAIL_SIZE_PX * 80 / 100), THUMBNAIL_SIZE_PX)
    pixels = np.asarray(picture)
    red = (pixels == COLOURS[0]).all(axis=-1)
    assert 0 < red.sum() < 0.2 * red.size
    grey = round((40 + 160) / 400 * 255)
    assert abs(int(pixels[THUMBNAIL_SIZE_PX // 2 - 20, 80, 0]) - grey) <= 1


def test_picture_leaves_out_what_nobody_judged(tmp_path):
    source = write_nnunet(tmp_path, 2)
    write_dataset_json(source, labels={**LABELS, "ignore": 3})
    _, labels = make_body(seed=1)
    ignored = np.where((labels == 0) & (np.arange(16) % 2 == 0)[:, None, None], 3, labels)
    path = source / "labelsTr/case_01.nii.gz"
    before = validate(source, with_thumbnails=True).rows[1]
    save_nifti(path, ignored.astype(np.uint8), SPACING_MM, ORIENTATIONS[1])
    after = validate(source, with_thumbnails=True).rows[1]
    assert [finding.code for finding in after.findings] == ["label_ignored"]
    assert after.thumbnail == before.thumbnail
