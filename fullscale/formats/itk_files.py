"""Read NRRD, MetaImage and Analyze files through SimpleITK."""

# SimpleITK has no type annotations for the functions called here.
# mypy: allow-untyped-calls
from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd", ".hdr", ".img")
_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK's coordinates are LPS, ours are NIfTI's RAS
_DATA_FILE = re.compile(rb"^\s*(?:ElementDataFile\s*=|data ?file:)\s*(.*?)\s*$", re.I | re.M)
_HEADER_BYTES = 1 << 16


@dataclass(frozen=True, eq=False)
class ItkFile:
    """Content of a file.

    Attributes:
        voxels: along the file's axes I, J, K, the first the fastest; more axes where there are
            more, the last one of several channels.
        affine: 4 x 4, voxel (i, j, k) to RAS+ millimetres.
        has_orientation: False for the format Analyze, which does not hold one.
    """

    voxels: NDArray[Any]
    affine: NDArray[np.float64]
    has_orientation: bool


def is_itk_file(path: Path) -> bool:
    """Return True if the ending of a name is one of `ITK_SUFFIXES`, in any letter case."""
    return path.name.lower().endswith(ITK_SUFFIXES)


def header_path(path: Path) -> Path:
    """Return the .hdr file of an .img file; any other path as it is."""
    if path.suffix.lower() != ".img":
        return path
    for suffix in (".hdr", ".HDR"):
        if (header := path.with_suffix(suffix)).is_file():
            return header
    return path.with_suffix(".hdr")


def data_files(path: Path) -> tuple[Path, ...]:
    """Return the other files that hold the voxels of a header's file; none if it holds them.

    Raises:
        ValueError: the header names a file that does not lie beside it, or several files.
        OSError: the header cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".hdr":
        return tuple(
            image for end in (".img", ".IMG") if (image := path.with_suffix(end)).is_file()
        )[:1]
    if suffix not in (".mhd", ".nhdr", ".mha", ".nrrd"):
        return ()
    with path.open("rb") as stream:
        header = stream.read(_HEADER_BYTES).split(b"\n\n" if suffix[1] == "n" else b"LOCAL")[0]
    found = [name.decode("utf-8", "replace") for name in _DATA_FILE.findall(header)]
    names = [name for name in found if name and name.upper() != "LOCAL"]
    # A path in a header could name any file of the machine.
    plain = all(re.fullmatch(r"[^/\\%:]+", name) and name not in ("..", ".") for name in names)
    if not plain or len(names) > 1 or any(name.upper().startswith("LIST") for name in names):
        raise ValueError(f"voxels in {', '.join(names)}, not in one file beside the header")
    return tuple(path.with_name(name) for name in names)


def read_itk(path: Path) -> ItkFile:
    """Read a file and the files of its voxels.

    Raises:
        ValueError: the header names files elsewhere, or the axes cannot be an image's.
        RuntimeError: SimpleITK cannot read it.
        OSError: it cannot be opened.
    """
    import SimpleITK

    path = header_path(path)
    data_files(path)
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    image = SimpleITK.ReadImage(str(path))
    voxels = SimpleITK.GetArrayFromImage(image)
    num_axes = image.GetDimension()
    axes = (*range(num_axes - 1, -1, -1), *range(num_axes, voxels.ndim))
    affine = np.eye(4)
    rotation = np.array(image.GetDirection()).reshape(num_axes, num_axes)[:3, :3]
    count = min(3, num_axes)
    affine[:count, :count] = rotation * np.array(image.GetSpacing())[:count]
    affine[:count, 3] = np.array(image.GetOrigin())[:count]
    return ItkFile(voxels.transpose(axes), _TO_RAS @ affine, _has_orientation(path))


def _has_orientation(path: Path) -> bool:
    """Return False for an Analyze header: no NIfTI magic, or both of its codes are 0."""
    if path.suffix.lower() != ".hdr":
        return True
    begin = path.read_bytes()[:348]
    return begin[344:347] in (b"ni1", b"n+1") and any(begin[252:256])
