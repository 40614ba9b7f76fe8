"""Run the HTTP server until it is stopped by a signal."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket

import uvicorn

from fullscale.runtime.errors import StageError
from fullscale.serving.alias_follower import AliasFollower
from fullscale.serving.http_app import RequestLimits, make_app

MAX_CONNECTIONS = 64
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")


def serve(
    follower: AliasFollower, limits: RequestLimits, host: str, port: int, interval_s: float
) -> None:
    """Answer requests until SIGINT or SIGTERM.

    On a loopback address, only those for a loopback name: a page in a browser on this machine could
    otherwise reach the server through another name that resolves to it.

    Args:
        follower: the model; it follows its alias while the server runs.
        limits: limits on requests.
        host: name or address to listen on.
        port: port to listen on; 0 for any free one.
        interval_s: time between two checks of the model's alias.

    Raises:
        StageError: the address or port cannot be used.
    """
    # Opened here, not by uvicorn: a port in use must be one line, and port 0 must be shown.
    try:
        listening = socket.create_server((host, port), family=_family(host, port))
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise StageError(
            f"nothing can listen on {host}:{port} ({reason}); name another --port or --host"
        ) from None
    is_private = ipaddress.ip_address(listening.getsockname()[0]).is_loopback
    config = uvicorn.Config(
        make_app(follower, limits, LOOPBACK_HOSTS if is_private else ("*",)),
        log_level="warning",
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=10,
    )
    follower.start(interval_s)
    number = follower.current.model.version
    print(f"serve: {follower.model_name}" + (f" is version {number}" if number else ""))
    print(
        f"serve: http://{host}:{listening.getsockname()[1]}/invocations; Ctrl-C stops", flush=True
    )
    try:
        asyncio.run(uvicorn.Server(config).serve(sockets=[listening]))
    except KeyboardInterrupt:
        pass
    finally:
        follower.close()


def _family(host: str, port: int) -> socket.AddressFamily:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
