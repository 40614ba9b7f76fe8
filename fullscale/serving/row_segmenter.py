"""Segment a table of scans: the input and output of a registered model."""

# nibabel carries no types for what is called here.
# mypy: allow-untyped-calls
from __future__ import annotations

import base64
import gzip
import json
import tempfile
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

from fullscale.prediction.predictor import pick_device
from fullscale.prediction.segmentation import Model, read_batch_size, segment_scan
from fullscale.runtime.errors import ScanError
from fullscale.scans.nifti_writer import write_on_grid
from fullscale.scans.volume import Volume, read_image
from fullscale.serving.input_checks import check_scan
from fullscale.serving.result_json import result_to_json
from fullscale.serving.upload import ScanLimits, unpack_file, unpack_text

COLUMNS = ("scan", "path")
ANSWERS = ("mask", "statistics")


class RowSegmenter:
    """A model that segments the scans in a table.

    Args:
        model: network, threshold and origin.
        limits: limits on the scans.
        device: as `fullscale.prediction.predictor.pick_device` takes it.
        precision: as `fullscale.prediction.predictor.pick_precision` takes it.

    Raises:
        StageError: there is no such device.
    """

    def __init__(
        self,
        model: Model,
        limits: ScanLimits,
        device: str = "auto",
        precision: str = "auto",
    ) -> None:
        self.model = model
        self._limits = limits
        where = pick_device(device)
        batch_size = read_batch_size("auto", model.trained.description, where)
        self._predictor = model.make_predictor(batch_size, where, precision)

    def segment(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Segment each row's scan.

        Args:
            rows: column `scan`, base64 of a .nii or .nii.gz file, or column `path`, the path of
                such a file below `ScanLimits.scan_root`. If both columns exist, each row fills one.

        Returns:
            Column `mask`, base64 of a .nii.gz label map on the scan's own grid, and column
            `statistics`, JSON as `fullscale predict --statistics` writes it.

        Raises:
            ScanError: a scan cannot be used; the message names the row.
            StageError: out of memory.
        """
        columns = [rows[name].tolist() if name in rows else [None] * len(rows) for name in COLUMNS]
        answers: list[tuple[str, str]] = []
        for number, (text, path) in enumerate(zip(*columns, strict=True)):
            try:
                answers.append(self._segment(number, text, path))
            except ScanError as error:
                found = f"row {number}: {error.found}"
                raise ScanError(error.code, found, error.wanted, error.cure) from None
        return pd.DataFrame(answers, columns=list(ANSWERS))

    def _segment(self, number: int, text: object, path: object) -> tuple[str, str]:
        if _is_given(text) == _is_given(path):
            raise ScanError(
                "row",
                "both scan and path" if _is_given(text) else "neither scan nor path",
                "one of them",
                "send the scan as base64 in scan, or name a file in path",
            )
        with tempfile.TemporaryDirectory() as folder:
            file, mask = Path(folder) / "scan.nii", Path(folder) / "mask.nii.gz"
            with warnings.catch_warnings(action="ignore"):  # warnings may quote patient data
                if _is_given(text):
                    unpack_text(text, file, self._limits)
                else:
                    unpack_file(path, file, self._limits)
                scan = _read(file)
            input_warnings = check_scan(scan, self._predictor.description)
            found = segment_scan(self._predictor, scan)
            write_on_grid(mask, found.label_ZYX, scan.geometry, file)
            name = str(path) if _is_given(path) else f"row {number}"
            statistics = result_to_json(name, scan, found, input_warnings, self.model)
            return base64.b64encode(mask.read_bytes()).decode(), json.dumps(statistics)


def example_rows() -> pd.DataFrame:
    """Return one row: a synthetic body with a spine, small enough to store with every version."""
    _, y, x = np.ogrid[-1:1:32j, -1:1:48j, -1:1:48j]
    values_ZYX = np.full((32, 48, 48), -1000, dtype=np.int16)
    values_ZYX[np.broadcast_to(y**2 / 0.5 + x**2 / 0.8 < 1, values_ZYX.shape)] = 40
    values_ZYX[np.broadcast_to((y + 0.5) ** 2 + x**2 < 0.02, values_ZYX.shape)] = 500
    affine = np.diag([8.0, 8.0, 8.0, 1.0])
    image = nib.Nifti1Image(values_ZYX.transpose(2, 1, 0), affine)
    content = gzip.compress(image.to_bytes(), mtime=0)
    return pd.DataFrame({COLUMNS[0]: [base64.b64encode(content).decode()]})


def _is_given(value: object) -> bool:
    """Return True unless the field of the table is empty: None or NaN."""
    return not (value is None or (isinstance(value, float) and value != value))


def _read(file: Path) -> Volume:
    """Read the unpacked scan; error messages do not show the path of the temporary file."""
    try:
        return read_image(file)
    except ScanError as error:
        found = error.found.replace(str(file), "the scan")
        raise ScanError(error.code, found, error.wanted, error.cure) from None
