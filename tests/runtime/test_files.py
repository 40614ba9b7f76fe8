import os

import pytest

from fullscale.runtime.files import open_atomically, write_atomically


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
