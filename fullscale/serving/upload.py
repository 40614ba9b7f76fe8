"""A scan that came with a request, unpacked within limits before anything believes its header."""

# isal carries no types for what is called here.
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
from fullscale.scans.nifti_writer import read_claim

SCAN_ROOT_VARIABLE, MAX_VOXELS_VARIABLE = "FULLSCALE_SCAN_ROOT", "FULLSCALE_MAX_VOXELS"
MAX_VOXELS = 512 * 512 * 1024
BYTES_PER_VOXEL = 4
"""Of the largest scan; one with 8 may have half as many voxels."""

_HEADER_BYTES = 1 << 16
_SLACK_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 22
_UNPACK_ERRORS: tuple[Any, ...] = (EOFError, zlib.error, isal_zlib.error, gzip.BadGzipFile)
_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        scan_root: the folder that paths may lead into; None: no path is read.
        max_voxels: of a scan, which may take 4 bytes for each.
    """

    scan_root: Path | None = None
    max_voxels: int = MAX_VOXELS

    @classmethod
    def from_environment(cls) -> Limits:
        """Limits as FULLSCALE_SCAN_ROOT and FULLSCALE_MAX_VOXELS set them.

        Raises:
            ScanError: a variable is set to what it cannot be.
        """
        root, text = os.environ.get(SCAN_ROOT_VARIABLE), os.environ.get(MAX_VOXELS_VARIABLE)
        if root and not Path(root).is_dir():
            raise _setting(SCAN_ROOT_VARIABLE, root, "a folder")
        if text and not (text.isdecimal() and int(text)):
            raise _setting(MAX_VOXELS_VARIABLE, text, "a whole number of at least 1")
        return cls(Path(root) if root else None, int(text) if text else MAX_VOXELS)


def unpack_text(text: object, target: Path, limits: Limits) -> None:
    """Write a scan that came as text, uncompressed.

    Args:
        text: base64 of a .nii or .nii.gz file.
        target: the .nii file to write.
        limits: what it may claim.

    Raises:
        ScanError: it is no base64, no NIfTI file, or larger than the limits or its own header.
    """
    wanted, cure = "base64 of a .nii or .nii.gz file", "encode the file's bytes as they are"
    if not isinstance(text, str):
        raise ScanError("not_base64", f"a {type(text).__name__}", wanted, cure)
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ScanError("not_base64", "text that is not base64", wanted, cure) from None
    _unpack(io.BytesIO(content), target, limits)


def unpack_file(path: object, target: Path, limits: Limits) -> None:
    """Write a scan that a request names, uncompressed.

    Args:
        path: of a .nii or .nii.gz file below `limits.scan_root`; relative to it, or absolute.
        target: the .nii file to write.
        limits: where it may lie, and what it may claim.

    Raises:
        ScanError: there is no such file that may be read, or as `unpack_text`.
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
    except (OSError, ValueError, RuntimeError):  # too long, a NUL byte, links in a circle
        is_inside = False
    if not is_inside:  # whether there is a file elsewhere is not told
        raise ScanError(
            "path",
            "a path to no file that may be read here",
            f"a file below {SCAN_ROOT_VARIABLE}",
            "name one by its path relative to that folder",
        )
    with file.open("rb") as stream:
        _unpack(stream, target, limits)


def _unpack(source: BinaryIO, target: Path, limits: Limits) -> None:
    """Copy a file, uncompressed, no further than its own header says that it goes."""
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
            limit = _judge_claim(target, limits) + _SLACK_BYTES
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


def _judge_claim(file: Path, limits: Limits) -> int:
    """How large a file is by its header, in bytes."""
    num_voxels, num_bytes = read_claim(file)
    max_bytes = BYTES_PER_VOXEL * limits.max_voxels
    if num_voxels > limits.max_voxels or num_bytes > max_bytes:
        raise ScanError(
            "too_large",
            f"a header of {num_voxels:,} voxels in {num_bytes:,} bytes",
            f"at most {limits.max_voxels:,} voxels in {max_bytes:,} bytes",
            f"cut the scan, or let the server take more with {MAX_VOXELS_VARIABLE}",
        )
    return num_bytes


def _setting(variable: str, found: str, wanted: str) -> ScanError:
    return ScanError("setting", f"{variable}={found}", wanted, "set it to one, or unset it")
