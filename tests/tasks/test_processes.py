import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

STARTER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-m", "tasks.processes", *sys.argv[1:]])
print(child.pid, flush=True)
time.sleep(60)
"""
SLEEPER = "import time; print('asleep', flush=True); time.sleep(60)"


def through(*command):
    return subprocess.run(
        [sys.executable, "-m", "tasks.processes", *command],
        capture_output=True,
        text=True,
        check=False,
    )


def is_alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_child_ends_when_its_starter_is_killed(number):
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, sys.executable, "-c", SLEEPER],
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(starter.stdout.readline())
    assert starter.stdout.readline() == "asleep\n"
    os.kill(starter.pid, number)
    starter.wait()
    end = time.monotonic() + 5
    while is_alive(child) and time.monotonic() < end:
        time.sleep(0.02)
    assert not is_alive(child)


def test_arguments_output_and_exit_code_pass_through():
    script = "import sys; print(sys.argv[1:]); sys.exit(7)"
    done = through(sys.executable, "-c", script, "a b", "*", "")
    assert done.returncode == 7
    assert done.stdout == "['a b', '*', '']\n"


def test_unknown_program_is_named():
    done = through("no-such-program")
    assert done.returncode == 127
    assert done.stderr == "error: no program 'no-such-program' on PATH\n"


def test_no_program_is_an_error():
    done = through()
    assert done.returncode == 1
    assert "usage: python -m tasks.processes" in done.stderr


def test_starter_thread_that_ends_takes_its_child_along():
    """So a flow must start programs from a thread that waits for them."""
    script = """
import subprocess, sys, threading, time
found = []
def start():
    command = [sys.executable, "-m", "tasks.processes", sys.executable, "-c", sys.argv[1]]
    found.append(subprocess.Popen(command, stdout=subprocess.PIPE))
    found[0].stdout.readline()
thread = threading.Thread(target=start); thread.start(); thread.join()
print(found[0].wait(timeout=5))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, SLEEPER], capture_output=True, text=True, check=False
    )
    assert done.stdout == f"{-signal.SIGTERM}\n", done.stderr
