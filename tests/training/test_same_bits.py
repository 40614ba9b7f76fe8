"""The promise of `train.cpu_kernels: avx2`: the same bits on every x86-64 processor.

The digests were computed on an AMD EPYC with AVX-512. The weights came out the same on Intel
processors as QEMU emulates them. A change of networks, loss, augmentation or optimiser, or a
release of torch, may change them; then compute them anew with tests/shared/short_training.py.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from fullscale.runtime.processes import SPIN_COUNT

PROGRAM = Path(__file__).parents[1] / "shared/short_training.py"
CPU_INFO = Path("/proc/cpuinfo")
IS_MEASURED = CPU_INFO.is_file() and "AuthenticAMD" in CPU_INFO.read_text()
AUGMENTATION = "f32993e802ba6db4"
WEIGHTS = {"unet": "711ceaec95d84be7", "unet3plus": "faffd7ba05a76f58"}


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 processors have these kernels")
@pytest.mark.xfail(
    not IS_MEASURED, reason="on processors of other makers the digests were only emulated"
)
@pytest.mark.parametrize("network", WEIGHTS)
def test_short_training_has_the_same_bits_on_every_processor(network: str) -> None:
    # Fewer threads than asked for must not count, as on a machine with one core.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": SPIN_COUNT}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), network],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["weights", WEIGHTS[network], "augmentation", AUGMENTATION]
