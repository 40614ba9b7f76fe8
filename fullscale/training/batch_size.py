"""The largest batch that fits into memory, and a clear error when memory runs out."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fullscale.params import Params
from fullscale.runtime.errors import StageError, shorten
from fullscale.runtime.startup import compiler_left_out
from fullscale.training.step import make_optimizer
from model.losses import total_loss
from model.output import Output
from model.preprocessing import NUM_ADJACENT_SLICES

logger = logging.getLogger(__name__)

USABLE_SHARE = 0.8
MIN_STEPS_PER_EPOCH = 8


@contextmanager
def out_of_memory_explained(batch_size: int, size_px: int) -> Iterator[None]:
    """Convert an out-of-memory error to a message with the settings to change.

    Raises:
        StageError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = shorten(error)
        raise StageError(
            f"memory ran out with train.batch_size {batch_size} and slice.size_px {size_px} "
            f"({reason}); try a smaller train.batch_size, a larger train.num_accumulated (the "
            "same step in smaller parts), or a smaller train.width or slice.size_px"
        ) from None


def largest_part(try_part: Callable[[int], int], usable_bytes: int, largest: int) -> int:
    """Return the largest power of two of slices that a process can compute at once.

    Twice the slices need at most twice the memory, so the size is doubled as long as that fits.

    Args:
        try_part: runs a step with that many slices and returns its peak memory in bytes.
        usable_bytes: memory that a step may use.
        largest: upper limit of the result.

    Raises:
        StageError: a single slice does not fit.
    """
    size = 1
    while True:
        try:
            taken = try_part(size)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            if size == 1:
                raise StageError(
                    "memory does not hold a training step of a single slice; "
                    "lower train.width or slice.size_px"
                ) from None
            return size // 2
        if 2 * taken > usable_bytes or 2 * size > largest:
            return size
        size *= 2


def find_batch_size(
    network: nn.Module, params: Params, loss_terms: tuple[str, ...], num_slices: int,
    device: torch.device, num_processes: int,
) -> int:  # fmt: skip
    """Return the value of `train.batch_size: auto` for this machine's memory.

    Args:
        network: is trained for some steps on noise, so give a copy.
        params: all of params.yaml.
        loss_terms: of the network's recipe.
        num_slices: slices in an epoch; they are divided into at least 8 steps.
        device: of the network.
        num_processes: number of processes that share a step.
    """
    parts = num_processes * params.train.num_accumulated
    size_px, num_organs = params.slice.size_px, len(params.organs)
    optimizer = make_optimizer(network, params.train)
    before = _memory_peak(device)

    def try_part(size: int) -> int:
        image_BCHW = torch.rand(size, NUM_ADJACENT_SLICES, size_px, size_px, device=device)
        mask_BKHW = torch.rand(size, num_organs, size_px, size_px, device=device) > 0.5
        with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(params, device)):
            output: Output = network(image_BCHW)
        loss: Tensor = total_loss(output, mask_BKHW, terms=loss_terms).total
        loss.backward()  # type: ignore[no-untyped-call]
        with compiler_left_out():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return _memory_peak(device) - before

    part = largest_part(
        try_part,
        int(USABLE_SHARE * _memory_free(device) / _processes_of(device, params)),
        max(1, num_slices // (MIN_STEPS_PER_EPOCH * parts)),
    )
    logger.info(f"train.batch_size auto: {part * parts} slices a step, {part} at once on {device}")
    return part * parts


def uses_bf16(params: Params, device: torch.device) -> bool:
    """Return True if training uses bf16 autocast on `device`."""
    precision = params.train.precision
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bf16"


def _memory_peak(device: torch.device) -> int:
    """Return the peak memory of this process so far, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _memory_free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return int(psutil.virtual_memory().available)


def _processes_of(device: torch.device, params: Params) -> int:
    """Return the number of training processes that share the device's memory."""
    return params.train.devices if device.type == "cpu" else 1


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in str(error) for words in ("can't allocate memory", "not enough memory")
    )
