"""Run one function over many cases, on the cores of this machine or on a Dask cluster."""

# joblib and distributed have no type annotations for the functions called here.
# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from fullscale.scans.checks import failure

Item = TypeVar("Item")
Result = TypeVar("Result")

CONNECT_TIMEOUT_S = 10


@dataclass(frozen=True)
class Compute:
    """Place where the work runs; it changes no result.

    Attributes:
        backend: "local" for processes on this machine, "dask" for an existing cluster.
        address: address of the cluster's scheduler, such as "tcp://host:8786".
        num_workers: parallel processes; 0 uses every core, or every worker of the cluster.
    """

    backend: Literal["local", "dask"] = "local"
    address: str | None = None
    num_workers: int = 0


def map_cases(
    function: Callable[[Item], Result], items: Sequence[Item], compute: Compute
) -> Iterator[Result]:
    """Yield `function(item)` of each item, in the order of the items.

    Args:
        function: importable by the workers; an exception in it ends the whole run.
        items: picklable items.
        compute: place to run. One local worker means this process.

    Raises:
        ScanError: the cluster does not respond.
    """
    if compute.backend == "local" and (compute.num_workers == 1 or len(items) < 2):
        yield from map(function, items)
        return
    from joblib import Parallel, delayed

    num_jobs = compute.num_workers or -1
    with _backend(compute):
        # One case per worker at a time: a case takes seconds and much memory.
        run = Parallel(num_jobs, return_as="generator", batch_size=1, pre_dispatch="n_jobs")
        yield from run(delayed(function)(item) for item in items)


def _backend(compute: Compute) -> AbstractContextManager[Any]:
    return nullcontext() if compute.backend == "local" else _cluster(compute.address)


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    try:
        from distributed import Client
        from joblib import parallel_config
    except ImportError as error:
        raise failure("cluster", f"no package distributed ({error})") from None
    try:
        client = Client(address, timeout=CONNECT_TIMEOUT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise failure("cluster", f"no answer from a scheduler at {address}: {error}") from None
    with client, parallel_config(backend="dask", client=client):
        yield
