"""The inbox: a folder or a bucket in which annotated scans arrive, in the nnU-Net raw layout.

    <inbox>/imagesTr/<case>_0000.nii.gz    HU
    <inbox>/labelsTr/<case>.nii.gz         label ids
    <inbox>/dataset.json                   optional: labels; default: those of the cohort
    <inbox>/cases.csv                      optional: case, patient, annotated
    <inbox>/accepted/<data version>/...    originals of the pairs in that data version
    <inbox>/quarantine/<case>/...          refused files, with reason.txt

Files are moved, and only after the data version is committed. Only `fullscale gc` deletes some.
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
from fullscale.runtime.files import open_atomically, write_atomically

ACCEPTED, QUARANTINE = "accepted", "quarantine"
TABLES = ("dataset.json", "cases.csv")
INBOX_VARIABLE = "FULLSCALE_INBOX"
WORK_DIR = Path(".cache/inbox")
"""State of the inbox in the project: lock, copied scans, planned moves, announced version."""
LOCK = WORK_DIR / "lock"
SETTLE_S = 60.0
"""A file counts as complete if it was not written for this long, in seconds."""
IMAGE_ENDING, LABEL_ENDING = "_0000.nii.gz", ".nii.gz"


@dataclass(frozen=True)
class InboxFile:
    """A file of the inbox.

    Attributes:
        path: relative to the inbox, with "/".
        size: in bytes.
        modified_s: time of the last write, in seconds since 1970, by the clock of the inbox.
        is_plain: True for a regular file, False for a link or a device.
        tag: ETag of an object store; empty for a folder.
    """

    path: str
    size: int
    modified_s: float
    is_plain: bool = True
    tag: str = ""


def inbox_url(root: Path, environment: Mapping[str, str]) -> str:
    """Return folder or URL of a project's inbox: FULLSCALE_INBOX, or inbox/ of the project."""
    return environment.get(INBOX_VARIABLE) or str(root / "inbox")


def make_inbox(root: Path, environment: Mapping[str, str]) -> str:
    """Make the folders of a project's own inbox, and return what `inbox_url` does."""
    url = inbox_url(root, environment)
    if not environment.get(INBOX_VARIABLE):
        for folder in ("imagesTr", "labelsTr"):
            Path(url, folder).mkdir(parents=True, exist_ok=True)
    return url


class Inbox:
    """List, read and move the files of an inbox in a folder or an object store.

    Args:
        url: a folder, or any URL that fsspec supports, such as s3://bucket/inbox.

    Raises:
        StageError: the URL is not supported, or a package for it is missing.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self.fs, path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise StageError(
                f"the inbox {url!r} cannot be opened: {error}; name a folder, or install what its "
                "kind of URL needs, such as `pip install --constraint constraints.txt --editable "
                "'.[s3]'` for s3://"
            ) from None
        self.root = str(path).rstrip("/")
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def list_files(self) -> dict[str, InboxFile]:
        """Return every file by its path, without accepted/ and quarantine/.

        Raises:
            StageError: the inbox is a folder that does not exist.
        """
        if self.is_local:
            return self._list_folder()
        self.fs.invalidate_cache()
        found = {}
        for name, info in sorted(self.fs.find(self.root, detail=True).items()):
            path = name.removeprefix(self.root).lstrip("/")
            if path.split("/")[0] not in (ACCEPTED, QUARANTINE):
                found[path] = self._read_object_info(path, info)
        return found

    def list_sorted(self) -> list[InboxFile]:
        """Return every file in accepted/ and quarantine/; `modified_s` is when it was moved there.

        An inbox that does not exist has none.
        """
        if not self.is_local:
            self.fs.invalidate_cache()
        found = []
        for folder in (ACCEPTED, QUARANTINE):
            for name, info in sorted(self.fs.find(self._full(folder), detail=True).items()):
                path = name.removeprefix(self.root).lstrip("/")
                if self.is_local:
                    # Moving a file changes the time of its entry, not that of its content.
                    moved = Path(name).lstat()
                    found.append(InboxFile(path, moved.st_size, moved.st_ctime))
                else:
                    found.append(self._read_object_info(path, info))
        return found

    def remove(self, file: InboxFile) -> None:
        """Remove a file of `list_sorted`, and its folders if they are empty then."""
        self.fs.rm_file(self._full(file.path))
        if self.is_local:
            top = Path(self.root) / file.path.split("/")[0]
            for folder in Path(self._full(file.path)).parents:
                if folder == top or any(folder.iterdir()):
                    break
                folder.rmdir()

    def find(self, path: str) -> InboxFile | None:
        """Return the current state of a file, or None if it does not exist."""
        try:
            if self.is_local:
                return self._read_file_info(Path(self._full(path)))
            self.fs.invalidate_cache()
            return self._read_object_info(path, self.fs.info(self._full(path)))
        except FileNotFoundError:
            return None

    def read(self, path: str, target: Path) -> None:
        """Copy a file to this machine; create missing folders."""
        target.parent.mkdir(parents=True, exist_ok=True)
        self.fs.get_file(self._full(path), str(target))

    def write(self, path: str, text: str) -> None:
        """Write a small text file; create missing folders."""
        if self.is_local:
            write_atomically(Path(self._full(path)), text)
        else:
            self.fs.pipe_file(self._full(path), text.encode())

    def move(self, source: str, target: str) -> None:
        """Move a file within the inbox; after an interruption, call it again to finish.

        Links are moved as links and never followed.
        """
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
            # The target is on another disk. The original goes only after the copy is durable.
            if stat.S_ISREG(old.lstat().st_mode):
                with old.open("rb") as original, open_atomically(new) as copy:
                    shutil.copyfileobj(original, copy)
                shutil.copystat(old, new)
            else:
                new.unlink(missing_ok=True)
                shutil.copy2(old, new, follow_symlinks=False)
            old.unlink()

    def is_free(self, folder: str) -> bool:
        """Return True if a folder is missing or empty."""
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
                with suppress(FileNotFoundError):  # removed since it was listed
                    if (file := self._read_file_info(path)) is not None:
                        found[file.path] = file
        return found

    def _read_file_info(self, path: Path) -> InboxFile | None:
        info = path.lstat()
        if stat.S_ISDIR(info.st_mode):
            return None
        name = path.relative_to(self.root).as_posix()
        return InboxFile(name, info.st_size, info.st_mtime, stat.S_ISREG(info.st_mode))

    def _read_object_info(self, path: str, info: Mapping[str, Any]) -> InboxFile:
        modified = info.get("LastModified") or self.fs.modified(self._full(path))
        if modified.tzinfo is None:
            modified = modified.replace(tzinfo=UTC)
        # A store may list fractions of a second but give whole seconds for a single object.
        modified_s = float(int(modified.timestamp()))
        return InboxFile(path, int(info["size"]), modified_s, tag=str(info.get("ETag", "")))
