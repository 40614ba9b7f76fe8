"""Atomic file writes, and checksums of files."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary stream whose content is at `path` once the block ends without an error.

    A reader sees the complete new file or the file from before, also after a kill or a power cut.
    Missing parent folders are made. Where the block raises, as on a full disk, the incomplete file
    is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())  # else a power cut could leave the new name with no content
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file as `open_atomically` does; text is written as UTF-8."""
    with open_atomically(path) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_stats(folder: Path) -> list[os.stat_result]:
    """Return what is known of each file below a folder, links as links; [] if there is none."""
    return [path.lstat() for path in folder.rglob("*") if not path.is_dir()]


def folder_bytes(folder: Path) -> int:
    """Return the size of all files below a folder, links as links; 0 if there is none.

    A file with n hard links counts with the n-th part, so that sums over folders are right.
    """
    return sum(each.st_size // each.st_nlink for each in file_stats(folder))


def save_picture(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically and without metadata on the software that drew it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, metadata={"Software": None})
    write_atomically(path, buffer.getvalue())


def read_json_or_empty(path: Path) -> dict[str, Any]:
    """Read a JSON object; return an empty one if the file is missing."""
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def write_json(path: Path, content: object) -> None:
    """Write indented JSON in UTF-8 atomically."""
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
