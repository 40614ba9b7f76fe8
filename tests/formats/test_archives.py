from __future__ import annotations

import zipfile

import pytest

from fullscale.formats.archives import open_source
from fullscale.runtime.errors import StageError


def test_a_folder_is_given_as_it_is(tmp_path):
    with open_source(tmp_path) as folder:
        assert folder == tmp_path


@pytest.mark.parametrize("top", ["", "scans/", "scans/deep/"])
def test_content_of_a_zip_is_there_until_the_end(tmp_path, top):
    with zipfile.ZipFile(tmp_path / "case.zip", "w") as archive:
        archive.writestr(f"{top}a.nii", b"1")
        archive.writestr(f"{top}b.nii", b"2")
        archive.writestr("__MACOSX/._a.nii", b"")
    with open_source(tmp_path / "case.zip") as folder:
        assert {path.name for path in folder.glob("*.nii")} == {"a.nii", "b.nii"}
        assert folder.name == (top.rstrip("/").rsplit("/", 1)[-1] or "case")
    assert not folder.exists()


def test_names_in_a_zip_never_lead_out_of_it(tmp_path):
    with zipfile.ZipFile(tmp_path / "case.zip", "w") as archive:
        archive.writestr("../../outside.nii", b"1")
        archive.writestr("inside.nii", b"1")
    with open_source(tmp_path / "case.zip") as folder:
        assert sorted(path.name for path in folder.iterdir()) == ["inside.nii", "outside.nii"]
    assert not list(tmp_path.parent.glob("outside.nii"))


def test_backslashes_in_a_zip_are_between_folders(tmp_path):
    with zipfile.ZipFile(tmp_path / "case.zip", "w") as archive:
        archive.writestr(zipfile.ZipInfo("top\\deep\\a.nii"), b"1")
        archive.writestr(zipfile.ZipInfo("top\\b.nii"), b"2")
    with open_source(tmp_path / "case.zip") as folder:
        assert (folder / "deep/a.nii").read_bytes() == b"1"
        assert (folder / "b.nii").read_bytes() == b"2"


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_with_one_name_for_two_files_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "case.zip", "w") as archive:
        archive.writestr("top/a.nii", b"1")
        archive.writestr("top/a.nii", b"2")
    with (
        pytest.raises(StageError, match=r"holds top/a\.nii twice"),
        open_source(tmp_path / "case.zip"),
    ):
        pass


def test_a_damaged_zip_is_refused(tmp_path):
    (tmp_path / "case.zip").write_bytes(b"PK no zip")
    with (
        pytest.raises(StageError, match=r"case\.zip cannot be unpacked"),
        open_source(tmp_path / "case.zip"),
    ):
        pass


def test_a_zip_larger_than_the_disk_is_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "case.zip", "w") as archive:
        archive.writestr("a.nii", b"1" * 1000)
    monkeypatch.setattr("fullscale.formats.archives._RESERVE_BYTES", 1 << 62)
    with pytest.raises(StageError, match="to spare"), open_source(tmp_path / "case.zip"):
        pass
