"""Distinguish generated descriptions from those that a person wrote or changed."""

from __future__ import annotations

import hashlib
import re

_MARK = "<!-- fullscale {digest} -->"
_MARKED = re.compile(r"(?P<text>.*)\n\n<!-- fullscale (?P<digest>[0-9a-f]{16}) -->", re.DOTALL)


def is_ours(description: str | None) -> bool:
    """Return whether a description is empty, or generated and not changed since."""
    found = _MARKED.fullmatch(description) if description else None
    return not description or (found is not None and found["digest"] == _digest(found["text"]))


def sign(text: str) -> str:
    """Return the text with its digest in a comment, which no page shows."""
    return f"{text}\n\n{_MARK.format(digest=_digest(text))}"


def unsign(text: str) -> str:
    """Return a text without the digest that `sign` added."""
    found = _MARKED.fullmatch(text)
    return found["text"] if found else text


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
