"""Random damage to valid pairs: each pair is accepted intact or refused with a code."""

from __future__ import annotations

import gzip
import shutil
import struct
from collections import Counter

import nibabel as nib
import numpy as np
import pytest
from bodies import make_body, save_nifti
from cohorts import (
    ORIENTATIONS,
    write_chaos,
    write_dataset_json,
    write_dicom_seg,
    write_ircadb,
)

from fullscale.ingestion.cohort_writer import IngestOptions
from fullscale.ingestion.ingest import ingest
from fullscale.scans.checks import CHECKS
from fullscale.scans.cohort import read_cohort

NUM_CORRUPTIONS = 300
SHAPE_ZYX, SPACING_MM = (10, 24, 28), (10.0, 9.0, 9.0)


def flip_bytes(content: bytes, rng) -> bytes:
    changed = bytearray(content)
    for place in rng.integers(0, len(changed), rng.integers(1, 6)):
        changed[place] ^= int(rng.integers(1, 256))
    return bytes(changed)


def truncate(content: bytes, rng) -> bytes:
    return content[: rng.integers(0, len(content))]


def append(content: bytes, rng) -> bytes:
    return content + rng.bytes(int(rng.integers(1, 200)))


def swap_blocks(content: bytes, rng) -> bytes:
    first, second, third = sorted(rng.integers(0, len(content), 3))
    return content[:first] + content[second:third] + content[first:second] + content[third:]


def flip_header(content: bytes, rng) -> bytes:
    plain = bytearray(gzip.decompress(content))
    for place in rng.integers(0, 352, rng.integers(1, 4)):
        plain[place] = int(rng.integers(0, 256))
    return gzip.compress(bytes(plain), 1)


def flip_voxels(content: bytes, rng) -> bytes:
    plain = bytearray(gzip.decompress(content))
    for place in rng.integers(352, len(plain), rng.integers(1, 6)):
        plain[place] = int(rng.integers(0, 256))
    return gzip.compress(bytes(plain), 1)


def cut_voxels(content: bytes, rng) -> bytes:
    plain = gzip.decompress(content)
    return gzip.compress(plain[: rng.integers(0, len(plain))], 1)


def odd_number(content: bytes, rng) -> bytes:
    """Set a float field of the header to NaN, Inf, zero, a huge or a negative value."""
    plain = bytearray(gzip.decompress(content))
    place = int(rng.choice([76, 80, 84, 88, 112, 116, 256, 260, 264, 280, 300, 324]))
    value = float(rng.choice([np.nan, np.inf, 0.0, 1e30, -3.0, 1e-9]))
    plain[place : place + 4] = struct.pack("<f", value)
    return gzip.compress(bytes(plain), 1)


def odd_dimension(content: bytes, rng) -> bytes:
    plain = bytearray(gzip.decompress(content))
    place = 40 + 2 * int(rng.integers(0, 6))
    plain[place : place + 2] = struct.pack("<h", int(rng.choice([-1, 0, 1, 2, 7, 32767])))
    return gzip.compress(bytes(plain), 1)


def odd_type(content: bytes, rng) -> bytes:
    plain = bytearray(gzip.decompress(content))
    code = int(rng.choice([0, 1, 2, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1536, 1792, 2304]))
    plain[70:72] = struct.pack("<h", code)
    return gzip.compress(bytes(plain), 1)


DAMAGES = (
    flip_bytes,
    truncate,
    append,
    swap_blocks,
    flip_header,
    flip_voxels,
    cut_voxels,
    odd_number,
    odd_dimension,
    odd_type,
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    """A folder of damaged pairs, and the report of their ingest."""
    folder = tmp_path_factory.mktemp("fuzz")
    rng = np.random.default_rng(20240229)
    for number in range(NUM_CORRUPTIONS):
        hu, labels = make_body(SHAPE_ZYX, SPACING_MM, seed=number)
        codes = ORIENTATIONS[number % len(ORIENTATIONS)]
        pair = (
            save_nifti(folder / f"in/imagesTr/c{number:03d}_0000.nii.gz", hu, SPACING_MM, codes),
            save_nifti(folder / f"in/labelsTr/c{number:03d}.nii.gz", labels, SPACING_MM, codes),
        )
        damage = DAMAGES[number % len(DAMAGES)]
        victim = pair[int(rng.integers(0, 2))]
        victim.write_bytes(damage(victim.read_bytes(), rng))
    write_dataset_json(folder / "in")
    return folder, ingest(folder / "in", folder / "data")


def test_every_damaged_pair_is_accepted_or_refused_with_a_code(fuzzed):
    _, report = fuzzed
    assert len(report.accepted) + len(report.refused) == NUM_CORRUPTIONS
    assert {finding.code for finding in report.refused} <= set(CHECKS)
    for finding in report.refused:
        assert finding.found
        assert "\n" not in str(finding)


def test_damage_is_of_many_kinds_and_not_always_fatal(fuzzed):
    _, report = fuzzed
    codes = Counter(finding.code for finding in report.refused)
    assert len(codes) >= 8, codes
    assert codes["unreadable"] > 60
    assert len(report.accepted) > 30


def test_accepted_pairs_are_what_an_independent_reader_sees(fuzzed):
    folder, report = fuzzed
    cases = {case.name: case for case in read_cohort(folder / "data").cases}
    assert set(cases) == set(report.accepted)
    for name, case in cases.items():
        for ours, theirs in (
            (case.image, folder / f"in/imagesTr/{name}_0000.nii.gz"),
            (case.label, folder / f"in/labelsTr/{name}.nii.gz"),
        ):
            written, given = nib.load(ours), nib.load(theirs)
            expected = given.get_fdata()
            np.testing.assert_allclose(
                written.get_fdata(), expected.reshape(expected.shape[:3]), rtol=1e-5, atol=2e-3
            )
            np.testing.assert_allclose(written.affine, given.affine, atol=0.5)


def test_nothing_half_written_is_left(fuzzed):
    folder, report = fuzzed
    files = {path.name for path in (folder / "data").rglob("*") if path.is_file()}
    expected = {"cases.csv", "dataset.json"}
    expected |= {f"{name}_0000.nii.gz" for name in report.accepted}
    expected |= {f"{name}.nii.gz" for name in report.accepted}
    assert files == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "write"),
    [("ircadb", write_ircadb), ("chaos", write_chaos), ("dicom-seg", write_dicom_seg)],
)
def test_damaged_dicom_never_crashes_and_nothing_disappears(tmp_path, layout, write):
    rng = np.random.default_rng(7)
    write(tmp_path / "sound", 1)
    for number in range(25):
        source = tmp_path / f"in{number}"
        shutil.copytree(tmp_path / "sound", source)
        files = sorted(path for path in source.rglob("*") if path.is_file())
        segmentations = [path for path in files if path.name == "seg.dcm"]
        victim = (segmentations or files)[0] if number % 5 == 0 else rng.choice(files)
        damage = (flip_bytes, truncate, append, swap_blocks)[number % 4]
        victim.write_bytes(damage(victim.read_bytes(), rng))
        report = ingest(source, tmp_path / f"data{number}/data", IngestOptions(layout=layout))
        assert report.accepted or report.refused
        assert {finding.code for finding in report.refused} <= set(CHECKS)
        shutil.rmtree(source)
