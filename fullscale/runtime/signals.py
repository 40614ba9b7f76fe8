"""Signals that ask a training to stop: it finishes its step, keeps its state, and leaves."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fullscale.runtime.console import say

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_S = 25.0  # Kubernetes and Slurm kill 30 s after they asked


class Interrupted(SystemExit):
    """The work stopped because a signal asked for it; the exit code is the usual 128 + signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal_name = signal.Signals(number).name


class StopRequest:
    """Whether a signal has asked to stop.

    Attributes:
        signal_number: of the signal, or 0.
    """

    signal_number: int = 0

    def raise_if_asked(self) -> None:
        """Leave now.

        Raises:
            Interrupted: a signal has asked for it.
        """
        if self.signal_number:
            raise Interrupted(self.signal_number)


@contextmanager
def stop_on_signal(grace_s: float = GRACE_S) -> Iterator[StopRequest]:
    """Within, SIGINT, SIGTERM and SIGHUP set a request instead of ending the process.

    A second SIGINT ends it at once, and so does the end of `grace_s`: then what was kept last
    counts. Other signals often come twice, to the whole group and again when the parent has died.
    A signal that is ignored (nohup) stays ignored.
    """
    request = StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        if request.signal_number:
            if number == signal.SIGINT:
                os._exit(128 + number)
            return
        request.signal_number = number
        say(f"{signal.Signals(number).name}: stopping after this step")
        timer = threading.Timer(grace_s, os._exit, [128 + number])
        timer.daemon = True
        timer.start()
        timers.append(timer)

    timers: list[threading.Timer] = []
    before = {
        number: signal.signal(number, ask)
        for number in STOPPING
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for timer in timers:
            timer.cancel()
