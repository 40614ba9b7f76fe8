"""Unpack a scan that came with a request, within limits that its header is checked against."""

# isal has no type annotations for the functions used here.
# mypy: allow-untyped-calls
from __future__ import annotations

import base64
import binascii
import gzip
import io
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from isal import igzip, isal_zlib

from fullscale.runtime.errors import ScanError
from fullscale.scans.nifti_writer import read_declared_size

SCAN_ROOT_VARIABLE, MAX_VOXELS_VARIABLE = "FULLSCALE_SCAN_ROOT", "FULLSCALE_MAX_VOXELS"
MAX_VOXELS = 512 * 512 * 1024
BYTES_PER_VOXEL = 4
"""At `max_voxels`. A scan with 8 bytes per voxel may have half as many voxels."""

_HEADER_BYTES = 1 << 16
_SLACK_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 22
_UNPACK_ERRORS: tuple[Any, ...] = (EOFError, zlib.error, isal_zlib.error, gzip.BadGzipFile)
_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class ScanLimits:
    """Limits on the scans of a request.

    Attributes:
        scan_root: folder below which paths may lie; None refuses every path.
        max_voxels: voxels of one scan, at 4 bytes each.
    """

    scan_root: Path | None = None
    max_voxels: int = MAX_VOXELS

    @classmethod
    def from_environment(cls) -> ScanLimits:
        """Read the limits from FULLSCALE_SCAN_ROOT and FULLSCALE_MAX_VOXELS.

        Raises:
            ScanError: a variable has an invalid value.
        """
        root, text = os.environ.get(SCAN_ROOT_VARIABLE), os.environ.get(MAX_VOXELS_VARIABLE)
        if root and not Path(root).is_dir():
            raise _invalid_setting(SCAN_ROOT_VARIABLE, root, "a folder")
        if text and not (text.isdecimal() and int(text)):
            raise _invalid_setting(MAX_VOXELS_VARIABLE, text, "a whole number of at least 1")
        return cls(Path(root) if root else None, int(text) if text else MAX_VOXELS)


def unpack_text(text: object, target: Path, limits: ScanLimits) -> None:
    """Decode and uncompress a scan.

    Args:
        text: base64 of a .nii or .nii.gz file. Any object, because it comes from a request.
        target: .nii file to write.
        limits: limits on its size.

    Raises:
        ScanError: the text is not base64 or not NIfTI, or the scan is larger than the limits or
            than its own header states.
    """
    wanted, cure = "base64 of a .nii or .nii.gz file", "encode the file's bytes as they are"
    if not isinstance(text, str):
        raise ScanError("not_base64", f"a {type(text).__name__}", wanted, cure)
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ScanError("not_base64", "text that is not base64", wanted, cure) from None
    _unpack(io.BytesIO(content), target, limits)


def unpack_file(path: object, target: Path, limits: ScanLimits) -> None:
    """Uncompress a scan that a request names by its path.

    Args:
        path: of a .nii or .nii.gz file below `limits.scan_root`; relative to it, or absolute. Any
            object, because it comes from a request.
        target: .nii file to write.
        limits: limits on its place and size.

    Raises:
        ScanError: there is no such file that may be read, or as for `unpack_text`.
    """
    if limits.scan_root is None:
        raise ScanError(
            "path",
            "a path",
            "base64 in the field scan: this server reads no files",
            f"send the scan itself, or start the server with {SCAN_ROOT_VARIABLE} set to the "
            "folder of scans",
        )
    root = limits.scan_root.resolve()
    try:
        file = (root / str(path)).resolve()
        is_inside = isinstance(path, str) and file.is_relative_to(root) and file.is_file()
    except (OSError, ValueError, RuntimeError):  # path too long, NUL byte, loop of links
        is_inside = False
    if not is_inside:  # one message for all cases: a client must not learn which files exist
        raise ScanError(
            "path",
            "a path to no file that may be read here",
            f"a file below {SCAN_ROOT_VARIABLE}",
            "name one by its path relative to that folder",
        )
    with file.open("rb") as stream:
        _unpack(stream, target, limits)


def _unpack(source: BinaryIO, target: Path, limits: ScanLimits) -> None:
    """Uncompress a file into `target`; stop with an error at the size that its header states."""
    magic = source.read(2)
    source.seek(0)
    stream: BinaryIO = source
    if magic == _GZIP_MAGIC:
        stream = cast(BinaryIO, igzip.IGzipFile(fileobj=source))
    try:
        with target.open("wb") as written:
            beginning = stream.read(_HEADER_BYTES)
            if stream is not source and beginning.startswith(_GZIP_MAGIC):
                raise ScanError(
                    "unreadable", "gzip inside gzip", "a .nii.gz file", "pack the scan once only"
                )
            written.write(beginning)
            written.flush()
            limit = _check_header(target, limits) + _SLACK_BYTES
            size = written.tell()
            while chunk := stream.read(_CHUNK_BYTES):
                size += len(chunk)
                if size > limit:
                    raise ScanError(
                        "too_large",
                        f"more than the {limit - _SLACK_BYTES:,} bytes of its own header",
                        "a file that ends where its voxels end",
                        "write the scan again",
                    )
                written.write(chunk)
    except _UNPACK_ERRORS as error:
        raise ScanError(
            "unreadable", f"gzip that cannot be unpacked ({error})", "a whole .nii.gz file",
            "send the file as it is",
        ) from None  # fmt: skip


def _check_header(file: Path, limits: ScanLimits) -> int:
    """Return the size in bytes that a file's header states; refuse one above the limits."""
    num_voxels, num_bytes = read_declared_size(file)
    max_bytes = BYTES_PER_VOXEL * limits.max_voxels
    if num_voxels > limits.max_voxels or num_bytes > max_bytes:
        raise ScanError(
            "too_large",
            f"a header of {num_voxels:,} voxels in {num_bytes:,} bytes",
            f"at most {limits.max_voxels:,} voxels in {max_bytes:,} bytes",
            f"cut the scan, or let the server take more with {MAX_VOXELS_VARIABLE}",
        )
    return num_bytes


def _invalid_setting(variable: str, found: str, wanted: str) -> ScanError:
    return ScanError("setting", f"{variable}={found}", wanted, "set it to one, or unset it")
