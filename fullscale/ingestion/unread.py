"""Name the files of a source that were not read, so that nothing is left out in silence."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from fullscale.formats.dicom_files import is_dicom
from fullscale.ingestion.source import Source
from fullscale.scans.checks import Finding

TABLES = ("dataset.json", "cases.csv", "patients.json")
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".7z", ".rar")
SCAN_ENDINGS = (
    *(".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".hdr", ".img", ".mgz"),
    *(".dcm", ".dicom", ".ima"),
    *ARCHIVES,
)
_NUM_NAMES = 5


def find_unread(folder: Path, source: Source) -> tuple[list[Finding], list[Path]]:
    """Find the files not read: one finding for each folder and reason, and all their paths.

    A file that may be a part of a scan gives a warning; a hidden file, such as the `._NAME` of an
    archive made on macOS, a text, or a folder that the layout ignores gives a note.
    """
    used = {os.path.normpath(path) for case in source.cases for path in case.files}
    used |= {os.path.normpath(path) for path in source.refused_files}
    used |= {os.path.normpath(folder / name) for name in TABLES}
    left_out = {os.path.normpath(path): reason for path, reason in source.left_out.items()}
    groups = defaultdict[tuple[str, str, str], list[str]](list)
    unread = list[Path]()
    for path in _all_files(folder, used):
        if (place := os.path.normpath(path)) in used:
            continue
        unread.append(path)
        inside = path.relative_to(folder)
        reason = left_out.get(place, "")
        is_known = bool(set(inside.parts[:-1]) & set(source.ignored_folders))
        is_part = not is_known and (bool(reason) or may_be_scan(path))
        code = "file_unused" if is_part else "file_ignored"
        groups[str(inside.parent), reason, code].append(inside.name)
    findings = [
        Finding.from_check(place, code, _describe(names, reason))
        for (place, reason, code), names in sorted(groups.items())
    ]
    return findings, unread


def may_be_scan(path: Path) -> bool:
    """Return True if a file may be a part of a scan, by its ending or its content."""
    name = path.name.lower()
    if name.startswith(".") or "__MACOSX" in path.parts:
        return False
    return name.endswith(SCAN_ENDINGS) or path.is_dir() or is_dicom(path)


def _all_files(folder: Path, used: set[str]) -> Iterator[Path]:
    """Yield every file, and every link to a folder in which no file was used."""
    for place, folders, files in os.walk(folder):
        for name in sorted(files):
            yield Path(place, name)
        for name in sorted(folders):
            link = Path(place, name)
            inside = os.path.normpath(link) + os.sep
            if not link.is_symlink():
                continue
            if any(path.startswith(inside) for path in used):
                yield from _all_files(link, used)
            else:
                yield link


def _describe(names: list[str], reason: str) -> str:
    more = f" and {len(names) - _NUM_NAMES} more" if len(names) > _NUM_NAMES else ""
    why = f" ({reason})" if reason else ""
    return f"{len(names)} files not read{why}: {', '.join(names[:_NUM_NAMES])}{more}"
