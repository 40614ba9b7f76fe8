"""Tell DICOM files from others by content, and read them, with or without preamble."""

# pydicom has no type annotations for the functions called here.
# mypy: allow-untyped-calls
from __future__ import annotations

from pathlib import Path

import pydicom
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

READ_ERRORS = (Exception,)
"""On damaged bytes pydicom and highdicom raise almost any exception; catch it only around calls of
theirs."""
DIRECTORY_NAME = "DICOMDIR"  # the table of contents of a DICOM medium


def is_dicom(path: Path) -> bool:
    """Return True if a file is DICOM by content, with or without preamble, or cannot be opened.

    A file without read permission counts as DICOM, so that reading it reports the error.
    """
    if not path.is_file():
        return False
    try:
        begin = _read_begin(path)
    except OSError:
        return True
    return begin[128:] == b"DICM" or _begins_with_element(begin)


def is_damaged(path: Path) -> bool:
    """Return True if a file has the name of a slice, but its content is empty or no DICOM.

    Slices end in .dcm, or are called image_12 or by a UID, which ends in a number. Reading such a
    file reports it; leaving it out would shorten a scan in silence.
    """
    if path.name.startswith(".") or not path.is_file() or is_dicom(path):
        return False
    suffix = path.suffix.lower()
    return suffix in (".dcm", ".dicom", ".ima") or path.name[-1].isdigit()


def read_dataset(path: Path, *, with_pixels: bool = True) -> pydicom.Dataset:
    """Read a DICOM file, also one without preamble.

    Raises:
        READ_ERRORS: the file cannot be read.
    """
    force = _begins_with_element(_read_begin(path))
    dataset = pydicom.dcmread(path, stop_before_pixels=not with_pixels, force=force)
    if "TransferSyntaxUID" not in dataset.file_meta:
        is_implicit, is_little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if is_little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if is_implicit else explicit
    return dataset


def _read_begin(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(132)


def _begins_with_element(begin: bytes) -> bool:
    """Return True if bytes begin with a data element of group 2 or 8, as without a preamble."""
    if len(begin) < 8 or begin[:2] not in (b"\x02\x00", b"\x08\x00") or begin[3] != 0:
        return False
    is_explicit = begin[4:6].isalpha() and begin[4:6].isupper()
    return is_explicit or int.from_bytes(begin[4:8], "little") <= 128
