"""Stop on a signal between two steps of work, so that its state can be saved."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_INTERVAL_S = 0.1
GRACE_S = 25.0  # Kubernetes and Slurm send SIGKILL 30 s after SIGTERM


class Interrupted(SystemExit):
    """The work stopped because of a signal; the exit code is 128 + signal number, as in shells."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal_name = signal.Signals(number).name


class StopRequest:
    """Request to stop at the next opportunity.

    Attributes:
        signal_number: number of the signal that requested it; 0 without a request.
    """

    signal_number: int = 0

    def raise_if_requested(self) -> None:
        """Stop here if a signal requested it.

        Raises:
            Interrupted: there is a request.
        """
        if self.signal_number:
            raise Interrupted(self.signal_number)


@contextmanager
def stop_on_signal(grace_s: float = GRACE_S) -> Iterator[StopRequest]:
    """Let SIGINT, SIGTERM and SIGHUP set the yielded request instead of ending the process.

    A second SIGINT ends the process at once, and so does the end of `grace_s` seconds. A signal
    that was ignored before (nohup) stays ignored. The handler prints nothing: where nobody reads
    the output, printing could fail or wait for ever.
    """
    request = StopRequest()
    ended = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if request.signal_number:
            # SIGTERM and SIGHUP often come twice: to the whole process group, and again when the
            # parent has died. Only a second Ctrl-C is a person's wish to end now.
            if number == signal.SIGINT:
                os._exit(128 + number)
            return
        request.signal_number = number

    def watch() -> None:
        while not request.signal_number:
            if ended.wait(POLL_INTERVAL_S):
                return
        line = f"{signal.Signals(request.signal_number).name}: stopping after this step"
        threading.Thread(target=logger.info, args=(line,), daemon=True).start()
        if not ended.wait(grace_s):
            os._exit(128 + request.signal_number)

    threading.Thread(target=watch, name="stop-on-signal", daemon=True).start()
    before = {
        number: signal.signal(number, handle)
        for number in STOP_SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        ended.set()
