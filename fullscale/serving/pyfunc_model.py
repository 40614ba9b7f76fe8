"""The registered model as MLflow loads it: MLflow runs this file."""

from __future__ import annotations

from typing import Any

import mlflow.models
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_EXHAUSTED
from mlflow.pyfunc.model import PythonModel

from fullscale.prediction.network_files import digest_weights, find_packaged, load_members
from fullscale.prediction.segmentation import Model
from fullscale.runtime.errors import ScanError, StageError
from fullscale.serving.row_segmenter import RowSegmenter
from fullscale.serving.upload import ScanLimits


class OrganSegmenter(PythonModel):
    """Segment organs in CT scans; see `fullscale.serving.row_segmenter.RowSegmenter`."""

    def load_context(self, context: Any) -> None:
        """Load the network from the files of the registered version."""
        # What MLmodel lists, not what is there: a member that is lost is an error.
        folders = find_packaged(context.artifacts)
        trained = load_members(folders)
        model = Model(
            name=trained.description.name,
            version=None,  # MLflow does not pass the number of the version
            weights_sha256=digest_weights(folders),
            threshold=context.model_config["threshold"],
            trained=trained,
            gate=context.model_config["gate"],
            refine=context.model_config["refine"],
        )
        self._segmenter = RowSegmenter(model, ScanLimits.from_environment())

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Segment each row's scan.

        Args:
            context: unused.
            model_input: rows, as `RowSegmenter.segment` takes them.
            params: unused.

        Raises:
            MlflowException: a scan cannot be used (HTTP status 400), or memory ran out (429).
        """
        try:
            return self._segmenter.segment(model_input)
        except ScanError as error:
            raise MlflowException(str(error), INVALID_PARAMETER_VALUE) from None
        except StageError as error:
            raise MlflowException(str(error), RESOURCE_EXHAUSTED) from None


mlflow.models.set_model(OrganSegmenter())
