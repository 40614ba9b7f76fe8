"""Small facts that a later run needs, each in a JSON file of its own below .cache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scans.files import write_atomically


def read_note(path: Path) -> dict[str, Any]:
    """What was noted; empty where nothing was."""
    if not path.is_file():
        return {}
    noted: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return noted


def write_note(path: Path, noted: Mapping[str, Any]) -> None:
    """Replace what was noted, whole or not at all."""
    write_atomically(path, json.dumps(dict(noted)) + "\n")
