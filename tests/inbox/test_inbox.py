from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullscale.inbox.arrivals import Pair, classify_files, is_unsafe_path, parse_case_name
from fullscale.inbox.inbox import Inbox, InboxFile
from fullscale.inbox.moves import has_planned_moves, make_moves, plan_moves
from fullscale.runtime.errors import StageError

NOW_S = 1_000_000.0
SETTLE_S = 60


def file(path: str, age_s: float = 100, size: int = 5, is_plain: bool = True) -> InboxFile:
    return InboxFile(path, size, NOW_S - age_s, is_plain)


def pair(case: str, **values) -> list[InboxFile]:
    return [file(f"imagesTr/{case}_0000.nii.gz", **values), file(f"labelsTr/{case}.nii.gz")]


def arrange(*files: InboxFile, before: list[InboxFile] | None = None):
    now = {entry.path: entry for entry in files}
    first = now if before is None else {entry.path: entry for entry in before}
    return classify_files(first, now, NOW_S, SETTLE_S)


def names(pairs: list[Pair]) -> list[str]:
    return [entry.name for entry in pairs]


def test_complete_pairs_are_ready_with_image_and_label():
    arrivals = arrange(*pair("b"), *pair("a-1_x"))
    assert names(arrivals.ready) == ["a-1_x", "b"]
    assert [f.path for f in arrivals.ready[1].files] == [
        "imagesTr/b_0000.nii.gz",
        "labelsTr/b.nii.gz",
    ]
    assert arrivals.waiting == arrivals.unsafe == []


@pytest.mark.parametrize(("kept", "missing"), [(0, "label"), (1, "image")])
def test_half_a_pair_waits_for_its_other_half(kept, missing):
    (waiting,) = arrange(pair("a")[kept]).waiting
    assert waiting.reason == f"its {missing} has not arrived"


@pytest.mark.parametrize("age_s", [59.9, 0, -3600])
def test_file_written_lately_waits(age_s):
    arrivals = arrange(*pair("a", age_s=age_s), *pair("b", age_s=60))
    assert names(arrivals.ready) == ["b"]
    (waiting,) = arrivals.waiting
    assert waiting.reason == "imagesTr/a_0000.nii.gz was written less than 60 s ago"


@pytest.mark.parametrize(
    "first",
    [[], pair("a", size=4), pair("a", age_s=200)],
    ids=["new", "grew", "written"],
)
def test_file_that_changed_between_two_listings_waits(first):
    arrivals = arrange(*pair("a"), before=first)
    assert arrivals.ready == []
    assert names(arrivals.waiting) == ["a"]


@pytest.mark.parametrize("table", ["dataset.json", "cases.csv"])
def test_pairs_wait_for_a_table_that_is_being_written(table):
    arrivals = arrange(*pair("a"), file(table, age_s=1))
    assert arrivals.ready == []
    assert arrivals.waiting[0].reason == f"{table} was written less than 60 s ago"
    arrivals = arrange(*pair("a"), file(table))
    assert names(arrivals.ready) == ["a"]
    assert [entry.path for entry in arrivals.tables] == [table]


@pytest.mark.parametrize(
    "path",
    [
        "readme.txt",
        "imagesTr/a.nii.gz",
        "imagesTr/a_0001.nii.gz",
        "imagesTr/a_0000.nii",
        "imagesTr/.a_0000.nii.gz",
        "imagesTr/a_0000.nii.gz.part",
        "imagesTr/deep/a_0000.nii.gz",
        "labelsTr/a.seg.nrrd",
        "labelsTs/a.nii.gz",
    ],
)
def test_file_outside_the_layout_stays_and_is_listed(path):
    arrivals = arrange(file(path), *pair("b"))
    assert names(arrivals.ready) == ["b"]
    assert [(entry.name, entry.reason[:11]) for entry in arrivals.waiting] == [
        (path, "neither ima")
    ]
    assert arrivals.unsafe == []


@pytest.mark.parametrize(
    "case",
    ["a b", "-a", "ä", "a" * 65, "a;b", "$(id)", "a\nb", "\x1b[31m", "\udcff", "a..", "a\\b"],
)
def test_name_that_is_not_a_safe_file_name_is_unsafe(case):
    arrivals = arrange(*pair(case))
    assert arrivals.ready == arrivals.waiting == []
    (unsafe,) = arrivals.unsafe
    assert len(unsafe.files) == 2
    assert "cannot be used as a file name" in unsafe.reason
    assert unsafe.reason.isprintable()


@pytest.mark.parametrize(
    "path", ["../x.nii.gz", "imagesTr/../x_0000.nii.gz", "imagesTr//x_0000.nii.gz", "a\tb"]
)
def test_path_trick_is_unsafe_in_any_folder(path):
    arrivals = arrange(file(path))
    assert arrivals.ready == arrivals.waiting == []
    assert len(arrivals.unsafe) == 1


def test_link_or_device_takes_its_pair_along():
    arrivals = arrange(
        *pair("a", is_plain=False), file("imagesTr/folder", is_plain=False), *pair("folder")
    )
    assert names(arrivals.unsafe) == ["./imagesTr/folder", "a"]
    assert [len(entry.files) for entry in arrivals.unsafe] == [1, 2]
    assert "copy the file itself" in arrivals.unsafe[1].reason
    assert names(arrivals.ready) == ["folder"]


def test_unsafe_file_that_is_being_written_waits():
    arrivals = arrange(*pair("a b", age_s=1))
    assert arrivals.unsafe == []
    assert names(arrivals.waiting) == ["a b"]


paths = st.one_of(
    st.text(max_size=20),
    st.builds(
        "{}/{}{}".format,
        st.sampled_from(["imagesTr", "labelsTr", ""]),
        st.text(max_size=8),
        st.sampled_from(["_0000.nii.gz", ".nii.gz", ""]),
    ),
)


@given(found=st.dictionaries(paths, st.tuples(st.floats(-100, 200), st.booleans()), max_size=12))
def test_every_file_is_in_exactly_one_place(found):
    files = [file(path, age_s=age, is_plain=plain) for path, (age, plain) in found.items()]
    arrivals = arrange(*files)
    placed = [f.path for p in arrivals.ready + arrivals.waiting + arrivals.unsafe for f in p.files]
    placed += [entry.path for entry in arrivals.tables]
    assert sorted(placed) == sorted(found)
    for ready in arrivals.ready:
        assert parse_case_name(ready.files[0].path) == ready.name
        assert not any(is_unsafe_path(entry.path) for entry in ready.files)


class Place:
    """An inbox, filled and read independently of the code under test."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.fs, self.root = fsspec.core.url_to_fs(url)
        self.inbox = Inbox(url)

    def put(self, path: str, content: bytes = b"x") -> None:
        self.fs.makedirs(f"{self.root}/{path}".rpartition("/")[0], exist_ok=True)
        self.fs.pipe_file(f"{self.root}/{path}", content)

    def tree(self) -> dict[str, bytes]:
        found = self.fs.find(self.root)
        return {name.removeprefix(self.root + "/"): self.fs.cat_file(name) for name in found}


@pytest.fixture(params=["folder", "memory"])
def place(request, tmp_path):
    if request.param == "folder":
        (tmp_path / "inbox").mkdir()
        return Place(str(tmp_path / "inbox"))
    return Place(f"memory://{tmp_path.name}/inbox")


def test_inbox_lists_files_with_size_and_time_and_leaves_out_moved_files(place):
    place.put("imagesTr/a_0000.nii.gz", b"12345")
    place.put("accepted/0123/imagesTr/b_0000.nii.gz")
    place.put("quarantine/c/reason.txt")
    (found,) = place.inbox.list_files().values()
    assert (found.path, found.size, found.is_plain) == ("imagesTr/a_0000.nii.gz", 5, True)
    assert abs(time.time() - found.modified_s) < 30
    assert place.inbox.find("imagesTr/a_0000.nii.gz") == found
    assert place.inbox.find("imagesTr/b_0000.nii.gz") is None


def test_inbox_moves_and_writes(place, tmp_path):
    place.put("imagesTr/a_0000.nii.gz", b"12345")
    place.inbox.move("imagesTr/a_0000.nii.gz", "accepted/01/imagesTr/a_0000.nii.gz")
    place.inbox.write("quarantine/b/reason.txt", "why\n")
    assert place.tree() == {
        "accepted/01/imagesTr/a_0000.nii.gz": b"12345",
        "quarantine/b/reason.txt": b"why\n",
    }
    place.inbox.read("accepted/01/imagesTr/a_0000.nii.gz", tmp_path / "new/copy")
    assert (tmp_path / "new/copy").read_bytes() == b"12345"
    assert not place.inbox.is_free("quarantine/b")
    assert place.inbox.is_free("quarantine/c")


def test_empty_bucket_is_an_empty_inbox():
    assert Inbox("memory://nothing/here").list_files() == {}


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(StageError, match=r"there is no inbox .*gone; make the folder, or name"):
        Inbox(str(tmp_path / "gone")).list_files()


def test_unknown_kind_of_url_is_refused():
    with pytest.raises(StageError, match=r"'gopher://x' cannot be opened: .*name a folder"):
        Inbox("gopher://x")


def test_links_and_pipes_are_listed_and_never_followed(tmp_path):
    (tmp_path / "secret").write_text("secret")
    inbox = tmp_path / "inbox"
    (inbox / "imagesTr").mkdir(parents=True)
    (inbox / "imagesTr/a_0000.nii.gz").symlink_to(tmp_path / "secret")
    (inbox / "imagesTr/b_0000.nii.gz").symlink_to("nowhere")
    (inbox / "labelsTr").symlink_to(tmp_path)
    os.mkfifo(inbox / "imagesTr/c_0000.nii.gz")
    found = Inbox(str(inbox)).list_files()
    assert {path: entry.is_plain for path, entry in found.items()} == {
        "imagesTr/a_0000.nii.gz": False,
        "imagesTr/b_0000.nii.gz": False,
        "imagesTr/c_0000.nii.gz": False,
        "labelsTr": False,
    }


def test_move_to_another_disk_copies_first(tmp_path, monkeypatch):
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "imagesTr/a").write_text("a")
    (tmp_path / "link").symlink_to("nowhere")
    os.utime(tmp_path / "imagesTr/a", (5, 7))
    rename = Path.rename

    def refuse(path, target):
        if path.name in ("a", "link"):
            raise OSError(errno.EXDEV, "other disk")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    inbox = Inbox(str(tmp_path))
    inbox.move("imagesTr/a", "accepted/a")
    inbox.move("link", "quarantine/link")
    assert (tmp_path / "accepted/a").read_text() == "a"
    assert (tmp_path / "accepted/a").stat().st_mtime == 7
    assert (tmp_path / "quarantine/link").is_symlink()
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "a",
        "accepted",
        "imagesTr",
        "link",
        "quarantine",
    ]


def found_pair(place: Place, case: str) -> Pair:
    place.put(f"imagesTr/{case}_0000.nii.gz", f"image {case}".encode())
    place.put(f"labelsTr/{case}.nii.gz", f"label {case}".encode())
    files = [place.inbox.find(f"imagesTr/{case}_0000.nii.gz")]
    files.append(place.inbox.find(f"labelsTr/{case}.nii.gz"))
    return Pair(case, tuple(files))


def test_files_are_moved_with_their_reasons(place, tmp_path):
    good, bad, unsafe = (found_pair(place, case) for case in ("good", "bad", "a ü b"))
    home = tmp_path / "home"
    plan_moves(home, place.inbox, "0123456789ab.dir", [good], [(bad, "too dark"), (unsafe, "no")])
    assert has_planned_moves(home)
    assert "imagesTr/good_0000.nii.gz" in place.tree()
    make_moves(home)
    assert not has_planned_moves(home)
    tree = place.tree()
    reason = tree.pop("quarantine/bad/reason.txt").decode()
    assert reason.splitlines()[0] == "too dark"
    assert "'labelsTr/a ü b.nii.gz'" in tree.pop("quarantine/a_b/reason.txt").decode("utf-8")
    assert tree == {
        "accepted/01234567/imagesTr/good_0000.nii.gz": b"image good",
        "accepted/01234567/labelsTr/good.nii.gz": b"label good",
        "quarantine/bad/bad_0000.nii.gz": b"image bad",
        "quarantine/bad/bad.nii.gz": b"label bad",
        "quarantine/a_b/a_b_0000.nii.gz": "image a ü b".encode(),
        "quarantine/a_b/a_b.nii.gz": "label a ü b".encode(),
    }


def test_quarantine_keeps_what_is_there_already(place, tmp_path):
    for number in (1, 2):
        bad = found_pair(place, "bad")
        plan_moves(tmp_path, place.inbox, "", [], [(bad, f"reason {number}")])
        make_moves(tmp_path)
    twins = [found_pair(place, name) for name in ("x y", "x  y", "__")]
    plan_moves(tmp_path, place.inbox, "", [], [(twin, "name") for twin in twins])
    make_moves(tmp_path)
    folders = {path.split("/")[1] for path in place.tree()}
    assert folders == {"bad", "bad-2", "x_y", "x_y-2", "unnamed"}
    assert place.tree()["quarantine/bad-2/reason.txt"].startswith(b"reason 2")


@pytest.mark.parametrize("num_done", range(5))
def test_moves_that_were_killed_are_finished(place, tmp_path, num_done):
    pairs = [found_pair(place, case) for case in ("a", "b")]
    plan_moves(tmp_path, place.inbox, "f" * 32, [pairs[0]], [(pairs[1], "no")])
    plan = (tmp_path / "moves.json").read_bytes()
    moved, sources = [], [entry.path for found in pairs for entry in found.files]

    class Killed(BaseException):
        pass

    move = Inbox.move

    def stop(self, source, target):
        if len(moved) == num_done:
            raise Killed
        moved.append(source)
        move(self, source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Inbox, "move", stop)
        if num_done < len(sources):
            with pytest.raises(Killed):
                make_moves(tmp_path)
        else:
            make_moves(tmp_path)
            (tmp_path / "moves.json").write_bytes(plan)  # killed before it was taken away
    make_moves(tmp_path)
    tree = place.tree()
    assert len(tree) == 5
    assert not set(sources) & set(tree)


def test_file_that_was_written_again_stays_in_the_inbox(place, tmp_path, capsys):
    good = found_pair(place, "good")
    plan_moves(tmp_path, place.inbox, "f" * 32, [good], [])
    place.put("labelsTr/good.nii.gz", b"a correction")
    make_moves(tmp_path)
    assert place.tree() == {
        "accepted/ffffffff/imagesTr/good_0000.nii.gz": b"image good",
        "labelsTr/good.nii.gz": b"a correction",
    }
    assert "'labelsTr/good.nii.gz' was written again" in capsys.readouterr().err
