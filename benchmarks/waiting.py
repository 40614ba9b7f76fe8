"""What spinning threads cost: a training step with and without OMP_WAIT_POLICY=PASSIVE.

    python -m benchmarks.waiting

Each setting runs in a process of its own, in turn, on a machine that is otherwise idle and again
beside one busy process for each core.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

STEP = """
import statistics, time, torch
from model.losses import total_loss
from model.networks import build_network
torch.manual_seed(0)
net = build_network("unet", in_channels=3, num_organs=2, width=8)
x, y = torch.rand(16, 3, 96, 96), torch.rand(16, 2, 96, 96) > 0.5
times = []
for _ in range(8):
    start = time.perf_counter()
    total_loss(net(x), y).total.backward()
    times.append(time.perf_counter() - start)
print(statistics.median(times[2:]))
"""
BUSY = "while True: pass"
SETTINGS = {"default": {}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}}


def time_step(setting: str) -> float:
    """Median seconds of a training step in a fresh process."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", STEP],
        env=environment | SETTINGS[setting],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def measure(num_rounds: int, num_busy: int) -> dict[str, float]:
    """Median over rounds of each setting, beside some busy processes."""
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(num_busy)]
    try:
        times = {setting: [] for setting in SETTINGS}
        for _ in range(num_rounds):
            for setting, seconds in times.items():
                seconds.append(time_step(setting))
    finally:
        for process in busy:
            process.kill()
            process.wait()
    return {setting: statistics.median(seconds) for setting, seconds in times.items()}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print("| machine | default, s | passive, s | default / passive |\n|---|---|---|---|")
    for title, num_busy in (("idle", 0), ("busy", os.cpu_count() or 1)):
        found = measure(rounds, num_busy)
        ratio = found["default"] / found["passive"]
        print(f"| {title} | {found['default']:.3f} | {found['passive']:.3f} | {ratio:.1f} |")


if __name__ == "__main__":
    main()
