"""Atomic file writes."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_atomically(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file that is there whole or not at all, also after a kill or a power cut.

    Missing parent folders are made; text is written as UTF-8. Where writing fails, on a full disk
    say, what was there before stays and the half-written file goes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def file_sha256(path: Path) -> str:
    """Checksum of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def save_picture(figure: Figure, path: Path) -> None:
    """Write a picture as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, metadata={"Software": None})
    write_atomically(path, buffer.getvalue())


def read_note(path: Path) -> dict[str, Any]:
    """What was noted; empty where nothing was."""
    if not path.is_file():
        return {}
    noted: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return noted


def write_note(path: Path, noted: Mapping[str, Any]) -> None:
    """Replace what was noted, whole or not at all."""
    write_atomically(path, json.dumps(dict(noted)) + "\n")
