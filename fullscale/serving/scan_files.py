"""Find and read scans to segment: files and DICOM series, single or in folders."""

from __future__ import annotations

import logging
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fullscale.formats.dicom_files import is_dicom
from fullscale.formats.itk_files import ITK_SUFFIXES, header_path, is_itk_file
from fullscale.ingestion.unread import may_be_scan
from fullscale.runtime.errors import ScanError, StageError
from fullscale.scans.checks import MIN_SLICES, failure
from fullscale.scans.dicom import (
    CT_CLASSES,
    SeriesOrder,
    dicom_files,
    is_scout,
    order_series,
    read_header,
    read_series,
)
from fullscale.scans.geometry import Array, Geometry
from fullscale.scans.volume import Volume, read_image

logger = logging.getLogger(__name__)

NIFTI_SUFFIXES = (".nii.gz", ".nii")
SCAN_SUFFIXES = (*NIFTI_SUFFIXES, *ITK_SUFFIXES)


@dataclass(frozen=True)
class ScanFiles:
    """The files of one scan.

    Attributes:
        name: path relative to the given folder, without suffix unless another scan has that name;
            the plain name of a single scan.
        files: one file, or the files of one DICOM series in any order.
        is_dicom: True for a DICOM series.
        instance_uids: SOPInstanceUIDs of a DICOM series.
        series_uid: SeriesInstanceUID of a DICOM series.
        elsewhere: files of other folders with further slices of the same series.
    """

    name: str
    files: tuple[Path, ...]
    is_dicom: bool
    instance_uids: frozenset[str] = frozenset()
    series_uid: str = ""
    elsewhere: tuple[Path, ...] = ()


@dataclass(frozen=True, eq=False)
class LoadedScan:
    """A scan in memory.

    Attributes:
        volume: HU in canonical orientation.
        order: the sorted files of a DICOM series; None for other files.
    """

    volume: Volume
    order: SeriesOrder | None

    @property
    def own_geometry(self) -> Geometry:
        """Grid of the scan's files, on which results are written; oblique for a tilted gantry."""
        return self.volume.geometry if self.order is None else self.order.geometry

    def to_own_slices(self, values_ZYX: Array) -> Array:
        """Return values (Z, Y, X) on the volume's grid as (Z, Y, X) on `own_geometry`."""
        return values_ZYX if self.order is None else self.order.to_slices(values_ZYX)


def strip_suffix(name: str) -> str:
    """Return a file name without the ending of a scan, such as .nii.gz."""
    for suffix in SCAN_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def find_scans(source: Path) -> tuple[list[ScanFiles], bool]:
    """Find the scans at a path.

    Args:
        source: a file of `SCAN_SUFFIXES`, a DICOM file of several slices, the folder of one DICOM
            series, or a folder that contains scans at any depth.

    Returns:
        The scans sorted by name, and True if `source` is a single scan.

    Raises:
        StageError: there is no scan, or two have the same name.
    """
    if source.is_file():
        if is_dicom(source) and _is_multiframe([source]):
            (scan,) = _series_of(source.parent, source.stem, [source])
            return [scan], True
        if not source.name.lower().endswith(SCAN_SUFFIXES):
            raise StageError(
                f"found {source}; wanted a file {', '.join(SCAN_SUFFIXES)}, or a folder of scans"
            )
        return [ScanFiles(strip_suffix(source.name), (source,), is_dicom=False)], True
    if not source.is_dir():
        raise StageError(f"there is no {source}")
    found, seen = list[ScanFiles](), list[Path]()
    visited = set[Path]()
    for place, folders, files in os.walk(source, followlinks=True):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        folder = Path(place)
        if folder.resolve() in visited:  # a link back, or a second one
            folders.clear()
            continue
        visited.add(folder.resolve())
        paths = [folder / file for file in sorted(files) if not file.startswith(".")]
        seen += paths
        inside = folder.relative_to(source)
        found += [
            ScanFiles(str(inside / strip_suffix(path.name)), (path,), is_dicom=False)
            for path in paths
            if _is_scan(path)
        ]
        found += _series_of(folder, str(inside) if inside.parts else source.resolve().name)
    if not found:
        others = [path.name for path in seen if may_be_scan(path)]
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        but = f" but {', '.join(others[:5])}{more}; name a zip itself" if others else ""
        raise StageError(
            f"{source} holds no scan{but}; wanted files such as .nii.gz, or DICOM files of CT "
            "series"
        )
    counts = Counter(scan.name for scan in found)
    # Beside a.nii.gz, or a series in the folder a, the scan a.nii keeps its ending.
    found = [
        scan
        if scan.is_dicom or counts[scan.name] == 1
        else replace(scan, name=str(Path(scan.name).with_name(scan.files[0].name)))
        for scan in found
    ]
    names = [scan.name for scan in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise StageError(f"{source} has two scans named {', '.join(twice)}; rename one of them")
    found = _find_split_series(found)
    _tell_unread(source, seen, found)
    is_single = len(found) == 1 and found[0].is_dicom
    return sorted(found, key=lambda scan: scan.name), is_single


def load_scan(scan: ScanFiles) -> LoadedScan:
    """Read a scan.

    Raises:
        ScanError: the scan cannot be used; the message gives the reason.
    """
    if scan.elsewhere:
        found = f"{scan.name}: further slices of the series in {scan.elsewhere[0].parent}"
        raise failure("series_split", found)
    # Warnings of the parsers are hidden: they may quote the patient's name.
    with warnings.catch_warnings(action="ignore"):
        if not scan.is_dicom:
            return LoadedScan(read_image(scan.files[0]), None)
        order = order_series(scan.files, scan.name)
        return LoadedScan(read_series(order, scan.name), order)


def _find_split_series(scans: Sequence[ScanFiles]) -> list[ScanFiles]:
    """Mark the scans whose series has slices in other folders that are no copies of theirs."""
    places: dict[str, list[ScanFiles]] = defaultdict(list)
    for scan in scans:
        if scan.series_uid:
            places[scan.series_uid].append(scan)
    return [
        replace(
            scan,
            elsewhere=tuple(
                path
                for other in places[scan.series_uid]
                if other.instance_uids - scan.instance_uids
                for path in other.files
            ),
        )
        if scan.series_uid
        else scan
        for scan in scans
    ]


def _tell_unread(source: Path, paths: Iterable[Path], scans: Iterable[ScanFiles]) -> None:
    """Log the files that may be parts of a scan and are none of the scans' files."""
    used = {path for scan in scans for path in scan.files}
    used |= {path for path in paths if is_itk_file(path) and header_path(path) in used}
    unread = [path for path in paths if path not in used and may_be_scan(path)]
    if unread:
        names = ", ".join(str(path.relative_to(source)) for path in unread[:5])
        more = f" and {len(unread) - 5} more" if len(unread) > 5 else ""
        logger.warning(f"{len(unread)} files are no CT scans that can be read: {names}{more}")


def _is_multiframe(files: Sequence[Path]) -> bool:
    return any("PerFrameFunctionalGroupsSequence" in read_header(path) for path in files)


def _is_scan(path: Path) -> bool:
    """Return True for a file that holds a scan by its ending; the voxels of a header are none."""
    if path.name.lower().endswith(NIFTI_SUFFIXES):
        return True
    return is_itk_file(path) and (path.suffix.lower() != ".img" or not header_path(path).is_file())


def _series_of(folder: Path, name: str, paths: Sequence[Path] | None = None) -> list[ScanFiles]:
    """Return the CT series in one folder; if there are several, their names are numbered.

    A damaged file is kept in the series, so that reading the series reports it.
    """
    series: dict[str, list[Path]] = defaultdict(list)
    instances: dict[str, set[str]] = defaultdict(set)
    unreadable: list[Path] = []
    for path in dicom_files(folder) if paths is None else paths:
        try:
            header = read_header(path)
        except ScanError:
            unreadable.append(path)
            continue
        # The file meta information repeats the class; it survives in a file that was cut off.
        kind = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
        uid = header.get("SeriesInstanceUID")
        if kind in CT_CLASSES and is_scout(header):
            continue  # named with the other files that are not read
        if kind in CT_CLASSES and uid:
            series[str(uid)].append(path)
            instances[str(uid)].add(str(header.get("SOPInstanceUID", "")))
        elif kind in CT_CLASSES or not kind:
            unreadable.append(path)
    # Scouts without a mark, screen saves and dose pictures of class CT lie beside the scan.
    longest = max((len(files) for files in series.values()), default=0)
    if longest >= MIN_SLICES:
        series = {u: f for u, f in series.items() if len(f) >= MIN_SLICES or _is_multiframe(f)}
    groups = {uid: [*files, *unreadable] for uid, files in series.items()}
    if unreadable and not groups:
        groups[""] = unreadable
    return [
        ScanFiles(
            name if len(groups) == 1 else f"{name}_{number}",
            tuple(files),
            is_dicom=True,
            instance_uids=frozenset(instances[uid]),
            series_uid=uid,
        )
        for number, (uid, files) in enumerate(groups.items(), start=1)
    ]
