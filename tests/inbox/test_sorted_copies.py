from __future__ import annotations

from pathlib import Path

import pytest

from fullscale.inbox.inbox import Inbox, InboxFile
from fullscale.inbox.sorted_copies import find_copies

DAY_S = 24 * 60 * 60.0
NOW_S = 100 * DAY_S
FILES = {
    "accepted/1/imagesTr/a_0000.nii.gz": 50,
    "accepted/1/labelsTr/a.nii.gz": 50,
    "accepted/1/imagesTr/gone_0000.nii.gz": 50,
    "accepted/2/imagesTr/b_0000.nii.gz": 10,
    "quarantine/a/a_0000.nii.gz": 60,
    "quarantine/a/reason.txt": 60,
    "quarantine/a-2/a_0000.nii.gz": 40,
    "quarantine/gone/gone_0000.nii.gz": 60,
    "quarantine/notes/readme.txt": 60,
}
"""Sorted files, and how many days ago each was moved there."""


class Listed(Inbox):
    """An inbox whose files were moved at known times."""

    def list_sorted(self) -> list[InboxFile]:
        return [InboxFile(path, 5, NOW_S - days * DAY_S) for path, days in FILES.items()]


def test_only_old_copies_of_what_the_data_have_are_found(tmp_path: Path) -> None:
    found = find_copies(Listed(str(tmp_path)), {"a", "b"}, NOW_S - 30 * DAY_S)
    assert {each.folder: [file.path for file in each.files] for each in found} == {
        "accepted/1": ["accepted/1/imagesTr/a_0000.nii.gz", "accepted/1/labelsTr/a.nii.gz"],
        # quarantine/a-2 was refused after the pair in the data had come
        "quarantine/a": ["quarantine/a/a_0000.nii.gz", "quarantine/a/reason.txt"],
    }


@pytest.fixture(params=["folder", "bucket"])
def inbox(request: pytest.FixtureRequest, tmp_path: Path) -> Inbox:
    inbox = Inbox(str(tmp_path) if request.param == "folder" else f"memory://{tmp_path.name}")
    for path in (*FILES, "imagesTr/new_0000.nii.gz"):
        inbox.write(path, "12345")
    return inbox


def test_sorted_files_are_listed_and_removed_with_their_folders(inbox: Inbox) -> None:
    listed = {file.path: file for file in inbox.list_sorted()}
    assert set(listed) == set(FILES)
    assert {file.size for file in listed.values()} == {5}
    first, *others = find_copies(inbox, {"a", "b", "gone"}, float("inf"))
    assert others[0].folder == "accepted/2"
    for file in first.files:
        inbox.remove(file)
    assert {file.path for file in inbox.list_sorted()} == {
        path for path in FILES if not path.startswith("accepted/1/")
    }
    assert set(inbox.list_files()) == {"imagesTr/new_0000.nii.gz"}
    if inbox.is_local:
        assert not (Path(inbox.root) / "accepted/1").exists()
        assert (Path(inbox.root) / "accepted/2/imagesTr").is_dir()


def test_inbox_that_does_not_exist_has_no_copies(tmp_path: Path) -> None:
    assert Inbox(str(tmp_path / "none")).list_sorted() == []
