import errno
import logging
import subprocess
import sys

import pytest

from fullscale.runtime.console import configure_logging, report_errors, track
from fullscale.runtime.errors import ScanError, StageError


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (StageError("no data; run `dvc pull`"), "error: no data; run `dvc pull`"),
        (ScanError("spacing", "0 mm", "0.2 to 10 mm", "mend it"), "error: spacing: found 0 mm; "),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "error: [Errno 28] No space"),
    ],
)
def test_expected_error_is_one_line_and_exit_code_1(error, line, capsys):
    @report_errors
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    told = capsys.readouterr().err
    assert told.startswith(line)
    assert told.count("\n") == 1


def test_defect_keeps_its_traceback():
    @report_errors
    def main():
        raise KeyError("x")

    with pytest.raises(KeyError):
        main()


def test_arguments_and_silence_pass_through(capsys):
    seen = []
    report_errors(lambda *args, **kwargs: seen.append((args, kwargs)))(1, b=2)
    assert seen == [((1,), {"b": 2})]
    assert capsys.readouterr().err == ""


def test_progress_goes_to_stderr_and_leaves_stdout_alone(capsys):
    assert list(track(iter("abc"), "work", 3)) == ["a", "b", "c"]
    told = capsys.readouterr()
    assert told.out == ""
    assert "work: 3/3" in told.err


@pytest.mark.parametrize("name", ["fullscale.scans.parallel", "tasks.predict", "__main__"])
def test_log_line_is_bare_and_shown_once_however_often_it_is_configured(name, capsys):
    for _ in range(3):
        configure_logging()
    logging.getLogger(name).info("100 %% of the scans, %d cases", 8)
    logging.getLogger(name).debug("for developers")
    assert capsys.readouterr() == ("", "100 % of the scans, 8 cases\n")


def test_other_libraries_are_left_alone(capsys):
    logging.getLogger("another.library").info("not ours")
    assert logging.getLogger("another.library").level == logging.NOTSET
    assert capsys.readouterr() == ("", "")


def test_errors_other_than_a_missing_reader_are_still_told():
    code = """
from fullscale.runtime.console import report_errors

@report_errors
def main():
    print("lost", flush=True)

main()
"""
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode != 0
    assert "No space left on device" in done.stderr


def test_import_loads_nothing_slow():
    code = "import sys, fullscale.runtime.console, fullscale.runtime.locks\n"
    code += "print([n for n in ('rich', 'pandas', 'numpy', 'torch', 'mlflow') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
