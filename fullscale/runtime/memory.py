"""Freed memory: kept by this process for what it allocates next."""

from __future__ import annotations

import ctypes

# malloc.h of glibc. Its documentation allows no larger threshold for mmap.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
LARGEST_INT = 2**31 - 1
LARGEST_MMAP_THRESHOLD = 32 * 2**20


def keep_freed_memory() -> None:
    """Keep freed memory instead of giving it back to the kernel, which clears it page by page.

    A training step allocates the same maps as the step before. The peak does not change.
    With another C library than glibc it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, LARGEST_INT)
