"""Write the plans of docs/plan.md, made for cohorts as docs/cohorts holds their measurements.

python -m docs.make_plans
python -m docs.make_plans --measure FOLDER NAME    # of a cohort, into docs/cohorts/NAME

Machine and speeds are fixed, so the plans are the same on every machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from fullscale.label_names import resolve_organs
from fullscale.params import Params, load_params
from fullscale.planning.draft import Draft, get_value
from fullscale.planning.fingerprint import (
    NAME,
    Reading,
    measure_cohort,
    read_fingerprint,
    write_fingerprint,
)
from fullscale.planning.machine import GIB, Machine
from fullscale.planning.planner import Plan, list_cases, list_tested, make_plan, plan_split
from fullscale.planning.step_time import Speed
from fullscale.runtime.files import write_atomically
from fullscale.runtime.markdown import format_table
from fullscale.scans.cohort import read_cohort
from fullscale.versioning.provenance import read_data_version
from tasks.commands.plan import describe, plain

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs/plan.md"
COHORTS = ROOT / "docs/cohorts"
START, END = "<!-- plans -->\n", "<!-- end of plans -->"
TITLES = {
    "sample": "the sample",
    "real": "2 real scans",
    "five": "5 scans",
    "mixed": "300 headers",
}
HOURS = 8.0
MACHINE = Machine(num_cores=2, memory_bytes=8 * GIB)
TRAINED_PER_S = {"unet": 58.8, "unet3plus": 17.8}
"""Slices in a second at `SIZE_PX` and `WIDTH` on two cores: docs/benchmarks.md, Training."""
SIZE_PX, WIDTH = 96, 8
READ_S = 1.7e-8
"""Seconds to read and measure a voxel: docs/plan.md."""


def speed_of(name: str, params: Params, _batch_size: int) -> Speed:
    """Return a network's speed on the machine of the plans, by its operations."""
    factor = (params.slice.size_px / SIZE_PX * params.train.width / WIDTH) ** 2
    training_s = factor / TRAINED_PER_S[name]
    return Speed(training_s, training_s / 3)  # a step is about three forward passes


def measure(folder: Path, name: str) -> None:
    """Write the measurements of a cohort: cases.csv and fingerprint.json.

    Args:
        folder: of the cohort.
        name: key of `TITLES`.
    """
    params, cohort = load_params(ROOT / "params.yaml"), read_cohort(folder)
    organs = resolve_organs(params.organs, cohort.labels)
    cases = list_cases(cohort, organs)
    tested = list_tested(plan_split(Draft(params, ()), cases))
    data_version = read_data_version(ROOT) if name == "sample" else "none"
    reading = measure_cohort(cohort, organs, tested, data_version)
    write_atomically(COHORTS / name / "cases.csv", cases.to_csv(index=False))
    write_fingerprint(COHORTS / name / NAME, reading.fingerprint)


def plan_of(name: str) -> Plan:
    """Return the plan for a cohort by its measurements.

    Raises:
        ValueError: the measurements are of another test set.
    """
    draft = Draft(load_params(ROOT / "params.yaml"), ())
    cases = pd.read_csv(COHORTS / name / "cases.csv", keep_default_na=False)
    split = plan_split(draft, cases)
    fingerprint = read_fingerprint(COHORTS / name / NAME)
    untested = set(cases["case"]) - set(list_tested(split))
    if fingerprint is None or untested != {case.case for case in fingerprint.cases}:
        raise ValueError(f"docs/cohorts/{name} is of another test set: measure it again")
    return make_plan(draft, split, Reading(fingerprint, READ_S), MACHINE, HOURS, speed_of)


def render() -> Iterator[str]:
    """Yield the lines of the section."""
    plans = {name: plan_of(name) for name in TITLES}
    params = load_params(ROOT / "params.yaml")
    values = {
        name: {each.key: plain(each.value) for each in plan.proposals if each.is_change}
        for name, plan in plans.items()
    }
    keys = dict.fromkeys(each.key for plan in plans.values() for each in plan.proposals)
    yield from format_table(
        ("parameter", "params.yaml", *TITLES.values()),
        [
            (
                f"`{key}`",
                plain(get_value(params, key)),
                *(found.get(key, "as now") for found in values.values()),
            )
            for key in keys
        ],
    )
    lines = {name: list(describe(plan)) for name, plan in plans.items()}
    for name, own in lines.items():
        others = [set(each) for other, each in lines.items() if other != name]
        yield f"\n{TITLES[name].capitalize()}:\n"
        yield from (f"- {line}" for line in own if not all(line in each for each in others))


def fill(text: str) -> str:
    """Return the text of the page with the section between its markers replaced."""
    before, rest = text.split(START)
    return before + START + "\n".join(render()) + "\n" + END + rest.split(END)[1]


def main() -> None:
    """Measure a cohort, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "NAME"))
    args = parser.parse_args()
    if args.measure:
        measure(Path(args.measure[0]), args.measure[1])
    else:
        write_atomically(TARGET, fill(TARGET.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
