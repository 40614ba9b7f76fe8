"""Errors that a user can fix: of a scan on disk, and of a stage."""

from __future__ import annotations


class ScanError(ValueError):
    """A file, pair, case or cohort that cannot be used.

    Args:
        code: stable name of the check that failed, a key of `fullscale.scans.checks.CHECKS`.
        found: what was found, with the file or value in question.
        wanted: what was expected instead.
        cure: what the user can do about it.
    """

    def __init__(self, code: str, found: str, wanted: str, cure: str) -> None:
        super().__init__(code, found, wanted, cure)
        self.code = code
        self.found = found
        self.wanted = wanted
        self.cure = cure

    def __str__(self) -> str:
        text = f"{self.code}: found {self.found}; wanted {self.wanted}; {self.cure}"
        return " ".join(text.split())


class StageError(Exception):
    """Work cannot go on for a reason the user can cure; the message says which and how."""
