from __future__ import annotations

import gzip
import tracemalloc

import numpy as np
import pytest
from bodies import make_body
from payloads import base64_of, bomb, claiming, nifti

from fullscale.runtime.errors import ScanError
from fullscale.scans.volume import read_image
from fullscale.serving.upload import MAX_VOXELS, ScanLimits, unpack_file, unpack_text


@pytest.fixture
def target(tmp_path):
    return tmp_path / "target.nii"


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_scan_is_unpacked_as_it_was(target, pack):
    unpack_text(base64_of(pack(nifti())), target, ScanLimits())
    assert target.read_bytes() == nifti()
    assert np.array_equal(read_image(target).values_ZYX, make_body()[0])


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_file_below_the_root_is_unpacked(tmp_path, target, pack):
    root = tmp_path / "scans"
    (root / "deep").mkdir(parents=True)
    (root / "deep/scan").write_bytes(pack(nifti()))
    for path in ("deep/scan", "deep/../deep/scan", str(root / "deep/scan")):
        unpack_file(path, target, ScanLimits(root))
        assert target.read_bytes() == nifti()
        target.unlink()


@pytest.mark.parametrize(
    "path", ["../secret.nii", "/etc/passwd", "link.nii", "loop", "none.nii", "", ".", "a\0b",
             "x" * 5000, 7, None]
)  # fmt: skip
def test_path_out_of_the_root_is_refused_alike_whether_it_exists_or_not(tmp_path, target, path):
    root = tmp_path / "scans"
    root.mkdir()
    (tmp_path / "secret.nii").write_bytes(nifti())
    (root / "link.nii").symlink_to(tmp_path / "secret.nii")
    (root / "loop").symlink_to(root / "loop")
    with pytest.raises(ScanError, match="found a path to no file that may be read here"):
        unpack_file(path, target, ScanLimits(root))
    assert not target.exists()


def test_no_path_is_read_without_a_root(target):
    with pytest.raises(ScanError, match="this server reads no files; send the scan itself"):
        unpack_file("scan.nii", target, ScanLimits())


@pytest.mark.parametrize("text", ["not base64!", "QQ=", "QQ==\n", "é", 17, None, ["QQ=="], b"QQ=="])
def test_what_is_no_base64_is_refused(target, text):
    with pytest.raises(ScanError, match="not_base64: found"):
        unpack_text(text, target, ScanLimits())


@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"text that is no scan" * 99, gzip.compress(b""), bomb(1 << 20)],
    ids=["empty", "one byte", "text", "empty gzip", "zeros"],
)
def test_what_has_no_nifti_header_is_refused(target, content):
    with pytest.raises(ScanError, match="unreadable: found no NIfTI header"):
        unpack_text(base64_of(content), target, ScanLimits())


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize(
    ("shape", "bits"), [((1000, 1000, 1000), 16), ((32767,) * 3, 16), ((512, 512, 700), 64)]
)
def test_header_that_claims_too_much_is_refused_before_memory_is_taken(target, shape, bits, pack):
    text = base64_of(pack(claiming(shape, bits=bits)))
    tracemalloc.start()
    try:
        with pytest.raises(ScanError, match=r"too_large: found a header of .* voxels in .* bytes"):
            unpack_text(text, target, ScanLimits())
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_what_is_behind_the_voxels_is_not_unpacked(target):
    content = nifti() + bytes(64 << 20)
    with pytest.raises(ScanError, match=r"too_large: found more than the .* bytes of its own"):
        unpack_text(base64_of(gzip.compress(content)), target, ScanLimits())
    assert target.stat().st_size < 6 << 20


@pytest.mark.parametrize("end", [12, 200, 5000, -9, -1])
def test_gzip_that_ends_early_is_refused_by_someone(target, end):
    text = base64_of(gzip.compress(nifti())[:end])

    def read():
        unpack_text(text, target, ScanLimits())
        read_image(target)

    with pytest.raises(ScanError, match="unreadable"):
        read()


def test_gzip_inside_gzip_is_refused_for_the_inner_one_has_no_limit(target):
    text = base64_of(gzip.compress(gzip.compress(nifti())))
    with pytest.raises(ScanError, match="found gzip inside gzip"):
        unpack_text(text, target, ScanLimits())


def test_limits_are_set_by_the_environment(tmp_path, monkeypatch, target):
    monkeypatch.delenv("FULLSCALE_SCAN_ROOT", raising=False)
    assert ScanLimits.from_environment() == ScanLimits(None, MAX_VOXELS)
    monkeypatch.setenv("FULLSCALE_SCAN_ROOT", str(tmp_path))
    monkeypatch.setenv("FULLSCALE_MAX_VOXELS", "1000")
    assert ScanLimits.from_environment() == ScanLimits(tmp_path, 1000)
    with pytest.raises(ScanError, match="at most 1,000 voxels in 4,000 bytes; cut the scan, or"):
        unpack_text(base64_of(nifti()), target, ScanLimits.from_environment())


@pytest.mark.parametrize(
    ("variable", "value"),
    [("SCAN_ROOT", "nowhere"), ("MAX_VOXELS", "0"), ("MAX_VOXELS", "-1"), ("MAX_VOXELS", "many")],
)
def test_setting_that_cannot_be_is_named(monkeypatch, variable, value):
    monkeypatch.setenv(f"FULLSCALE_{variable}", value)
    with pytest.raises(ScanError, match=f"found FULLSCALE_{variable}={value}; wanted a"):
        ScanLimits.from_environment()
