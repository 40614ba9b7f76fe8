from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from watching import is_alive, wait_until

from fullscale.runtime.processes import bind_to_parent, stage_environment

ROOT = Path(__file__).parents[2]
THROUGH = bind_to_parent([])
SOON_S = 5  # at once, on a busy machine
linux_only = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a process of its parent's death"
)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*THROUGH, *command], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


# Writes its number when it is ready, and a word when it is told to end.
CHILD = """
import os, pathlib, signal, sys, time
def told(number, frame):
    pathlib.Path(sys.argv[2]).write_text(signal.Signals(number).name)
    sys.exit()
signal.signal(signal.SIGTERM, told)
path = pathlib.Path(sys.argv[1])
path.with_suffix(".new").write_text(str(os.getpid()))
path.with_suffix(".new").rename(path)
time.sleep(60)
"""
STARTER = "import subprocess, sys; subprocess.run(sys.argv[1:])"
THREAD = """
import subprocess, sys, threading, time
thread = threading.Thread(target=subprocess.run, args=(sys.argv[1:],))
thread.start()
thread.join()
"""


@linux_only
@pytest.mark.parametrize("starter", [STARTER, THREAD])
def test_child_is_told_to_end_when_its_parent_is_killed(tmp_path: Path, starter: str) -> None:
    ready, told = tmp_path / "ready", tmp_path / "told"
    child = [*THROUGH, sys.executable, "-c", CHILD, str(ready), str(told)]
    with subprocess.Popen([sys.executable, "-c", starter, *child], cwd=ROOT) as parent:
        assert wait_until(ready.exists, 60)
        pid = int(ready.read_text())
        time.sleep(0.3)
        assert is_alive(pid)
        assert not told.exists()
        parent.kill()
    assert wait_until(lambda: not is_alive(pid), SOON_S)
    assert told.read_text() == "SIGTERM"


# Kills its parent at the moment between looking at it and asking the kernel.
LATE = """
import os, pathlib, signal, sys, time
from fullscale.runtime.processes import die_with_parent
def kill_parent(event, arguments):
    if event == "ctypes.dlopen":
        parent = os.getppid()
        os.kill(parent, signal.SIGKILL)
        while os.getppid() == parent:
            time.sleep(0.01)
        pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
sys.addaudithook(kill_parent)
die_with_parent()
pathlib.Path(sys.argv[2]).write_text("went on")
time.sleep(60)
"""


@linux_only
def test_parent_that_died_before_the_kernel_was_asked_is_noticed(tmp_path: Path) -> None:
    orphaned, went_on = tmp_path / "orphaned", tmp_path / "went_on"
    child = [sys.executable, "-c", LATE, str(orphaned), str(went_on)]
    done = subprocess.run(
        [sys.executable, "-c", STARTER, *child], cwd=ROOT, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert wait_until(orphaned.exists, 60)
    assert wait_until(lambda: not is_alive(int(orphaned.read_text() or os.getpid())), SOON_S)
    assert not went_on.exists()


@pytest.mark.parametrize("code", [0, 1, 42])
def test_exit_code_passes_through(code: int) -> None:
    assert run("sh", "-c", f"exit {code}").returncode == code


def test_death_by_a_signal_passes_through() -> None:
    assert run("sh", "-c", "kill -KILL $$").returncode == -signal.SIGKILL


def test_program_gets_the_signals_that_python_ignores() -> None:
    assert run("sh", "-c", "kill -PIPE $$; echo alive").returncode == -signal.SIGPIPE


def test_arguments_pass_through_as_they_are() -> None:
    arguments = ["with spaces", "$HOME", "*", "", "-m", "--", "quote\"'", "ä\nb"]
    printed = run(sys.executable, "-c", "import sys; print(ascii(sys.argv[1:]))", *arguments)
    assert printed.stdout.strip() == ascii(arguments)


def test_package_of_the_same_name_in_the_working_directory_does_no_harm(tmp_path: Path) -> None:
    for name in ("fullscale", "os", "signal"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit(3)")
    done = subprocess.run([*THROUGH, "sh", "-c", "exit 0"], cwd=tmp_path, check=False)
    assert done.returncode == 0


def test_command_keeps_the_process_number() -> None:
    command = [*THROUGH, "sh", "-c", "echo $$"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert int(process.stdout.read()) == process.pid


def test_unknown_command_is_one_line_and_code_127() -> None:
    done = run("no-such-program", "--help")
    assert done.returncode == 127
    assert done.stdout == ""
    assert done.stderr == (
        "error: cannot run 'no-such-program': no such program on PATH; install it or correct its "
        "name\n"
    )


def test_file_that_is_no_program_is_one_line_and_code_126(tmp_path: Path) -> None:
    done = run(str(tmp_path))
    assert done.returncode == 126
    assert done.stderr == f"error: cannot run '{tmp_path}': Permission denied\n"


def test_no_command_tells_how_to_use_it() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stderr == "usage: python -m fullscale.runtime.processes COMMAND ARGUMENTS...\n"


def test_start_imports_nothing_slow() -> None:
    code = (
        "import sys, fullscale.runtime.processes;"
        "print(*{each.split('.')[0] for each in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert loaded & {"ctypes", "fullscale"} == {"ctypes", "fullscale"}
    assert not loaded & {"numpy", "torch", "prefect", "pandas", "tasks", "model"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "127.0.0.1,localhost"),
        ({"no_proxy": "example.org,localhost"}, "example.org,localhost,127.0.0.1"),
        ({"no_proxy": "*"}, "*"),
    ],
)
def test_this_machine_is_reached_without_a_proxy(given: dict[str, str], expected: str) -> None:
    assert stage_environment(given)["no_proxy"] == expected
    assert "127.0.0.1" in stage_environment(given)["NO_PROXY"]
