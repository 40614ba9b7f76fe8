"""Segment a scan from file to file with `fullscale predict`, and with nnU-Net on the same machine.

    python -m benchmarks.peers

nnU-Net gets a virtual environment of its own in .cache/peers (some GB, from PyPI). It plans its 2D
configuration for the scan itself. All networks have random weights: nothing but time and memory can
be compared. Ours are UNet 3+ in several sizes, with the slice classifier (CGM) open in half of the
slices; they are smaller than nnU-Net's, and work on coarser pixels.

Seconds are those of the whole command. Memory is the peak of the command and its child processes,
each shared page counted once (PSS).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch

from benchmarks.gpu.scan import measure_parts
from benchmarks.gpu.settings import Settings
from benchmarks.machine import describe_machine
from benchmarks.prediction import make_description, make_half_open_network, make_noisy_scan
from fullscale.prediction.network_files import Trained, save_trained
from fullscale.prediction.predictor import Predictor
from fullscale.prediction.segmentation import read_batch_size
from fullscale.runtime.markdown import format_table
from fullscale.scans.volume import Volume, write_volume

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".cache/peers"
PACKAGE = "nnunetv2==2.8.1"
DATASET = "Dataset001_Benchmark"
CONFIGURATION = "2d"
SIZES = ((96, 8), (192, 16), (192, 32))
"""Sides of slices in pixels, and widths of our networks. The published sample has the first."""
SAMPLED_S = 0.5


class Cost(NamedTuple):
    """Seconds of a command, and its peak memory in MB."""

    seconds: float
    peak_mb: float


def measure_command(command: Sequence[str], environment: Mapping[str, str]) -> Cost:
    """Run a command that must succeed."""
    started, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        while process.poll() is None:
            peak = max(peak, sum_memory(psutil.Process(process.pid)))
            time.sleep(SAMPLED_S)
        seconds = time.perf_counter() - started
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{output.read()[-4000:]}")
    return Cost(seconds, peak / 1e6)


def sum_memory(process: psutil.Process) -> int:
    """Return the bytes of a process and its children, a shared page counted once."""
    total = 0
    try:
        processes = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for each in processes:
        try:
            total += each.memory_full_info().pss
        except psutil.Error:  # it has just ended
            continue
    return total


def measure_ours(scan: Volume, folder: Path) -> tuple[list[list[str]], list[list[str]]]:
    """Return rows of the whole command and of its parts, for networks of all sizes."""
    rows, parts = [], []
    for side_px, width in SIZES:
        description = make_description(side_px, width)
        network = make_half_open_network(description, scan)
        place = folder / f"{side_px}-{width}"
        save_trained(place, network, description)
        cost = measure_command(
            [
                *(sys.executable, "-m", "tasks.cli", "predict", str(folder / "scan.nii.gz")),
                *(str(place / "mask.nii.gz"), "--model", str(place), "--device", "cpu"),
            ],
            {**os.environ, "PYTHONPATH": str(ROOT)},
        )
        name = f"UNet 3+, width {width}, {side_px} px"
        rows.append([f"fullscale predict, {name}", f"{cost.seconds:.1f}", f"{cost.peak_mb:.0f}"])
        predictor = Predictor(
            Trained(network, description),
            0.5,
            read_batch_size("auto", description, torch.device("cpu")),
            torch.device("cpu"),
            "auto",
        )
        found = measure_parts(folder, predictor, Settings(device="cpu"))
        shown = [found[f"{part}_s"] for part in ("read", "resample", "network", "back", "write")]
        parts.append([name, str(found["open_slices"]), *(f"{seconds:.2f}" for seconds in shown)])
        print(f"{rows[-1]}, {parts[-1]}", file=sys.stderr, flush=True)
    return rows, parts


def make_environment() -> Path:
    """Make nnU-Net's virtual environment, and return the folder of its programs."""
    ready = ENVIRONMENT / PACKAGE
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
        install = ("-m", "pip", "install", "--quiet", "--constraint", "constraints.txt", PACKAGE)
        subprocess.run([ENVIRONMENT / "bin/python", *install], cwd=ROOT, check=True)
        ready.touch()
    return ENVIRONMENT / "bin"


def measure_nnunet(scan: Volume, folder: Path, *, mirroring: bool) -> list[str]:
    """Return a row of the whole command; nnU-Net plans its 2D configuration for the scan."""
    programs = make_environment()
    names = ("raw", "preprocessed", "results")
    environment = {
        **os.environ,
        **{f"nnUNet_{name}": str(folder / name) for name in names},
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
    }
    environment.pop("PYTHONPATH", None)
    dataset = folder / "raw" / DATASET
    for name in ("imagesTr", "labelsTr", "input"):
        (dataset / name).mkdir(parents=True)
    for name in ("imagesTr", "input"):
        shutil.copy(folder / "scan.nii.gz", dataset / name / "scan_0000.nii.gz")
    own = scan.to_own_grid((scan.values_ZYX > 150).astype(np.uint8))
    write_volume(dataset / "labelsTr/scan.nii.gz", own, scan.geometry.own_affine)
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "organ": 1},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    (dataset / "dataset.json").write_text(json.dumps(content))
    for step in ("extract_fingerprint", "plan_experiment"):
        measure_command([str(programs / f"nnUNetv2_{step}"), "-d", "1"], environment)
    command = [
        *(str(programs / "python"), str(Path(__file__).with_name("nnunet_checkpoint.py"))),
        *(str(folder / "preprocessed" / DATASET), str(folder / "results" / DATASET)),
        CONFIGURATION,
    ]
    measure_command(command, environment)
    command = [
        *(str(programs / "nnUNetv2_predict"), "-i", str(dataset / "input")),
        *("-o", str(folder / "output"), "-d", "1", "-c", CONFIGURATION, "-f", "0"),
        *("-device", "cpu", *(() if mirroring else ("--disable_tta",))),
    ]
    cost = measure_command(command, environment)
    if not (folder / "output/scan.nii.gz").is_file():
        raise SystemExit("nnU-Net wrote no label map")
    plans = json.loads((folder / "preprocessed" / DATASET / "nnUNetPlans.json").read_text())
    plan = plans["configurations"][CONFIGURATION]
    side, widths = plan["patch_size"], plan["architecture"]["arch_kwargs"]["features_per_stage"]
    name = f"nnUNetv2_predict, {len(widths)} levels of {widths[0]} to {widths[-1]}"
    name += f", {side[0]} x {side[1]} px" + (", mirrored" if mirroring else "")
    return [name, f"{cost.seconds:.1f}", f"{cost.peak_mb:.0f}"]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slices", type=int, default=300, help="slices of the scan")
    parser.add_argument("--side", type=int, default=512, help="voxels of the scan along Y and X")
    parser.add_argument(
        "--mirroring", action="store_true", help="nnU-Net's default: each slice four times"
    )
    arguments = parser.parse_args()
    print(describe_machine(torch.device("cpu")))
    scan = make_noisy_scan(arguments.slices, arguments.side)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        own = scan.to_own_grid(scan.values_ZYX)
        write_volume(folder / "scan.nii.gz", own, scan.geometry.own_affine)
        rows, parts = measure_ours(scan, folder)
        rows.append(measure_nnunet(scan, folder, mirroring=arguments.mirroring))
    print(*format_table(("command", "seconds", "peak, MB"), rows), "", sep="\n")
    headings = ("seconds of", "open slices", "read", "resample", "network", "back", "write")
    print(*format_table(headings, parts), sep="\n")


if __name__ == "__main__":
    main()
