"""Names of cases: readable, safe as file names, and never one name for two."""

from __future__ import annotations

import hashlib
import re
import unicodedata

from fullscale.scans.cohort import CASE_NAME

_DIGEST_CHARS = 8
_READABLE_CHARS = 64 - 1 - _DIGEST_CHARS


def name_case(text: str) -> str:
    """Return the name of a case from its name in a source, a function of that text alone.

    A text that matches `CASE_NAME` stays as it is. Any other becomes its readable part and the
    first digits of its SHA-256, because "patient 1" and "patient.1" have the same readable part.

    Args:
        text: name of a file or folder, or a path in the source with "/".
    """
    if CASE_NAME.fullmatch(text):
        return text
    # macOS stores an accent as a character of its own, other systems do not.
    whole = unicodedata.normalize("NFC", text)
    digest = hashlib.sha256(whole.encode("utf-8", "surrogateescape")).hexdigest()
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    readable = safe_name(plain)[:_READABLE_CHARS] or "case"
    return f"{readable}_{digest[:_DIGEST_CHARS]}"


def safe_name(text: str) -> str:
    """Return a case name made from the name of a folder or file; it may be empty."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_-")[:64]
