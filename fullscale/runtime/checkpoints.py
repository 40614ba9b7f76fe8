"""Checkpoints of a training, verified by checksum, and used by one configuration only.

<folder>/000012-<first half of its SHA-256>.ckpt    the last two, numbered in order of writing
"""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fullscale.runtime.errors import StageError
from fullscale.runtime.files import file_sha256, write_atomically

logger = logging.getLogger(__name__)

NUM_KEPT = 2
NUM_SHOWN = 4
_NAME = re.compile(r"(\d{6})-([0-9a-f]{32})\.ckpt")


class Checkpoints:
    """The checkpoints of one training.

    Args:
        folder: the folder of the checkpoints.
        identity: everything that decides the weights, by name: settings, data, code. A checkpoint
            is loaded only if all of it is the same.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        self._folder = folder
        self._identity = dict(identity)

    def save(self, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint, and remove all older ones but the last.

        Args:
            state: tensors, numbers, strings, and lists and mappings of them.

        Returns:
            The file.

        Raises:
            StageError: it cannot be written; earlier checkpoints stay.
        """
        buffer = io.BytesIO()
        torch.save({"identity": self._identity, "state": dict(state)}, buffer)
        content = buffer.getbuffer()
        digest = hashlib.sha256(content).hexdigest()[:32]
        earlier = self._found()
        number = 1 + int(_NAME.fullmatch(earlier[-1].name)[1]) if earlier else 1  # type: ignore[index]
        path = self._folder / f"{number:06d}-{digest}.ckpt"
        try:
            write_atomically(path, content)
        except OSError as error:
            raise StageError(
                f"no checkpoint could be written to {self._folder}: {error.strerror}; "
                f"{_kept(earlier)}; make room and run again: training continues from there"
            ) from None
        for old in earlier[: len(earlier) - NUM_KEPT + 1]:
            old.unlink(missing_ok=True)
        return path

    def load(self) -> dict[str, Any] | None:
        """Return the state of the newest intact checkpoint of this configuration.

        Tensors are on the CPU. The log names each checkpoint that is not used, with the reason.

        Returns:
            The state, or None if training starts anew.
        """
        for path in reversed(self._found()):
            content = _read(path)
            if content is None:
                logger.warning(
                    f"checkpoint: {path} is damaged; an older checkpoint is used, if one is left"
                )
                continue
            if differences := _differences(content["identity"], self._identity):
                logger.warning(
                    f"checkpoint: {path} is not continued, training starts anew: "
                    + "; ".join(_shorten_list(differences))
                )
                return None
            state: dict[str, Any] = content["state"]
            return state
        return None

    def clear(self) -> None:
        """Remove all checkpoints, after the end of the training."""
        for path in self._found():
            path.unlink(missing_ok=True)

    def _found(self) -> list[Path]:
        """Return the files in the order they were written."""
        return sorted(path for path in self._folder.glob("*.ckpt") if _NAME.fullmatch(path.name))


def _read(path: Path) -> dict[str, Any] | None:
    match = _NAME.fullmatch(path.name)
    if match is None or not file_sha256(path).startswith(match[2]):
        return None
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # it holds more than plain data, so it is not ours
        return None
    return content


def _differences(found: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    return [
        f"{key} was {found.get(key, 'not there')}, is {wanted.get(key, 'not there')}"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]


def _shorten_list(differences: list[str]) -> list[str]:
    """Return the first differences and a count of the others; new code differs in every file."""
    more = len(differences) - NUM_SHOWN
    return differences if more <= 1 else [*differences[:NUM_SHOWN], f"and {more} more"]


def _kept(earlier: list[Path]) -> str:
    return f"the last one is {earlier[-1]}" if earlier else "there is no earlier one"
