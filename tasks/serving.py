"""The registered model: MLflow runs this file when it loads a version.

A row holds a scan as base64 of a NIfTI file, .nii or .nii.gz; the answer holds the label map as
base64 of a .nii.gz on the scan's own grid, and statistics as JSON.
"""

from __future__ import annotations

import base64
import binascii
import json
import tempfile
from pathlib import Path
from typing import Any

import mlflow.models
import numpy as np
import pandas as pd
from mlflow.pyfunc.model import PythonModel

from scans.errors import ScanError
from scans.volume import read_image, write_volume
from tasks.predict import Predictor
from tasks.trained import load_trained

GZIP_MAGIC = b"\x1f\x8b"


class OrganSegmenter(PythonModel):
    """Segments organs in CT scans."""

    def load_context(self, context: Any) -> None:
        """Rebuild the network from the version's own files."""
        folder = Path(context.artifacts["weights"]).parent
        config = context.model_config
        self._predictor = Predictor(load_trained(folder), config["threshold"], config["batch_size"])

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Segment each row's scan.

        Args:
            context: unused.
            model_input: column `scan`.
            params: unused.

        Returns:
            Columns mask and statistics, one row per scan.

        Raises:
            ScanError: a scan cannot be used; the message names the row.
        """
        answers = []
        for row, scan in enumerate(model_input["scan"]):
            try:
                answers.append(self._segment(scan))
            except ScanError as error:
                raise ScanError(
                    error.code, f"row {row}: {error.found}", error.wanted, error.cure
                ) from None
        return pd.DataFrame(answers, columns=["mask", "statistics"])

    def _segment(self, scan: str) -> tuple[str, str]:
        try:
            content = base64.b64decode(scan, validate=True)
        except (binascii.Error, TypeError):
            raise ScanError(
                "not_base64", "text that is not base64", "base64 of a NIfTI file", "encode the file"
            ) from None
        with tempfile.TemporaryDirectory() as folder:
            suffix = ".nii.gz" if content.startswith(GZIP_MAGIC) else ".nii"
            source, target = Path(folder) / f"scan{suffix}", Path(folder) / "mask.nii.gz"
            source.write_bytes(content)
            volume = read_image(source)
            label_map = self._predictor.segment(volume).label_map
            write_volume(target, volume.to_own_grid(label_map), volume.geometry.own_affine)
            mask = base64.b64encode(target.read_bytes()).decode()
        voxel_ml = float(np.prod(volume.spacing_mm)) / 1000
        organs = self._predictor.description.organs
        statistics = {
            organ: {"volume_ml": round(float((label_map == ids[0]).sum()) * voxel_ml, 3)}
            for organ, ids in organs.items()
        }
        return mask, json.dumps(statistics)


mlflow.models.set_model(OrganSegmenter())
