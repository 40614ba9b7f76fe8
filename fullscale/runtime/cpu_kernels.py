"""Choose the arithmetic of torch on the CPU, so that every x86-64 machine computes the same bits.

Torch, oneDNN and MKL pick their kernels by the processor, and divide sums among as many threads as
it has cores; both change the order of additions, and with it the last digits of every result. Some
epochs of training turn that into another network. The same kernels on the same number of threads
give the same bits; tests/training/test_same_bits.py holds the digest of a short training.
"""

from __future__ import annotations

import logging
import os
from typing import Literal

logger = logging.getLogger(__name__)

CpuKernels = Literal["avx2", "native"]

AVX2_VARIABLES = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE",
}
"""Environment variables of torch's own kernels, of oneDNN and of MKL. MKL's own AVX2 mode is for
Intel alone; COMPATIBLE is its only mode that adds up in the same order on every processor."""


def fix_cpu_kernels(kernels: CpuKernels, num_threads: int | None) -> None:
    """Set the kernels and the number of threads of this process and of its children.

    Call it before the first computation: each library reads its variable once. A processor without
    AVX2 is warned of.

    Args:
        kernels: "avx2", the same on every x86-64 processor of the last ten years; "native", the
            fastest of this one.
        num_threads: threads of an operation; None = one for each core.
    """
    import torch  # takes seconds

    if kernels == "avx2":
        os.environ.update(AVX2_VARIABLES)
        found = torch.backends.cpu.get_cpu_capability()
        if found != "AVX2":
            logger.warning(
                "train.cpu_kernels is avx2, but torch computes with %s: figures may differ from "
                "those of other machines in the last digits",
                found,
            )
    if num_threads is not None:
        torch.set_num_threads(num_threads)
