"""Child processes that end when the process that started them dies, so that none is orphaned.

`bind_to_parent(command)` is the command to start a foreign program with: this module, run as a
script, asks the kernel for the signal and then becomes the program, under the same process id.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h
CANNOT_RUN = 126  # as in shells
NOT_FOUND = 127
SPIN_COUNT = "10000"
LOOPBACK = ("127.0.0.1", "localhost")
MLFLOW_PORT, PREFECT_PORT = 5000, 4200
"""Ports of the servers that `make services` starts here, unless the environment names others."""


def die_with_parent() -> None:
    """Ask the kernel to send SIGTERM to this process when its parent dies, however it dies.

    Linux only; elsewhere it does nothing, and a killed parent leaves an orphan. The setting
    survives execve but is not inherited by children. To the kernel the parent is the thread that
    started this process: the signal also comes when that thread ends.

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


def bind_to_parent(command: Sequence[str]) -> list[str]:
    """Return the command that runs `command` and ends it when the process that starts it dies.

    It may be started in any folder.
    """
    # By path and isolated (-I), not `-m`: Python would look for the module in the working directory
    # first, and a checkout of an older version of this project has packages of the same names.
    return [sys.executable, "-I", str(Path(__file__).resolve()), *command]


def stage_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a stage: this interpreter first on PATH, output unbuffered.

    A proxy that the environment names is not used to reach this machine.

    OpenMP's waiting threads spin for a moment, then sleep, unless the environment says otherwise.
    Those that spin for longer slow a shared machine down many times; those that sleep at once are
    slower on an idle one (benchmarks/waiting.py).
    """
    return {
        **({} if "OMP_WAIT_POLICY" in environment else {"GOMP_SPINCOUNT": SPIN_COUNT}),
        **environment,
        **{name: _add_loopback(environment.get(name, "")) for name in ("NO_PROXY", "no_proxy")},
        "PYTHONUNBUFFERED": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")]),
    }


def _add_loopback(hosts: str) -> str:
    """Return a list of hosts to reach without a proxy, with this machine among them."""
    listed = [host for host in hosts.split(",") if host]
    if listed == ["*"]:
        return hosts
    return ",".join(dict.fromkeys((*listed, *LOOPBACK)))


def main() -> None:
    """Become the command in the arguments, and die with the process that started it.

    Exit codes are the command's; 127 if no program has its name, 126 if it cannot be run.
    """
    command = sys.argv[1:]
    if not command:
        print("usage: python -m fullscale.runtime.processes COMMAND ARGUMENTS...", file=sys.stderr)
        raise SystemExit(2)
    die_with_parent()
    # Python ignores these two signals, and execve would hand that on to the command.
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
