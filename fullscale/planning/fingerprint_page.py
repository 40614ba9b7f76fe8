"""The fingerprint of a cohort as a section of the report and as a page with pictures of scans."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fullscale.planning.fingerprint import (
    PERCENTILES,
    CaseFacts,
    Fingerprint,
    OrganFacts,
    Reading,
)
from fullscale.reporting.overlays import Gallery
from fullscale.reporting.page import render
from fullscale.reporting.sections import ReportSection
from fullscale.reporting.style import INK, SERIES_STYLES, Picture, new_chart, to_svg_uri
from fullscale.reporting.tables import Table
from fullscale.runtime.files import write_atomically

PAGE = "fingerprint.html"
MAX_PICTURES = 12
MAKE_IT = "run `fullscale plan`"


def fingerprint_section(fingerprint: Fingerprint | None, data_version: str) -> ReportSection:
    """Return the section of the report.

    Args:
        fingerprint: None if there is none.
        data_version: MD5 of the scans that the report is about.
    """
    key, title = "fingerprint", "Fingerprint of the scans"
    if fingerprint is None:
        return ReportSection(key, title, notes=(f"No fingerprint: {MAKE_IT}.",))
    is_old = fingerprint.data_version != data_version
    return ReportSection(
        key,
        title,
        text=(
            f"{fingerprint.num_cases} scans of {fingerprint.num_patients} patients. Measured "
            f"without the {fingerprint.num_tested} test scans: headers of "
            f"{len(fingerprint.cases)}, voxels of {len(fingerprint.measured)} of them. In the "
            "tables: median, lowest and highest of the scans. Surroundings of an organ are the "
            "soft tissue within 10 mm.",
        ),
        tables=(_scan_table(fingerprint), _organ_table(fingerprint)),
        pictures=tuple(_histograms(fingerprint)),
        notes=(f"The fingerprint is of other scans: {MAKE_IT}.",) if is_old else (),
    )


def write_page(reports: Path, reading: Reading, title: str) -> None:
    """Write the page, with pictures of some of the measured scans.

    Args:
        reports: folder of the page.
        reading: the fingerprint and the pictures.
        title: name of the cohort.
    """
    fingerprint, names = reading.fingerprint, list(reading.pictures)
    section = fingerprint_section(fingerprint, fingerprint.data_version)
    places = np.linspace(0, len(names) - 1, min(MAX_PICTURES, len(names))).round()
    pictures = tuple(
        Picture(
            "data:image/png;base64," + base64.b64encode(reading.pictures[name]).decode("ascii"),
            f"Slice of {name} with most labelled voxels, labels outlined",
            name,
        )
        for name in (names[int(place)] for place in places)
    )
    scans = ReportSection("scans", "Scans", galleries=(Gallery("Outside the test set", pictures),))
    headline = f"{fingerprint.num_cases} scans: of {fingerprint.num_patients} patients"
    page = render([section, scans], f"Fingerprint of {title}", [], "none", headline)
    write_atomically(reports / PAGE, page)


def _scan_table(fingerprint: Fingerprint) -> Table:
    cases, measured = fingerprint.cases, fingerprint.measured
    rows = {
        "slice spacing, mm": [case.spacing_mm[0] for case in cases],
        "pixel spacing, mm": [case.spacing_mm[1] for case in cases],
        "slices": [float(case.shape_ZYX[0]) for case in cases],
        "height, mm": [case.height_mm for case in cases],
        "trunk from front to back, mm": [case.trunk_mm[0] for case in measured if case.trunk_mm],
        "trunk from left to right, mm": [case.trunk_mm[1] for case in measured if case.trunk_mm],
        "slices without organ": [float(case.num_organ_free or 0) for case in measured],
    }
    return Table(
        "Scans",
        ("measure", "median", "lowest", "highest"),
        tuple((name, *_spread(values)) for name, values in rows.items()),
        1,
    )


def _organ_table(fingerprint: Fingerprint) -> Table:
    rows = []
    for organ, count in fingerprint.annotated.items():
        facts = _facts_of(fingerprint.measured, organ)
        annotated = f"{count.num_cases} scans, {count.num_patients} patients"
        volumes = _spread([each.volume_ml for each in facts])
        inside, around = (_median_range(facts, name) for name in ("inside_hu", "around_hu"))
        volume = f"{volumes[0]} ({volumes[1]} to {volumes[2]})" if facts else volumes[0]
        rows.append((organ, annotated, volume, inside, around))
    return Table(
        "Organs",
        ("organ", "annotated", "volume, ml", "HU inside, 5 to 95 %", "HU around, 5 to 95 %"),
        tuple(rows),
        1,
    )


def _facts_of(cases: Sequence[CaseFacts], organ: str) -> list[OrganFacts]:
    found = [case.organs[organ] for case in cases if organ in case.organs]
    return [each for each in found if each.volume_ml]


def _median_range(facts: Sequence[OrganFacts], name: str) -> str:
    known = [getattr(each, name) for each in facts if getattr(each, name)]
    if not known:
        return "not measured"
    low, high = np.median(known, axis=0)[[PERCENTILES.index(5), PERCENTILES.index(95)]]
    return f"{low:.0f} to {high:.0f}"


def _spread(values: Sequence[float]) -> tuple[str, str, str]:
    if not values:
        return "not measured", "", ""
    return f"{np.median(values):.4g}", f"{min(values):.4g}", f"{max(values):.4g}"


def _histograms(fingerprint: Fingerprint) -> Iterator[Picture]:
    cases, measured = fingerprint.cases, fingerprint.measured
    yield _histogram("Slice spacing", "mm", {"scans": [case.spacing_mm[0] for case in cases]})
    trunks = [case.trunk_mm[1] for case in measured if case.trunk_mm]
    yield _histogram("Trunk from left to right", "mm", {"scans": trunks})
    facts = {organ: _facts_of(measured, organ) for organ in fingerprint.organs}
    yield _histogram(
        "Volume of organs", "ml", {o: [each.volume_ml for each in facts[o]] for o in facts}
    )
    middle = PERCENTILES.index(50)
    yield _histogram(
        "Median HU of organs",
        "HU",
        {o: [each.inside_hu[middle] for each in facts[o] if each.inside_hu] for o in facts},
    )


def _histogram(title: str, unit: str, series: dict[str, list[float]]) -> Picture:
    figure, axes = new_chart(title)
    styles = [SERIES_STYLES[place % len(SERIES_STYLES)] for place in range(len(series))]
    axes.hist(
        list(series.values()),
        bins=12,
        color=[style.colour for style in styles],
        label=list(series),
    )
    axes.set_xlabel(unit)
    axes.set_ylabel("scans")
    if len(series) > 1:
        axes.legend(frameon=False, labelcolor=INK)
    known = [f"{name} {np.median(values):.4g}" for name, values in series.items() if values]
    return Picture(to_svg_uri(figure), f"Histogram: {title}; median {', '.join(known)} {unit}")
