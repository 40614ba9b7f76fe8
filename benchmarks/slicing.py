"""Slicing with one worker, compared with nibabel get_fdata, scipy zoom, np.save for each slice.

    python -m benchmarks.slicing [--scans FOLDER] [--repeats 3]

Both read the same .nii.gz volumes of 512 x 512 x 300 (int16; full-size scans that the sample
generator writes once into FOLDER, stacked to that height), and write 320 x 320 slices of image and
label. Each run is a fresh process, in turns, so that each has its separate peak memory. The plain
way does less: no body crop, no antialiasing, no checksums, no grid to map results back.
Then one volume of 512 x 512 x 600 is sliced to measure the memory of a worker.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

SIZE_PX = 320
WINDOW_HU = (-160.0, 240.0)
ORGANS = {"liver": (1,), "spleen": (2,)}
NUM_SCANS, NUM_SLICES = 2, 300
GOAL_SPEED, GOAL_MEMORY = 4.0, 1 / 3
MEMORY_VOLUMES, MEMORY_EXTRA_MB = 3, 300


def slice_plainly(image: Path, label: Path, output: Path) -> None:
    """Slice as most tutorials do: float64 volumes, spline zoom, a file for each slice."""
    import nibabel as nib
    from scipy.ndimage import zoom

    for path, order in ((image, 1), (label, 0)):
        volume = nib.Nifti1Image.from_filename(path).get_fdata()
        if order:
            volume = np.clip(volume, *WINDOW_HU)
        factors = (SIZE_PX / volume.shape[0], SIZE_PX / volume.shape[1], 1)
        small = zoom(volume, factors, order=order)
        kind = np.int16 if order else np.uint8
        for k in range(small.shape[2]):
            np.save(output / f"{path.name}-{k:04d}.npy", small[:, :, k].astype(kind))


def slice_ours(image: Path, label: Path, output: Path) -> None:
    """Slice with the function of stage slice, checksums included."""
    from fullscale.runtime.files import file_sha256
    from fullscale.scans.cohort import Case
    from fullscale.scans.slice_writer import SliceRecipe, write_case

    case = Case(
        name="case",
        patient="p",
        annotated=tuple(ORGANS),
        source="benchmark",
        image=image,
        label=label,
        image_sha256=file_sha256(image),
        label_sha256=file_sha256(label),
    )
    write_case(output, case, tuple(ORGANS), SliceRecipe(ORGANS, SIZE_PX, 1.5, WINDOW_HU, -300.0))


def _decompress(paths: Iterable[Path], open_file: Callable[[Path, str], Any]) -> None:
    buffer = bytearray(1 << 24)
    for path in paths:
        with open_file(path, "rb") as stream:
            while stream.readinto(buffer):
                pass


def gunzip_native(image: Path, label: Path, output: Path) -> None:
    """Decompress only, with isal as ours does: the lower bound of its time."""
    from isal import igzip

    _decompress((image, label), igzip.open)


def gunzip_python(image: Path, label: Path, output: Path) -> None:
    """Decompress only, with Python's gzip."""
    import gzip

    _decompress((image, label), gzip.open)


WAYS = {
    "plain": slice_plainly,
    "ours": slice_ours,
    "gunzip, isal": gunzip_native,
    "gunzip, Python": gunzip_python,
}


def run_here(way: str, image: Path, label: Path) -> None:
    """Time one way in this process and print seconds and peak memory as JSON."""
    import nibabel  # noqa: F401  imported before the clock starts
    import pandas  # noqa: F401
    import scipy.ndimage
    import scipy.sparse  # noqa: F401

    import fullscale.scans.slice_writer  # noqa: F401

    image.read_bytes(), label.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        WAYS[way](image, label, Path(folder))
        seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_mb": read_peak_mb()}))


def read_peak_mb() -> float:
    """Return the peak memory of this process; getrusage would include its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def run_apart(way: str, image: Path, label: Path) -> dict[str, float]:
    """Time one way in a separate process."""
    command = [sys.executable, "-m", "benchmarks.slicing", "--way", way, str(image), str(label)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def find_pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Return image and label of every scan; make the scans if the folder does not exist."""
    if not (folder / "dataset.json").is_file():
        from fullscale.phantom.sample import write_sample

        print(f"making {NUM_SCANS} full-size scans in {folder} (minutes)", flush=True)
        write_sample(folder, NUM_SCANS, 0, full_size=True)
    return [
        (path, folder / "labelsTr" / path.name.replace("_0000", ""))
        for path in sorted((folder / "imagesTr").glob("*_0000.nii.gz"))[:NUM_SCANS]
    ]


def write_tall(pair: tuple[Path, Path], folder: Path, num_slices: int) -> tuple[Path, Path]:
    """Write a scan that is `pair` stacked on itself up to `num_slices` slices."""
    from fullscale.scans.volume import read_image, read_labels, write_volume

    tall = []
    for path, read in zip(pair, (read_image, read_labels), strict=True):
        volume = read(path)
        repeats = -(-num_slices // len(volume.values_ZYX))
        values = np.concatenate([volume.values_ZYX] * repeats)[:num_slices]
        dz, dy, dx = volume.spacing_mm
        target = folder / path.name
        write_volume(target, values.transpose(2, 1, 0), np.diag([-dx, -dy, dz, 1.0]))
        tall.append(target)
    return tall[0], tall[1]


def compare(pairs: list[tuple[Path, Path]], repeats: int) -> bool:
    """Print medians over scans and repeats, and ratios; return True if both goals are reached."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    peak_mb: dict[str, list[float]] = {way: [] for way in WAYS}
    speed_ratios, memory_ratios = [], []
    for _ in range(repeats):
        for image, label in pairs:
            runs = {way: run_apart(way, image, label) for way in WAYS}
            for way, run in runs.items():
                seconds[way].append(run["seconds"])
                peak_mb[way].append(run["peak_mb"])
            speed_ratios.append(runs["plain"]["seconds"] / runs["ours"]["seconds"])
            memory_ratios.append(runs["ours"]["peak_mb"] / runs["plain"]["peak_mb"])
    print(f"{'way':<16}{'seconds a scan':>16}{'peak MB':>10}")
    for way in WAYS:
        print(
            f"{way:<16}{statistics.median(seconds[way]):>16.2f}"
            f"{statistics.median(peak_mb[way]):>10.0f}"
        )
    speed, memory = statistics.median(speed_ratios), statistics.median(memory_ratios)
    floor = statistics.median(seconds["gunzip, isal"]) / statistics.median(seconds["ours"])
    print(f"ours is {speed:.1f} times as fast (goal: at least {GOAL_SPEED:g}),")
    print(f"with {memory:.2f} of the memory (goal: at most {GOAL_MEMORY:.2f}).")
    print(f"Decompression alone is {floor:.0%} of our time, a lower bound.")
    return speed >= GOAL_SPEED and memory <= GOAL_MEMORY


def measure_memory(pair: tuple[Path, Path], num_slices: int) -> bool:
    """Print the peak memory of one worker on a tall scan; return True if it keeps its bound."""
    with tempfile.TemporaryDirectory() as folder:
        tall = write_tall(pair, Path(folder), num_slices)
        peak_mb = run_apart("ours", *tall)["peak_mb"]
    volume_mb = 512 * 512 * num_slices * 2 / 2**20
    bound_mb = MEMORY_VOLUMES * volume_mb + MEMORY_EXTRA_MB
    print(
        f"512 x 512 x {num_slices} int16 is {volume_mb:.0f} MB; a worker peaks at {peak_mb:.0f} MB "
        f"(bound: {MEMORY_VOLUMES} volumes + {MEMORY_EXTRA_MB} MB = {bound_mb:.0f} MB)."
    )
    return peak_mb <= bound_mb


def main() -> None:
    """Run the comparison; exit code 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scans", type=Path, default=Path("build/benchmark-scans"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num-slices", type=int, default=600, help="height of the tall scan")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("pair", nargs="*", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        run_here(options.way, *options.pair)
        return
    pairs = find_pairs(options.scans)
    print(f"{platform.machine()}, {len(pairs)} scans, {options.repeats} runs", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        same = [write_tall(pair, Path(folder), NUM_SLICES) for pair in pairs]
        reached = compare(same, options.repeats)
    kept = measure_memory(pairs[0], options.num_slices)
    raise SystemExit(0 if reached and kept else 1)


if __name__ == "__main__":
    main()
