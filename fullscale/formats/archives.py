"""Unpack a zip of scans for the time that they are read."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fullscale.runtime.errors import StageError, shorten

_READ_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    RuntimeError,
    NotImplementedError,
    EOFError,
    OSError,
)
_RESERVE_BYTES = 1 << 30  # of the disk, for what else needs it
_ONLY_MAC = "__MACOSX"


@contextmanager
def open_source(source: Path) -> Iterator[Path]:
    """Give the folder of a zip's content while the context lasts; any other path as it is.

    A zip that holds one folder alone gives this folder. Names in the zip never lead out of it.

    Args:
        source: a .zip file, another file, or a folder.

    Raises:
        StageError: the zip is damaged, encrypted, larger than the free disk, or has a name twice.
    """
    if source.suffix.lower() != ".zip" or not source.is_file():
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="fullscale-") as temporary:
        # Named like the zip, because names of cases come from names of folders.
        folder = Path(temporary) / source.stem
        folder.mkdir()
        _unpack(source, folder)
        while len(inside := [path for path in folder.iterdir() if path.name != _ONLY_MAC]) == 1:
            if not inside[0].is_dir():
                break
            folder = inside[0]
        yield folder


def _unpack(source: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(source) as archive:
            needed = sum(member.file_size for member in archive.infolist())
            free = shutil.disk_usage(folder).free - _RESERVE_BYTES
            if needed > free:
                raise StageError(
                    f"{source} holds {needed / 1e9:.1f} GB, and {folder.parent.parent} has "
                    f"{max(0, free) / 1e9:.1f} GB to spare; unpack it elsewhere, and name the "
                    "folder"
                )
            names = Counter(_use_slashes(member) for member in archive.infolist())
            if twice := [name for name, count in names.items() if count > 1]:
                raise StageError(f"{source} holds {twice[0]} twice; unpack it yourself")
            archive.extractall(folder, archive.infolist())
    except _READ_ERRORS as error:
        raise StageError(
            f"{source} cannot be unpacked: {shorten(error)}; copy it again, or unpack it yourself"
        ) from error


def _use_slashes(member: zipfile.ZipInfo) -> str:
    """Put "/" where a program on Windows wrote a backslash between folders; return the new name."""
    member.filename = member.filename.replace("\\", "/")
    return member.filename
