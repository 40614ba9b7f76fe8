from __future__ import annotations

import base64
import gzip
import json
import math

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from payloads import base64_of, nifti
from random_network import random_trained

from fullscale.prediction.segmentation import Model
from fullscale.runtime.errors import ScanError
from fullscale.serving.row_segmenter import RowSegmenter, example_rows
from fullscale.serving.upload import ScanLimits


@pytest.fixture(scope="module")
def model(tiny_params):
    return Model("organs", "3", "ab" * 32, 0.5, random_trained(tiny_params))


@pytest.fixture(scope="module")
def segmenter(model):
    return RowSegmenter(model, ScanLimits(), "cpu")


def read_mask(text):
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(text)))


def test_scan_is_answered_with_its_mask_and_statistics(segmenter):
    answer = segmenter.segment(pd.DataFrame({"scan": [base64_of(gzip.compress(nifti()))]}))
    assert list(answer.columns) == ["mask", "statistics"]
    scan, mask = nib.Nifti1Image.from_bytes(nifti()), read_mask(answer["mask"][0])
    assert mask.shape == scan.shape
    assert np.array_equal(mask.affine, scan.affine)
    assert mask.get_data_dtype() == np.uint8
    statistics = json.loads(answer["statistics"][0])
    assert statistics["input"] == "row 0"
    assert statistics["model"] == {"name": "organs", "version": "3", "weights_sha256": "ab" * 32}
    voxels = np.asarray(mask.dataobj)
    for organ, label_id in (("liver", 1), ("spleen", 2)):
        found = statistics["organs"][organ]
        assert found["label"] == label_id
        assert found["volume_ml"] == pytest.approx((voxels == label_id).sum() * 8 * 7 * 7 / 1000)
    assert voxels.any()


def test_rows_may_name_files(model, tmp_path):
    (tmp_path / "a.nii").write_bytes(nifti())
    segmenter = RowSegmenter(model, ScanLimits(tmp_path), "cpu")
    text = base64_of(nifti())
    rows = pd.DataFrame({"scan": [None, text], "path": ["a.nii", math.nan]})
    answer = segmenter.segment(rows)
    assert answer["mask"][0] == answer["mask"][1]
    assert json.loads(answer["statistics"][0])["input"] == "a.nii"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"scan": None}, "neither scan nor path"),
        ({"scan": None, "path": math.nan}, "neither scan nor path"),
        ({"scan": "QQ==", "path": "a.nii"}, "both scan and path"),
        ({"other": "QQ=="}, "neither scan nor path"),
        ({"scan": "no!"}, "text that is not base64"),
        ({"path": "a.nii"}, "a path; wanted base64"),
        ({"scan": base64_of(nifti()[:-500])}, "the scan: ends after"),
        ({"scan": base64_of(nifti(np.full((16, 40, 48), -1000, np.int16)))}, "body"),
    ],
)
def test_bad_row_is_named(segmenter, row, reason):
    rows = pd.DataFrame([{"scan": base64_of(nifti())}, row])
    with pytest.raises(ScanError, match=rf"found row 1: .*{reason}"):
        segmenter.segment(rows)


def test_no_rows_have_no_answers(segmenter):
    answer = segmenter.segment(pd.DataFrame({"scan": []}))
    assert list(answer.columns) == ["mask", "statistics"]
    assert len(answer) == 0


def test_example_is_small_and_can_be_segmented(segmenter):
    rows = example_rows()
    assert len(rows["scan"][0]) < 5000
    assert example_rows().equals(rows)
    statistics = json.loads(segmenter.segment(rows)["statistics"][0])
    assert statistics["shape"] == [48, 48, 32]
