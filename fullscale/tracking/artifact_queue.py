"""Pictures and files of a tracked run, kept on disk until the tracking server has them.

Below a run's folder,

    pictures/PATH.png   a picture, under its artifact path
    files/PATH.json     a reference to a folder of files: where, and the SHA-256 of each

Each goes when it is sent, so whatever is there waits. Files are not copied, because weights are
large and are an artefact of the pipeline, which keeps them. The checksums hold a reference to what
it meant: a file that has changed or gone before it could be sent is left out.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from fullscale.runtime.files import file_sha256, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class FilesReference:
    """Files to be sent from where they are.

    Attributes:
        folder: where they are.
        path: the artifact path they go to.
        sha256: of each file, by its path inside `folder`.
        note: the file that holds this reference.
    """

    folder: Path
    path: str
    sha256: dict[str, str]
    note: Path

    def is_unchanged(self, name: str) -> bool:
        """Whether a file is still what it was when it was referred to."""
        file = self.folder / name
        return file.is_file() and file_sha256(file) == self.sha256[name]


class Outbox:
    """Pictures and files that wait. Filled by the training, emptied by the thread that sends."""

    def __init__(self, folder: Path) -> None:
        self._pictures = folder / "pictures"
        self._files = folder / "files"
        self._lock = threading.Lock()

    def add_picture(self, figure: Figure, path: str) -> None:
        """Keep a picture as PNG under an artifact path; a later one of the same path replaces it.

        Raises:
            ValueError: the path does not end in .png.
        """
        from fullscale.runtime.files import save_picture

        if not path.endswith(".png"):
            raise ValueError(f"the path of a picture must end in .png, found {path}")
        with self._lock:
            save_picture(figure, self._pictures / path)

    def pictures(self) -> dict[str, Path]:
        """The file of each picture that waits, by artifact path."""
        found = sorted(self._pictures.rglob("*.png"))
        return {file.relative_to(self._pictures).as_posix(): file for file in found}

    def drop_picture(self, file: Path, sent: os.stat_result) -> None:
        """Forget a picture that was sent, unless a newer one has taken its place meanwhile."""
        with self._lock:
            now = file.stat()
            if (now.st_ino, now.st_mtime_ns) == (sent.st_ino, sent.st_mtime_ns):
                file.unlink()

    def add_files(self, folder: Path, path: str) -> None:
        """Refer to the files below a folder, to be sent from there under an artifact path."""
        found = sorted(file for file in folder.rglob("*") if file.is_file())
        content = {
            "folder": str(folder.resolve()),
            "path": path,
            "sha256": {file.relative_to(folder).as_posix(): file_sha256(file) for file in found},
        }
        note = self._files / f"{quote(path, safe='')}.json"
        write_atomically(note, json.dumps(content, indent=2))

    def files(self) -> list[FilesReference]:
        """References that wait."""
        entries = [
            (json.loads(note.read_text("utf-8")), note) for note in self._files.glob("*.json")
        ]
        return [
            FilesReference(Path(entry["folder"]), entry["path"], entry["sha256"], note)
            for entry, note in sorted(entries, key=lambda pair: pair[1])
        ]

    def is_empty(self) -> bool:
        """Whether nothing waits."""
        return not self.pictures() and not self.files()
