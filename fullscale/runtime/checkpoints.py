"""Checkpoints of a training: whole or absent, verified, and of one configuration only.

<folder>/000012-<first half of its SHA-256>.ckpt    the last two, numbered as they were written
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fullscale.runtime.console import say
from fullscale.runtime.errors import StageError
from fullscale.runtime.files import file_sha256, write_atomically

KEPT = 2
_NAME = re.compile(r"(\d{6})-([0-9a-f]{32})\.ckpt")


class Checkpoints:
    """The checkpoints of one training.

    Args:
        folder: where they are kept.
        identity: all that decides the weights, by name: settings, data, code. A checkpoint is
            continued only where every one of them is the same.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        self._folder = folder
        self._identity = dict(identity)

    def save(self, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint and let go of all but the one before.

        Args:
            state: tensors, numbers, texts, and lists and mappings of them.

        Raises:
            StageError: the disk does not take it; the checkpoints before are untouched.
        """
        buffer = io.BytesIO()
        torch.save({"identity": self._identity, "state": dict(state)}, buffer)
        content = buffer.getbuffer()
        digest = hashlib.sha256(content).hexdigest()[:32]
        before = self._found()
        number = 1 + int(_NAME.fullmatch(before[-1].name)[1]) if before else 1  # type: ignore[index]
        path = self._folder / f"{number:06d}-{digest}.ckpt"
        try:
            write_atomically(path, content)
        except OSError as error:
            raise StageError(
                f"no checkpoint could be written to {self._folder}: {error.strerror}; "
                f"{_kept(before)}; make room and run again: training goes on from there"
            ) from None
        for old in before[: len(before) - KEPT + 1]:
            old.unlink(missing_ok=True)
        return path

    def load(self) -> dict[str, Any] | None:
        """The state of the newest whole checkpoint of this configuration, tensors on the CPU.

        What is passed over is named on stderr, with the reason. None when training starts anew.
        """
        for path in reversed(self._found()):
            content = _read(path)
            if content is None:
                say(
                    f"checkpoint: {path} is damaged; the checkpoint before it is used, if there is "
                    "one"
                )
                continue
            if differences := _differences(content["identity"], self._identity):
                say(
                    f"checkpoint: {path} is not continued, training starts anew: "
                    + "; ".join(differences)
                )
                return None
            state: dict[str, Any] = content["state"]
            return state
        return None

    def clear(self) -> None:
        """Remove all checkpoints: the training is over."""
        for path in self._found():
            path.unlink(missing_ok=True)

    def _found(self) -> list[Path]:
        """Checkpoints in the order of their writing."""
        return sorted(path for path in self._folder.glob("*.ckpt") if _NAME.fullmatch(path.name))


def _read(path: Path) -> dict[str, Any] | None:
    match = _NAME.fullmatch(path.name)
    if match is None or not file_sha256(path).startswith(match[2]):
        return None
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # of what is no plain data: nothing of ours
        return None
    return content


def _differences(found: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    return [
        f"{key} was {found.get(key, 'not there')}, is {wanted.get(key, 'not there')}"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]


def _kept(before: list[Path]) -> str:
    return f"the last one is {before[-1]}" if before else "there is none before it"
