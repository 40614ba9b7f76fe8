"""Measure the cost of spinning threads: a training step with three settings of OpenMP.

    python -m benchmarks.waiting

Waiting threads spin (torch's default), sleep at once, or spin for a moment as this project has it.
The settings run in turn, each in a new process: on an otherwise idle machine, together with one
busy process for each core, and together with two trainings of the same setting.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

from fullscale.runtime.processes import SPIN_COUNT, bind_to_parent

STEP = """
import statistics, sys, time, torch
from model.losses import total_loss
from model.networks import build_network
torch.manual_seed(0)
num_steps = int(sys.argv[1])
net = build_network("unet", in_channels=3, num_organs=2, width=8)
x, y = torch.rand(16, 3, 96, 96), torch.rand(16, 2, 96, 96) > 0.5
times = []
for _ in range(num_steps):
    start = time.perf_counter()
    total_loss(net(x), y).total.backward()
    times.append(time.perf_counter() - start)
print(statistics.median(times[2:]))
"""
SETTINGS = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "ours": {"GOMP_SPINCOUNT": SPIN_COUNT},
}
VARIABLES = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
NUM_STEPS, ENDLESS = 8, 10**9
NEIGHBOURS = {
    "idle": [],
    "busy processes": [["-c", "while True: pass"]] * (os.cpu_count() or 1),
    "two trainings": [["-c", STEP, str(ENDLESS)]] * 2,
}


def time_step(setting: str, neighbours: list[list[str]]) -> float:
    """Return the median seconds of a training step in a new process that runs with others."""
    kept = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    environment = kept | SETTINGS[setting]
    running = [
        subprocess.Popen(bind_to_parent([sys.executable, *arguments]), env=environment)
        for arguments in neighbours
    ]
    try:
        done = subprocess.run(
            [sys.executable, "-c", STEP, str(NUM_STEPS)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        for process in running:
            process.kill()
            process.wait()
    return float(done.stdout)


def main() -> None:
    """Measure every setting and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(
        "| other processes | default, s | passive, s | ours, s | default / ours | passive / ours |"
    )
    print("|---|---|---|---|---|---|")
    for title, neighbours in NEIGHBOURS.items():
        times: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
        for _ in range(rounds):
            for setting, seconds in times.items():
                seconds.append(time_step(setting, neighbours))
        default, passive, ours = (statistics.median(seconds) for seconds in times.values())
        ratios = f"{default / ours:.1f} | {passive / ours:.1f}"
        print(f"| {title} | {default:.3f} | {passive:.3f} | {ours:.3f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
