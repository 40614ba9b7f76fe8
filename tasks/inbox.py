"""The inbox: a folder or a bucket in which annotated scans arrive, in the nnU-Net raw layout.

    <inbox>/imagesTr/<case>_0000.nii.gz    HU
    <inbox>/labelsTr/<case>.nii.gz         label ids
    <inbox>/dataset.json                   may be there: labels; otherwise those of the cohort hold
    <inbox>/cases.csv                      may be there: case, patient, annotated
    <inbox>/accepted/<data version>/...    what is in the data
    <inbox>/quarantine/<case>/...          what was refused, with reason.txt

Files are moved, never deleted, and only when their fate is known.
"""

from __future__ import annotations

import errno
import shutil
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from scans.cohort import CASE_NAME
from scans.files import write_atomically
from tasks.console import StageError

ACCEPTED, QUARANTINE = "accepted", "quarantine"
TABLES = ("dataset.json", "cases.csv")
IMAGE_ENDING, LABEL_ENDING = "_0000.nii.gz", ".nii.gz"


@dataclass(frozen=True)
class InboxFile:
    """A file of the inbox.

    Attributes:
        path: relative to the inbox, with "/".
        size: in bytes.
        modified_s: when it was last written, in seconds since 1970, by the inbox's own clock.
        is_plain: whether it is a file, not a link or a device.
        tag: what an object store gives for its content; empty elsewhere.
    """

    path: str
    size: int
    modified_s: float
    is_plain: bool = True
    tag: str = ""


class Inbox:
    """Lists, reads and moves files of an inbox, wherever it is.

    Args:
        url: a folder, or any URL that fsspec knows, such as s3://bucket/inbox.

    Raises:
        StageError: a package is missing for such a URL.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self.fs, path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise StageError(
                f"the inbox {url!r} cannot be opened: {error}; name a folder, or install what its "
                "kind of URL needs, such as `pip install 'fullscale[s3]'` for s3://"
            ) from None
        self.root = str(path).rstrip("/")
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def list_files(self) -> dict[str, InboxFile]:
        """Every file by its path, without those that were sorted away.

        Raises:
            StageError: a folder that is named as inbox is not there.
        """
        if self.is_local:
            return self._list_folder()
        self.fs.invalidate_cache()
        found = {}
        for name, info in sorted(self.fs.find(self.root, detail=True).items()):
            path = name.removeprefix(self.root).lstrip("/")
            if path.split("/")[0] not in (ACCEPTED, QUARANTINE):
                found[path] = self._describe_object(path, info)
        return found

    def find(self, path: str) -> InboxFile | None:
        """A file as it is now, or None where there is none."""
        try:
            if self.is_local:
                return self._describe(Path(self._full(path)))
            self.fs.invalidate_cache()
            return self._describe_object(path, self.fs.info(self._full(path)))
        except FileNotFoundError:
            return None

    def read(self, path: str, target: Path) -> None:
        """Copy a file to this machine."""
        target.parent.mkdir(parents=True, exist_ok=True)
        self.fs.get_file(self._full(path), str(target))

    def write(self, path: str, text: str) -> None:
        """Write a small file, missing folders included."""
        if self.is_local:
            write_atomically(Path(self._full(path)), text)
        else:
            self.fs.pipe_file(self._full(path), text.encode())

    def move(self, source: str, target: str) -> None:
        """Move a file within the inbox; killed meanwhile and called again, it ends the same."""
        if not self.is_local:
            self.fs.cp_file(self._full(source), self._full(target))
            self.fs.rm_file(self._full(source))
            return
        old, new = Path(self._full(source)), Path(self._full(target))
        new.parent.mkdir(parents=True, exist_ok=True)
        try:
            old.rename(new)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            part = new.with_name(new.name + ".part")
            shutil.copy2(old, part, follow_symlinks=False)
            part.replace(new)
            old.unlink()

    def is_free(self, folder: str) -> bool:
        """Whether nothing is below a folder."""
        if self.is_local:
            return not Path(self._full(folder)).exists()
        self.fs.invalidate_cache()
        return not self.fs.find(self._full(folder))

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}"

    def _list_folder(self) -> dict[str, InboxFile]:
        root = Path(self.root)
        if not root.is_dir():
            raise StageError(
                f"there is no inbox {self.url}; make the folder, or name another one with "
                "FULLSCALE_INBOX"
            )
        found = {}
        for entry in sorted(root.iterdir()):
            if entry.name in (ACCEPTED, QUARANTINE):
                continue
            is_folder = entry.is_dir() and not entry.is_symlink()
            for path in (entry, *sorted(entry.rglob("*"))) if is_folder else (entry,):
                with suppress(FileNotFoundError):  # taken away since it was listed
                    if (file := self._describe(path)) is not None:
                        found[file.path] = file
        return found

    def _describe(self, path: Path) -> InboxFile | None:
        seen = path.lstat()
        if stat.S_ISDIR(seen.st_mode):
            return None
        name = path.relative_to(self.root).as_posix()
        return InboxFile(name, seen.st_size, seen.st_mtime, stat.S_ISREG(seen.st_mode))

    def _describe_object(self, path: str, info: Mapping[str, Any]) -> InboxFile:
        modified = info.get("LastModified") or self.fs.modified(self._full(path))
        if modified.tzinfo is None:
            modified = modified.replace(tzinfo=UTC)
        # A store may list fractions of a second that it does not give for a single object.
        modified_s = float(int(modified.timestamp()))
        return InboxFile(path, int(info["size"]), modified_s, tag=str(info.get("ETag", "")))


@dataclass(frozen=True)
class Pair:
    """What belongs to one case.

    Attributes:
        name: of the case, as its files say; safe where the pair is ready.
        files: image and label where the pair is ready.
        why: the reason where it waits or is hostile.
    """

    name: str
    files: tuple[InboxFile, ...]
    why: str = ""


@dataclass
class Arrivals:
    """What lies in the inbox.

    Attributes:
        ready: pairs that are complete and have stopped growing.
        waiting: what stays in the inbox for now.
        hostile: what can never go in, because of a name or because it is no plain file.
        tables: dataset.json and cases.csv, those that are there.
    """

    ready: list[Pair] = field(default_factory=list)
    waiting: list[Pair] = field(default_factory=list)
    hostile: list[Pair] = field(default_factory=list)
    tables: list[InboxFile] = field(default_factory=list)


def sort_files(
    before: Mapping[str, InboxFile], now: Mapping[str, InboxFile], now_s: float, settle_s: float
) -> Arrivals:
    """Tell pairs that are ready from what waits and from what is hostile.

    Args:
        before: the files of a first look.
        now: the files of a second look; one that differs from the first is being written.
        now_s: the time, in seconds since 1970.
        settle_s: for how long a file must not have been written.
    """
    arrivals = Arrivals()
    cases: dict[str, list[InboxFile]] = {}
    for path, file in now.items():
        name = case_of(path)
        if path in TABLES:
            arrivals.tables.append(file)
        elif name is None and not is_hostile(path) and file.is_plain:
            text = "neither imagesTr/<case>_0000.nii.gz nor labelsTr/<case>.nii.gz"
            arrivals.waiting.append(Pair(path, (file,), text))
        else:
            cases.setdefault(f"./{path}" if name is None else name, []).append(file)

    def growing(files: list[InboxFile]) -> list[str]:
        return [
            file.path
            for file in files
            if before.get(file.path) != file or now_s - file.modified_s < settle_s
        ]

    unsettled = growing(arrivals.tables)
    for name, files in sorted(cases.items()):
        trouble = _trouble(name, files)
        if written := growing(files):
            why = f"{_listed(written)} was written less than {settle_s:g} s ago"
            arrivals.waiting.append(Pair(name, tuple(files), why))
        elif trouble:
            arrivals.hostile.append(Pair(name, tuple(files), trouble))
        elif len(files) < 2:
            (file,) = files
            missing = "label" if file.path.startswith("imagesTr/") else "image"
            arrivals.waiting.append(Pair(name, (file,), f"its {missing} has not arrived"))
        elif unsettled:
            why = f"{_listed(unsettled)} was written less than {settle_s:g} s ago"
            arrivals.waiting.append(Pair(name, tuple(files), why))
        else:
            arrivals.ready.append(Pair(name, tuple(files)))
    return arrivals


def case_of(path: str) -> str | None:
    """The case whose image or label a path is, by its name alone; None for other files."""
    folder, _, name = path.partition("/")
    if "/" in name or name.startswith("."):
        return None
    if folder == "imagesTr" and name.endswith(IMAGE_ENDING):
        return name.removesuffix(IMAGE_ENDING)
    if folder == "labelsTr" and name.endswith(LABEL_ENDING):
        return name.removesuffix(LABEL_ENDING)
    return None


def is_hostile(path: str) -> bool:
    """Whether a path tries to leave its folder or hides characters from who reads it."""
    parts = PurePosixPath(path).parts
    return ".." in parts or "//" in path or "\\" in path or not path.isprintable()


def _trouble(name: str, files: list[InboxFile]) -> str:
    """Why files can never go in; empty where they may."""
    if strange := [file.path for file in files if not file.is_plain]:
        return f"{_listed(strange)} is a link or a device; copy the file itself into the inbox"
    if not CASE_NAME.fullmatch(name):
        return (
            f"the case name {name!a} cannot be used as a file name; wanted letters, digits, '-' "
            "and '_', at most 64, starting with a letter or digit: rename the files of the case"
        )
    return ""


def _listed(paths: list[str]) -> str:
    return ", ".join(path if path.isprintable() else ascii(path) for path in paths)
