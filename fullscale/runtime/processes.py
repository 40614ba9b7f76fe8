"""A process that ends when the one that started it dies, so that no orphan works on.

A program that is not ours is started through this module: `python -m fullscale.runtime.processes
COMMAND ARGUMENTS...` becomes the command, under the same process number.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h
CANNOT_RUN = 126  # as shells have it
NOT_FOUND = 127


def die_with_parent() -> None:
    """Ask the kernel for SIGTERM when the starter of this process dies, however it dies.

    Linux only; elsewhere it does nothing, and a killed starter leaves an orphan. The wish is kept
    when the process becomes another program, but not handed on to its children. The starter is
    a thread: the signal also comes when a thread ends that started this process and lives no
    longer than it.

    Raises:
        OSError: the kernel refuses.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot follow the parent process: {os.strerror(number)}")
    if os.getppid() != parent:  # it died before the kernel knew
        os.kill(os.getpid(), signal.SIGTERM)


def stage_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment a stage runs in: this interpreter first on PATH, output unbuffered.

    Threads that wait do so asleep, because spinning ones slow a shared machine down manyfold.
    """
    return {
        "OMP_WAIT_POLICY": "PASSIVE",
        **environment,
        "PYTHONUNBUFFERED": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")]),
    }


def main() -> None:
    """Become the command named by the arguments, and die with the process that started it.

    Exit codes are the command's; 127 where there is none of that name, 126 where it cannot run.
    """
    command = sys.argv[1:]
    if not command:
        print("usage: python -m fullscale.runtime.processes COMMAND ARGUMENTS...", file=sys.stderr)
        raise SystemExit(2)
    die_with_parent()
    for ignored_by_python in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored_by_python, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)  # noqa: S606 - no shell is wanted
    except FileNotFoundError:
        print(
            f"error: cannot run {command[0]!r}: no such program on PATH; install it or correct "
            "its name",
            file=sys.stderr,
        )
        raise SystemExit(NOT_FOUND) from None
    except OSError as error:
        print(f"error: cannot run {command[0]!r}: {error.strerror}", file=sys.stderr)
        raise SystemExit(CANNOT_RUN) from None


if __name__ == "__main__":
    main()
