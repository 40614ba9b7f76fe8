"""Settings of a program's own process, made before it works: memory, and torch's compiler."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

# malloc.h of glibc. Its documentation allows no larger threshold for mmap.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
LARGEST_INT = 2**31 - 1
LARGEST_MMAP_THRESHOLD = 32 * 2**20
COMPILER = "torch._dynamo"


def keep_freed_memory() -> None:
    """Keep freed memory instead of giving it back to the kernel, which clears it page by page.

    A training step allocates the same maps as the step before. The peak does not change.
    With another C library than glibc it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, LARGEST_INT)


@contextmanager
def compiler_left_out() -> Iterator[None]:
    """Within, do not import torch's compiler for code that only asks what not to compile.

    Torch's optimisers and lightning do so, and the import takes a quarter of a trainer's start.
    A stand-in has the compiler's name meanwhile; where the compiler is imported already, as after
    `torch.compile`, nothing changes. Use it around single calls: other code gets the stand-in too.
    """
    import torch  # takes seconds

    if COMPILER in sys.modules:
        yield
        return
    stand_in = ModuleType(COMPILER)
    vars(stand_in).update(disable=_disable, graph_break=_break_graph, OptimizedModule=_Compiled)
    sys.modules[COMPILER] = torch._dynamo = stand_in
    try:
        yield
    finally:
        del sys.modules[COMPILER], torch._dynamo


def _disable(function: Function, recursive: bool = True, *, wrapping: bool = True) -> Function:
    """Return the function itself: nothing compiles it."""
    return function


def _break_graph() -> None:
    """Do nothing: there is no graph."""


class _IsCompiled(type):
    """Lets isinstance() ask the compiler's own class, once there is one."""

    def __instancecheck__(cls, instance: object) -> bool:
        compiler = sys.modules.get(f"{COMPILER}.eval_frame")
        return compiler is not None and isinstance(instance, compiler.OptimizedModule)


class _Compiled(metaclass=_IsCompiled):
    """Stands for the class of compiled networks, which lightning keeps."""
