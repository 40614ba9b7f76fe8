"""Request bodies with scans: valid ones, and many that a server must refuse."""

from __future__ import annotations

import base64
import functools
import gzip
import json
import random
import struct
from collections.abc import Iterator

import nibabel as nib
import numpy as np
from bodies import lps_affine, make_body


def nifti(values_ZYX=None, spacing_mm=(8.0, 7.0, 7.0)) -> bytes:
    """Return an uncompressed NIfTI file; by default of a small body."""
    if values_ZYX is None:
        values_ZYX = make_body(spacing_mm=spacing_mm)[0]
    affine = lps_affine(values_ZYX.shape, spacing_mm)
    return nib.Nifti1Image(values_ZYX.transpose(2, 1, 0), affine).to_bytes()


def base64_of(content: bytes) -> str:
    """Encode a file for the column `scan`."""
    return base64.b64encode(content).decode()


def claiming(shape, content: bytes | None = None, bits: int = 16) -> bytes:
    """Return a file whose header claims another shape and voxel size."""
    changed = bytearray(content or nifti())
    changed[40:56] = struct.pack("<8h", 3, *shape, 1, 1, 1, 1)
    changed[70:74] = struct.pack("<2h", {16: 4, 64: 64}[bits], bits)
    return bytes(changed)


@functools.lru_cache
def bomb(num_bytes: int) -> bytes:
    """Return zeros that gzip made a thousand times smaller."""
    return gzip.compress(bytes(num_bytes), 9)


def request(**fields) -> bytes:
    """Return a body with one row."""
    return json.dumps({"dataframe_records": [fields]}).encode()


def malformed(seed: int, num: int) -> Iterator[bytes]:
    """Yield bodies that a server must refuse, of each kind in turn, damaged at random places."""
    rng = random.Random(seed)
    whole = nifti()
    zipped = gzip.compress(whole)
    zeros = bomb(16 << 20)

    def flipped(content: bytes) -> bytes:
        place = rng.randrange(len(content))
        return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]

    kinds = (
        lambda: request(scan=base64_of(rng.randbytes(rng.randrange(1, 5000)))),
        lambda: request(scan=base64_of(whole[: rng.randrange(len(whole))])),
        lambda: request(scan=base64_of(zipped[: rng.randrange(len(zipped))])),
        lambda: request(scan=base64_of(zipped[:10] + flipped(zipped[10:-8]) + b"\0" * 8)),
        lambda: request(scan=base64_of(claiming((1000, 1000, 1000)))),
        lambda: request(scan=base64_of(gzip.compress(claiming((32000, 32000, 32000))))),
        lambda: request(scan=base64_of(claiming((-4, 40, 16)))),
        lambda: request(scan=base64_of(claiming((30000, 8000, 1), bits=64))),
        lambda: request(scan=base64_of(zeros)),
        lambda: request(scan=base64_of(gzip.compress(whole) + zeros)),
        lambda: request(scan=base64_of(gzip.compress(zipped))),
        lambda: request(scan="".join(rng.choices("äöü !?<>", k=50))),
        lambda: request(scan=rng.choice([17, 1.5, True, [], {}, ["a"]])),
        lambda: request(scan=None),
        lambda: request(path=rng.choice(["/etc/passwd", "../../etc/passwd", "a\0b", "x" * 9000])),
        lambda: request(path="scan.nii.gz", scan=base64_of(whole)),
        lambda: request(file="scan.nii.gz"),
        lambda: request(scan=base64_of(nifti(np.full((16, 40, 48), -1000, np.int16)))),
        lambda: request(scan=base64_of(nifti(np.full((16, 40, 48), np.nan, np.float32)))),
        lambda: request(scan=base64_of(nifti(spacing_mm=(0.001, 7.0, 7.0))))[:-3],
        lambda: b"[" * rng.randrange(1, 90_000),
        lambda: b'{"inputs": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        lambda: b'{"dataframe_records": [' + b"{}," * 60_000 + b"{}]}",
        lambda: json.dumps({"dataframe_records": [{"scan": "QQ=="}] * 65}).encode(),
        lambda: json.dumps({"dataframe_split": rng.choice([7, [], {"columns": ["a"]}])}).encode(),
        lambda: json.dumps(rng.choice([[], 5, "text", None, {}, {"inputs": []}])).encode(),
        lambda: rng.randbytes(rng.randrange(2000)),
        lambda: b'{"dataframe_records": [{"scan": "' + b"9" * 3_000_000 + b'"}]}',
        lambda: b'{"inputs": ' + b"9" * 5000 + b"}",
        lambda: b"",
    )
    for number in range(num):
        yield kinds[number % len(kinds)]()
