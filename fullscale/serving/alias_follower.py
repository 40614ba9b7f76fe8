"""Keep the model version loaded that an alias points to, and switch when the alias moves."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from fullscale.prediction.segmentation import Model
from fullscale.serving.model_lookup import find_model, find_version_number
from fullscale.serving.row_segmenter import RowSegmenter
from fullscale.serving.upload import ScanLimits

logger = logging.getLogger(__name__)


class AliasFollower:
    """A loaded model that is replaced when its alias points to another version.

    Attributes:
        model_name: as given.
        current: segmenter of the version in use. Replaced as one object, so a request finishes
            with the version that it started with.
        loaded_at_s: when that version was loaded, in seconds since 1970.

    Args:
        model_name: as `fullscale.serving.model_lookup.find_model` takes it. Only a name with an
            alias can change its version.
        root: the project's root folder.
        limits: limits on the scans of a request.
        device: as `fullscale.prediction.predictor.pick_device` takes it.
        precision: as `fullscale.prediction.predictor.pick_precision` takes it.

    Raises:
        StageError: there is no such model or device, or the model's files were altered.
    """

    def __init__(
        self,
        model_name: str,
        root: Path,
        limits: ScanLimits,
        device: str = "auto",
        precision: str = "auto",
    ) -> None:
        self.model_name = model_name
        self._root, self._limits = root, limits
        self._device, self._precision = device, precision
        self._last_error = ""
        self._stopped = threading.Event()
        self._load(find_model(model_name, root))

    def check(self) -> None:
        """Load the version that the name points to now, unless it is loaded already.

        If that fails, keep the present version and log the error, once for each new error.
        """
        try:
            number = find_version_number(self.model_name, self._root)
            if number != self.current.model.version:
                self._load(find_model(self.model_name, self._root))
                logger.info(f"serve: {self.model_name} is version {self.current.model.version} now")
            self._last_error = ""
        except Exception as error:  # any error: the server must go on answering requests
            text = f"{type(error).__name__}: {error}"
            if text != self._last_error:
                logger.warning(
                    f"serve: version {self.current.model.version} stays in use, because loading "
                    f"{self.model_name} fails: {text}"
                )
            self._last_error = text

    def start(self, interval_s: float) -> None:
        """Call `check` every `interval_s` seconds in a background thread, until `close`."""

        def watch() -> None:
            while not self._stopped.wait(interval_s):
                self.check()

        threading.Thread(target=watch, name="alias-follower", daemon=True).start()

    def close(self) -> None:
        """Stop the background thread."""
        self._stopped.set()

    def _load(self, model: Model) -> None:
        self.current = RowSegmenter(model, self._limits, self._device, self._precision)
        self.loaded_at_s = time.time()
