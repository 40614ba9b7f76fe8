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
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from fullscale.runtime.errors import StageError
from fullscale.runtime.files import write_atomically

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
