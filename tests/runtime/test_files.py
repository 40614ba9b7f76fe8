import os

import pytest

from fullscale.runtime.files import folder_bytes, open_atomically, write_atomically


def test_content_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    path, synced, sync = tmp_path / "file", [], os.fsync

    def note(number):
        synced.append((os.fstat(number).st_size, path.exists()))
        sync(number)

    monkeypatch.setattr(os, "fsync", note)
    write_atomically(path, b"12345")
    assert synced == [(5, False)]
    assert path.read_bytes() == b"12345"


def test_interrupted_write_leaves_the_file_from_before(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def write_half():
        with open_atomically(path) as stream:
            stream.write(b"half")
            stream.flush()
            assert path.read_bytes() == b"before"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_file_with_two_names_counts_once_in_the_sum_of_two_folders(tmp_path):
    for name in ("cache", "worktree"):
        (tmp_path / name).mkdir()
    (tmp_path / "cache/scan").write_bytes(bytes(1000))
    (tmp_path / "worktree/scan").hardlink_to(tmp_path / "cache/scan")
    (tmp_path / "worktree/own").write_bytes(bytes(10))
    (tmp_path / "worktree/link").symlink_to("own")
    assert folder_bytes(tmp_path / "cache") == 500
    assert folder_bytes(tmp_path / "worktree") == 510 + len("own")
    assert folder_bytes(tmp_path / "nowhere") == 0
