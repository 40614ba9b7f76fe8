"""The server as a process: it says where it listens, follows the alias, and ends on a signal."""

from __future__ import annotations

import asyncio
import os
import socket

import uvicorn

from fullscale.runtime.errors import StageError
from fullscale.serving.alias_follower import Served
from fullscale.serving.http_app import Bounds, make_app

MAX_CONNECTIONS = 64


def serve(served: Served, bounds: Bounds, host: str, port: int, every_s: float) -> None:
    """Answer requests until SIGINT or SIGTERM.

    Args:
        served: the model.
        bounds: what is taken at all.
        host: name or address to listen on.
        port: 0 for any that is free.
        every_s: how often to look whether the model's alias moved.

    Raises:
        StageError: nothing can listen there.
    """
    config = uvicorn.Config(
        make_app(served, bounds),
        log_level="warning",
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=10,
    )
    try:
        listening = socket.create_server((host, port), family=_family(host, port))
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise StageError(
            f"nothing can listen on {host}:{port} ({reason}); name another --port or --host"
        ) from None
    served.follow(every_s)
    number = served.current.model.version
    print(f"serve: {served.wanted}" + (f" is version {number}" if number else ""))
    print(
        f"serve: http://{host}:{listening.getsockname()[1]}/invocations; Ctrl-C stops", flush=True
    )
    try:
        asyncio.run(uvicorn.Server(config).serve(sockets=[listening]))
    except KeyboardInterrupt:
        pass
    finally:
        served.close()


def _family(host: str, port: int) -> socket.AddressFamily:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
