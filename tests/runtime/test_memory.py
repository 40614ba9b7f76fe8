from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
import numpy as np
from fullscale.runtime.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        maps = [np.ones(20 * 2**20, np.uint8) for _ in range(4)]
        del maps
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if KEEP:
    keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_that_was_freed_is_used_again_without_the_kernel() -> None:
    without, kept = (
        int(
            subprocess.run(
                [sys.executable, "-c", SCRIPT.replace("KEEP", keep)],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for keep in ("False", "True")
    )
    assert kept < 0.1 * without
