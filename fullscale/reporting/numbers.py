"""Numbers and results as text, for all pages and tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fullscale.evaluation.score_files import Summary

NOT_MEASURED = "not measured"

TIED = "\u00a0"
"""No-break space."""


@dataclass(frozen=True)
class Metric:
    """A metric of summary.json.

    Attributes:
        key: the part between `test/` and the organ.
        title: heading, with the unit.
        digits: after the point.
    """

    key: str
    title: str
    digits: int

    def read(self, summary: Summary, organ: str, end: str = "") -> float:
        """Return the value for an organ, or the end of its interval; NaN if not measured.

        Args:
            summary: of a network.
            organ: the organ.
            end: "" for the value, "_low" or "_high" for an end of the interval.
        """
        value = summary.get(f"test/{self.key}{end}/{organ}")
        return math.nan if value is None else float(value)

    def write(self, summary: Summary, organ: str) -> str:
        """Return the value for an organ as text, with its interval if known."""
        value, low, high = (self.read(summary, organ, end) for end in ("", "_low", "_high"))
        return with_interval(value, low, high, self.digits)


def number(value: float | None, digits: int, *, sign: bool = False) -> str:
    """Format a number with `digits` after the point; with `sign`, also a plus is written."""
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
    """Format a number, with its interval in brackets if both ends are known."""
    text = number(value, digits, sign=sign)
    if any(each is None or not math.isfinite(each) for each in (value, low, high)):
        return text
    ends = (number(end, digits, sign=sign) for end in (low, high))
    return f"{text} ({f'{TIED}to{TIED}'.join(ends)})"


def part_of(part: float, whole: float) -> str:
    """Format a count out of another count, with the share."""
    if not whole:
        return f"{part:,.0f}{TIED}of{TIED}0"
    return f"{part:,.0f}{TIED}of{TIED}{whole:,.0f} ({number(part / whole, 4)})"


def count(value: float | None) -> str:
    """Format a whole number."""
    return NOT_MEASURED if value is None or not math.isfinite(value) else f"{value:,.0f}"


def p_value(value: float | None) -> str:
    """Format a p-value with 2 significant digits."""
    return NOT_MEASURED if value is None or not math.isfinite(value) else f"{value:.2g}"


def result_word(criterion: Mapping[str, Any]) -> str:
    """Return the result of a criterion of gate.json in a word."""
    return "PASS" if criterion["passed"] else "FAIL"


def deployed_title(content: Mapping[str, Any]) -> str:
    """Return in words what a pass registers; "" where an older version wrote the content.

    Args:
        content: of summary.json or gate.json.
    """
    seeds, members = content.get("seeds", []), content.get("members", [])
    if len(members) > 1:
        listed = ", ".join(str(seed) for seed in members)
        return f"the ensemble of {len(members)} trainings, seeds {listed}"
    if len(seeds) > 1:
        return f"the training with seed {members[0]}, of {len(seeds)} the best in validation"
    return f"the training with seed {members[0]}" if members else ""


def seed_lines(summaries: Mapping[str, Summary], organs: Sequence[str]) -> list[str]:
    """Return how Dice differs between the trainings of a network, a line for each network.

    Networks that were trained once are left out.

    Args:
        summaries: network to the content of its summary.json.
        organs: in this order.
    """
    mean, spread = Metric("dice_seeds_mean", "", 4), Metric("dice_seeds_sd", "", 4)
    lines = []
    for network, summary in summaries.items():
        found = [
            f"{organ} {number(mean.read(summary, organ), mean.digits)} "
            f"(standard deviation {number(spread.read(summary, organ), spread.digits)})"
            for organ in organs
        ]
        if len(seeds := summary.get("seeds", [])) > 1:
            lines.append(
                f"Mean Dice of {len(seeds)} trainings of {network}: {', '.join(found)}; in the "
                f"table: {deployed_title(summary)}"
            )
    return lines


def verdict_notes(verdict: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the sentences below a verdict's criteria; a verdict of an older version has none."""
    return tuple(verdict.get("notes", ()))


def percent(value: float) -> str:
    """Format a share such as a confidence as a whole number of percent."""
    return f"{value:.0%}"
