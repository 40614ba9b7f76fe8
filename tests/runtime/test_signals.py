import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time

import pytest

from fullscale.runtime.signals import Interrupted, stop_on_signal

WORK = """
import sys, time
from fullscale.runtime.console import configure_logging
from fullscale.runtime.signals import stop_on_signal
configure_logging()
with stop_on_signal(grace_s=float(sys.argv[1])) as stop:
    print("ready", flush=True)
    while True:
        time.sleep(0.05)
        if sys.argv[2] == "obedient":
            stop.raise_if_requested()
"""


@pytest.fixture
def worker():
    started = []

    def start(grace_s, kind, **options):
        process = subprocess.Popen(
            [sys.executable, "-c", WORK, str(grace_s), kind],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_signal_ends_work_with_the_usual_code(worker, number, code):
    process = worker(20, "obedient")
    process.send_signal(number)
    assert process.wait(timeout=5) == code


TRAINING = """
import sys, time
from pathlib import Path
from fullscale.runtime.console import report_errors
from fullscale.runtime.progress import TrainingDisplay
from fullscale.runtime.signals import Interrupted, stop_on_signal

@report_errors
def main():
    with stop_on_signal() as stop, TrainingDisplay("unet-0", 1, 10**6, 0) as display:
        print("ready", flush=True)
        for step in range(10**6):
            time.sleep(0.01)
            display.show_step(1, step, 0.5, 1.0)
            print("a line", flush=True)
            display.log("a line")
            try:
                stop.raise_if_requested()
            except Interrupted as request:
                display.log("saved")
                Path(sys.argv[1]).write_text(request.signal_name)
                raise

main()
"""


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_state_is_saved_where_nobody_reads_the_output(tmp_path, kind):
    ours, theirs = os.pipe() if kind == "pipe" else pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(tmp_path / "state")],
        stdin=theirs if kind == "terminal" else subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=(lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)) if kind == "terminal" else None,
    )
    os.close(theirs)
    try:
        told = b""
        while b"ready" not in told:
            told += os.read(ours, 100)
        os.close(ours)  # the kernel sends SIGHUP where it was a terminal
        if kind == "pipe":
            time.sleep(0.3)
            process.terminate()
        assert process.wait(timeout=20) == (143 if kind == "pipe" else 129)
    finally:
        process.kill()
    assert (tmp_path / "state").read_text() == ("SIGTERM" if kind == "pipe" else "SIGHUP")


def test_grace_ends(worker):
    process = worker(0.5, "deaf")
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 143
    assert time.monotonic() - started >= 0.4
    assert process.stderr.read() == "SIGTERM: stopping after this step\n"


def test_second_interrupt_ends_at_once(worker):
    process = worker(60, "deaf")
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == 130


def test_second_termination_does_not_cut_the_work_short(worker):
    process = worker(1.0, "deaf")
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert process.poll() is None
    assert process.wait(timeout=5) == 143


def test_ignored_hangup_stays_ignored(worker):
    process = worker(
        20, "obedient", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None


def test_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signal() as stop:
        assert signal.getsignal(signal.SIGTERM) is not before
        stop.raise_if_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted) as caught:
            stop.raise_if_requested()
    assert caught.value.code == 143
    assert caught.value.signal_name == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before
