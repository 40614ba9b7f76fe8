"""Measure a GPU in at most 8 minutes, without network; run it from the project's root folder.

    python -m benchmarks.gpu --out build/gpu
    python -m benchmarks.gpu --out build/gpu --device cpu --quick

Each part is a process with a time limit. It writes DIR/PART.json after each measure, and an error
in place of a result. DIR/summary.md is written at the end.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.settings import Report, Settings, describe
from fullscale.runtime.files import write_atomically
from fullscale.runtime.markdown import escape_pipes, format_table

PARTS = {"agreement": 50, "networks": 200, "scan": 60, "training": 80, "pipeline": 90}
"""Module of this folder to its limit in seconds: 8 minutes in all."""
WHOLE = "whole part"
"""Measure that a part writes at its end, also where it failed."""
ANCHORS = (
    ("UNet3P on one A100, training", "26 images/s"),
    ("UNet3P on eight A100, training", "423 images/s"),
    ("UNet3P on one A100, inference", "104 images/s"),
    ("TotalSegmentator on an RTX 3090, a scan", "34 to 77 s"),
)
"""Published figures of others, to read the own ones by: other sizes, data and programs."""


def main() -> None:
    """Run the parts, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the program")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this one")
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    settings = Settings(args.device)
    if args.quick:
        settings = settings.quick()
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    parts = args.part or list(PARTS)
    for name in parts:
        run_part(name, settings, args.out, started)
    summary = "\n".join(summarise(args.out, parts)) + "\n"
    write_atomically(args.out / "summary.md", summary)
    print(summary)


def run_part(name: str, settings: Settings, out: Path, started: float) -> None:
    """Run a part in a process of its own, whose faults and limits concern no other part.

    The process is a fork, which imports nothing again; so this one may not use the GPU.
    """
    limit_s, report = PARTS[name], Report(out / f"{name}.json", started)
    report.path.unlink(missing_ok=True)
    try:
        function = import_module(f"benchmarks.gpu.{name}").run
    except ImportError as error:
        report.add("import", {"error": str(error)})
        return
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_run, args=(function, settings, report))
    process.start()
    process.join(limit_s if settings.is_limited else None)
    if process.exitcode is None:
        process.kill()
        process.join()
    written = json.loads(report.path.read_text()) if report.path.is_file() else {}
    if process.exitcode and WHOLE not in written:
        ended = f"ended by signal {-process.exitcode}" if process.exitcode < 0 else "failed"
        report.results = written
        report.add("end", {"error": f"{ended} after at most {limit_s} s"})


def _run(function: Callable[[Settings, Report], None], settings: Settings, report: Report) -> None:
    report.measure(WHOLE, lambda: _timed(function, settings, report))


def _timed(
    function: Callable[[Settings, Report], None], settings: Settings, report: Report
) -> dict[str, float]:
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
        os.environ["OMP_NUM_THREADS"] = str(settings.num_threads)  # lightning sets it otherwise
    started = time.perf_counter()
    function(settings, report)
    return {"seconds": time.perf_counter() - started}


def summarise(out: Path, parts: list[str]) -> Iterator[str]:
    """Yield the lines of a Markdown page of all results."""
    rows: list[tuple[str, str, str]] = []
    for name in parts:
        path = out / f"{name}.json"
        results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        rows += [(name, measure, describe(value)) for measure, value in results.items()]
    yield from format_table(
        ("part", "measure", "result"), [[escape_pipes(cell) for cell in row] for row in rows]
    )
    yield "\nFigures of others, on other data and sizes:\n"
    yield from format_table(("what", "figure"), ANCHORS)


if __name__ == "__main__":
    main()
