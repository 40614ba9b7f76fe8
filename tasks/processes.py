"""Processes that do not outlive whoever started them.

    python -m tasks.processes COMMAND ARGUMENTS...

runs a program that is not ours in this way. Needs the standard library only, and starts fast.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>


def die_with_parent() -> None:
    """Ask the kernel for SIGTERM when the thread that started this process ends.

    That is so on Linux; elsewhere nothing happens. It stays in force when the process becomes
    another program. A parent that is gone already counts as one that dies now.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel does not tell when the parent dies")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Become another program, which ends with its parent."""
    command = sys.argv[1:]
    if not command:
        raise SystemExit("usage: python -m tasks.processes COMMAND ARGUMENTS...")
    die_with_parent()
    try:
        os.execvp(command[0], command)  # noqa: S606 - a list, and no shell
    except FileNotFoundError:
        print(f"error: no program {command[0]!r} on PATH", file=sys.stderr)
        raise SystemExit(127) from None


if __name__ == "__main__":
    main()
