"""The same work over many cases, on every core of this machine or of a Dask cluster."""

# joblib and distributed carry no types for what is called here.
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
    """Where work runs; changes no result.

    Attributes:
        backend: "local" for processes on this machine, "dask" for an existing cluster.
        address: of the cluster's scheduler, such as "tcp://host:8786".
        num_workers: processes at a time; 0 uses every core, or every worker of the cluster.
    """

    backend: Literal["local", "dask"] = "local"
    address: str | None = None
    num_workers: int = 0


def map_cases(
    function: Callable[[Item], Result], items: Sequence[Item], compute: Compute
) -> Iterator[Result]:
    """Yield `function(item)` of each item, in the order of the items.

    Args:
        function: importable by the workers; it must not raise for a bad case.
        items: picklable.
        compute: where to run. One local worker is this process.

    Raises:
        ScanError: the cluster does not answer.
    """
    if compute.backend == "local" and (compute.num_workers == 1 or len(items) < 2):
        yield from map(function, items)
        return
    from joblib import Parallel, delayed

    num_jobs = compute.num_workers or -1
    with _backend(compute):
        # One case at a time per worker: a case is seconds of work and much memory.
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
