"""How the report writes numbers; no other module of the report formats one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fullscale.reporting.results import Summary

NOT_MEASURED = "not measured"

TIED = "\u00a0"
"""A space at which no line breaks."""


@dataclass(frozen=True)
class Metric:
    """A number of summary.json.

    Attributes:
        key: its name there, between `test/` and the organ.
        title: its name for people, with the unit.
        digits: after the point.
    """

    key: str
    title: str
    digits: int

    def read(self, summary: Summary, organ: str, end: str = "") -> float:
        """Its value for an organ, or an `end`, "_low" or "_high", of its interval; NaN without."""
        value = summary.get(f"test/{self.key}{end}/{organ}")
        return math.nan if value is None else float(value)

    def write(self, summary: Summary, organ: str) -> str:
        """Its value for an organ, with the interval where there is one."""
        value, low, high = (self.read(summary, organ, end) for end in ("", "_low", "_high"))
        return with_interval(value, low, high, self.digits)


def number(value: float | None, digits: int, *, sign: bool = False) -> str:
    """A number with so many digits after the point, and a plus where a sign is wanted."""
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    return f"{value:{'+' if sign else ''}.{digits}f}"


def with_interval(
    value: float | None,
    low: float | None,
    high: float | None,
    digits: int,
    *,
    sign: bool = False,
) -> str:
    """A number, and its interval in brackets where both ends are known; no line breaks in it."""
    text = number(value, digits, sign=sign)
    if any(each is None or not math.isfinite(each) for each in (value, low, high)):
        return text
    ends = (number(end, digits, sign=sign) for end in (low, high))
    return f"{text} ({f'{TIED}to{TIED}'.join(ends)})"


def part_of(part: float, whole: float) -> str:
    """A count of another, with the share."""
    if not whole:
        return f"{part:,.0f}{TIED}of{TIED}0"
    return f"{part:,.0f}{TIED}of{TIED}{whole:,.0f} ({number(part / whole, 4)})"


def count(value: float | None) -> str:
    """A whole number."""
    return NOT_MEASURED if value is None or not math.isfinite(value) else f"{value:,.0f}"


def p_value(value: float | None) -> str:
    """A p-value with 2 significant digits."""
    return NOT_MEASURED if value is None or not math.isfinite(value) else f"{value:.2g}"


def percent(value: float) -> str:
    """A share such as a confidence, in percent without digits after the point."""
    return f"{value:.0%}"
