from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
import numpy as np
from fullscale.runtime.startup import keep_freed_memory

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


COMPILE = """
import sys, torch
from fullscale.runtime.startup import compiler_left_out

weight = torch.nn.Parameter(torch.ones(1))
with compiler_left_out():
    from torch._dynamo import OptimizedModule
    assert not isinstance(weight, OptimizedModule)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    (2 * weight).sum().backward()
    optimizer.step()
assert not [name for name in sys.modules if name.startswith("torch._dynamo")]
assert weight.item() == -1
network = torch.nn.Linear(1, 1)
compiled = torch.compile(network, backend="eager")
assert compiled(weight) == network(weight)
assert isinstance(compiled, OptimizedModule)
assert not isinstance(network, OptimizedModule)
assert torch._dynamo is sys.modules["torch._dynamo"]
with compiler_left_out():
    import torch._dynamo.config
    optimizer.step()
    assert isinstance(compiled, OptimizedModule)
assert weight.item() == -3
assert torch._dynamo is sys.modules["torch._dynamo"]
"""


@pytest.mark.slow  # imports the compiler
def test_compiler_comes_when_something_compiles_and_not_before() -> None:
    subprocess.run([sys.executable, "-c", COMPILE], check=True)
