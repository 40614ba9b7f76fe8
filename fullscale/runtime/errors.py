"""Errors that a user can fix: of a scan on disk, and of a stage; and their text on one line."""

from __future__ import annotations

EX_TEMPFAIL = 75  # sysexits.h: the same command may succeed later


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
    """A stage cannot continue for a reason the user can fix; the message says which and how.

    Attributes:
        exit_code: the program's exit code when the error ends it.
    """

    exit_code = 1


class TransientStageError(StageError):
    """A stage failed because something it needs is away; the same command may succeed later."""

    exit_code = EX_TEMPFAIL


def shorten(error: object, max_chars: int = 200) -> str:
    """Return the text of an error on one line of at most `max_chars` characters.

    A longer text keeps its beginning and its end, where libraries put the cause.
    """
    text = " ".join(str(error).split())
    if len(text) <= max_chars:
        return text
    mark = " ... "
    num_first = 2 * max_chars // 5
    return text[:num_first] + mark + text[len(text) - (max_chars - num_first - len(mark)) :]
