"""The model that a server answers with: another one as soon as another one is promoted."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from fullscale.prediction.segmentation import Model
from fullscale.runtime.console import say
from fullscale.serving.model_lookup import find_model, find_number
from fullscale.serving.row_segmenter import RowSegmenter
from fullscale.serving.upload import Limits


class Served:
    """A model by its name, whichever version that is now.

    Attributes:
        current: what requests are answered with. It is replaced as a whole, so a request that has
            begun is finished by the version that it began with.
        since_s: when that version was loaded, in seconds since 1970.

    Args:
        wanted: as `fullscale.serving.model_lookup.find_model`; only an alias can move.
        root: the project.
        limits: what a request may ask for.
        device: as `fullscale.prediction.predictor.pick_device`.

    Raises:
        StageError: there is no such model now, its files are not what they were, or there is no
            such device.
    """

    def __init__(self, wanted: str, root: Path, limits: Limits, device: str = "auto") -> None:
        self.wanted = wanted
        self._root, self._limits, self._device = root, limits, device
        self._complaint = ""
        self._stopped = threading.Event()
        self._use(find_model(wanted, root))

    def look(self) -> None:
        """Load the version that the name stands for now, if it is another one.

        Where that fails, the present one stays in use, and the log says why, once.
        """
        try:
            number = find_number(self.wanted, self._root)
            if number != self.current.model.version:
                self._use(find_model(self.wanted, self._root))
                say(f"serve: {self.wanted} is version {self.current.model.version} now")
            self._complaint = ""
        except Exception as error:  # whatever it is, requests go on
            complaint = f"{type(error).__name__}: {error}"
            if complaint != self._complaint:
                kept = self.current.model.version
                say(f"serve: version {kept} stays in use, for {self.wanted} fails: {complaint}")
            self._complaint = complaint

    def follow(self, every_s: float) -> None:
        """Look again and again, in the background, until `close`."""

        def watch() -> None:
            while not self._stopped.wait(every_s):
                self.look()

        threading.Thread(target=watch, name="follow", daemon=True).start()

    def close(self) -> None:
        """Look no more."""
        self._stopped.set()

    def _use(self, model: Model) -> None:
        self.current = RowSegmenter(model, self._limits, self._device)
        self.since_s = time.time()
